"""The papers' recipes under configs/ have the published settings, all of them explicit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localpipe import config as configs
from localpipe import data
from localpipe.config import shipped
from localpipe.config.keys import Config
from localpipe.config.load import update
from localpipe.config.resolved import Resolved
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.plan.resolve_here import resolve_here

RECIPES = [name for name in shipped.list_names() if name.startswith(("cifar10_", "imagenet_"))]

INFOPRO = {"name": "infopro", "task": "contrast", "head": "1c2f"}
SOFTMAX = {**INFOPRO, "task": "softmax"}
# network, objective, context, blocks of every stage, epochs
PUBLISHED: dict[str, tuple[str, dict[str, Any], str, list[int], int]] = {
    "cifar10_resnet32_e2e": ("resnet32", {"name": "greedy"}, "none", [16], 160),
    "cifar10_resnet32_dgl_k4": ("resnet32", {"name": "dgl", "head": "mlp"}, "none", [4] * 4, 160),
    "cifar10_resnet32_infopro_k2": (
        "resnet32", {**INFOPRO, "image_weight": [5, 5], "task_weight": [1, 1]}, "none", [8, 8], 160,
    ),
    "cifar10_resnet32_infopro_k16": (
        "resnet32", {**INFOPRO, "image_weight": [5, 0.2], "task_weight": [0.05, 0.5]},
        "none", [1] * 16, 160,
    ),
    "cifar10_resnet110_infopro_k2_balanced": (
        "resnet110", {**INFOPRO, "image_weight": [5, 5], "task_weight": [0.1, 0.1]},
        "none", [16, 39], 160,
    ),
    "cifar10_resnet32_auglocal_d3": (
        "resnet32", {"name": "auglocal", "aux_depth": 3, "aux_min_depth": 1, "pyramid": 0.5},
        "none", [1] * 12 + [4], 160,
    ),
    "cifar10_resnet32_contsup_r1e_k16": (
        "resnet32", {"name": "dgl", "head": "1c2f"}, "R1E", [1] * 16, 160,
    ),
    "imagenet_resnet101_infopro_k2": (
        "resnet101", {**SOFTMAX, "image_weight": [5, 5], "task_weight": [0.75, 0.75]},
        "none", [5, 29], 90,
    ),
    "imagenet_resnet34_auglocal_d4": (
        "resnet34", {"name": "auglocal", "aux_depth": 4, "aux_min_depth": 1, "pyramid": 0},
        "none", [1] * 17, 200,
    ),
}  # fmt: skip
# Learning rates by epoch.
RATES = {
    160: {1: 0.01, 2: 0.08897, 5: 0.32523, 10: 0.71408, 11: 0.79071, 80: 0.4, 120: 0.11716, 160: 0},
    90: {1: 0.4, 46: 0.2, 90: 0.000122},
    200: {1: 0.4, 101: 0.2, 200: 0.0000247},
}


def as_shipped(name: str) -> Config:
    path = shipped.find_path(name)
    assert path is not None
    return configs.load(path)


def resolved(name: str, folder: Path) -> Resolved:
    """Return a recipe with every `auto` resolved, for a few images of its shape and file format."""
    given = as_shipped(name)
    if given.data.name == "npz":
        images, labels = np.zeros((10, 32, 32, 3), np.uint8), np.arange(10)
        np.savez(folder / "set.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
        given = update(given, {"data.root": str(folder / "set.npz")})
    else:
        given = update(given, {"data.name": "synthetic", "data.samples": 4, "data.image_size": 224})
    return resolve_here(given, data.load(given.data, 0))


def test_every_recipe_is_checked_here() -> None:
    assert sorted(PUBLISHED) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_published_one(name: str, tmp_path: Path) -> None:
    network, objective, context, blocks, epochs = PUBLISHED[name]
    config = resolved(name, tmp_path)
    assert config.model.name == network and config.method.objective == objective
    assert config.method.context.mode == context and config.method.reconcile.distance == "none"
    _, plans = build_plans(config)
    assert [len(plan.blocks) for plan in plans] == blocks

    optim, batch = config.optim, config.data
    assert (optim.name, optim.momentum, optim.nesterov, optim.weight_decay) == (
        "sgd",
        0.9,
        True,
        1e-4,
    )
    assert optim.epochs == epochs and optim.accumulate == 1
    for epoch, rate in RATES[epochs].items():
        assert LearningRateSchedule(optim, 49).rate(49 * epoch) == pytest.approx(rate, abs=5e-6)
    assert (batch.batch_size, batch.drop_last, batch.train_subset, batch.validation) == (
        1024,
        False,
        None,
        0,
    )
    assert config.run.precision == "fp32"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_images_are_prepared_as_published(name: str, tmp_path: Path) -> None:
    given = as_shipped(name)
    assert given.data.augment == "auto"
    if given.data.name == "imagenet":
        assert (given.data.image_size, given.data.mean, given.data.std) == (
            "auto",
        ) * 3  # ImageNet's own
        assert given.model.num_classes == 1000
        return
    config = resolved(name, tmp_path)
    assert config.data.augment == "crop_flip" and config.model.num_classes == 10
    assert isinstance(config.data.mean, tuple) and isinstance(config.data.std, tuple)
    assert [255 * value for value in config.data.mean] == pytest.approx(
        [125.3, 123.0, 113.9], abs=2e-4
    )
    assert [255 * value for value in config.data.std] == pytest.approx([63.0, 62.1, 66.7], abs=2e-4)


def test_heavier_recipes_have_the_published_augmentation(tmp_path: Path) -> None:
    """Against the tables of DeiT, ConvNeXt and timm's A3."""
    augment = ("resized_crop_flip", "randaugment:9", "erasing:0.25", "mixup:0.8", "cutmix:1")
    deit = configs.load("recipes/deit_tiny_imagenet")
    assert deit.data.augment == augment and deit.data.batch_size == 1024
    assert (deit.optim.lr, deit.optim.weight_decay, deit.optim.epochs) == (1e-3, 0.05, 300)
    assert (deit.optim.warmup_epochs, deit.optim.ema, deit.task.label_smoothing) == (
        5,
        0.99996,
        0.1,
    )
    convnext = configs.load("recipes/convnext_tiny_imagenet")
    assert convnext.data.augment == augment and convnext.data.batch_size == 4096
    assert (convnext.optim.lr, convnext.optim.warmup_epochs) == (4e-3, 20)
    resnet = configs.load("recipes/resnet50_imagenet")
    assert resnet.data.augment == ("resized_crop_flip", "randaugment:6", "mixup:0.1", "cutmix:1")
    assert (resnet.data.image_size, resnet.optim.epochs, resnet.data.batch_size) == (160, 100, 2048)

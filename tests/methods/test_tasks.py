"""Objectives, contexts and reconciliation on segmentation and regression: trained, or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from localpipe import data
from localpipe.cli.command_line import main
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.methods.auglocal import Exit
from localpipe.methods.heads import ConvHead, PlaceHead
from localpipe.methods.infopro import InfoPro, LargeDecoder
from localpipe.methods.objective import Site
from localpipe.networks.blueprint import Block, Blueprint
from localpipe.pipeline.stages.replicas import Replicas
from localpipe.pipeline.stages.stage import Stage
from localpipe.runs.prepare import check_plan
from localpipe.tasks.layout import Grid
from localpipe.tasks.segmentation import Segmentation
from localpipe.tasks.task import Task
from tests.harness import settings, train_here

OBJECTIVES: list[dict[str, Any]] = [
    {"name": "greedy"},
    {"name": "dgl"},
    {"name": "dgl", "head": "1c2f"},
    {"name": "auglocal", "aux_depth": 2},
    {"name": "infopro", "task": "softmax", "image_weight": [1, 1], "task_weight": [1, 1]},
]
NETWORKS = {"shapes": ("places", "UNet"), "areas": ("small", "Forked")}
CASES = [(name, network) for name, networks in NETWORKS.items() for network in networks]


def configured(folder: Path, name: str, network: str, **sections: Any) -> Resolved:
    """Return the configuration of three stages, or others, on eight images of shapes."""
    samples = {"name": name, "samples": 8, "image_size": 16, "batch_size": 8, "augment": "none"}
    return settings(
        folder,
        data=samples,
        model={"name": f"tests.sample_networks:{network}", "crossing": 4},
        optim={"epochs": 1},
        **{"pipeline": {"stages": 3}, **sections},
    )


def train(config: Resolved) -> list[Stage]:
    """Train after the checks that precede a run."""
    check_plan(config, data.load(config.data, 0))
    return train_here(config)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize(("name", "network"), CASES)
def test_every_stage_has_an_exit_of_the_task(
    tmp_path: Path, name: str, network: str, objective: dict[str, Any]
) -> None:
    config = configured(
        tmp_path, name, network, method={"objective": objective}, run={"probe": "linear"}
    )
    for stage in train(config):
        assert all(tensor.isfinite().all() for tensor in stage.weights().values())
        if not stage.plan.is_last:
            h = torch.randn(2, *stage.plan.gives.standard_shape)
            outputs = stage.objective.exit(h)
            assert outputs is not None and outputs.shape == (2, *stage.task.output_shape)


@pytest.mark.parametrize(
    "axis",
    [{"context": {"mode": "R2E"}}, {"reconcile": {"distance": "cosine"}}],
    ids=["context", "reconcile"],
)
@pytest.mark.parametrize(("name", "network"), CASES)
def test_context_and_reconciliation_train(
    tmp_path: Path, name: str, network: str, axis: dict[str, Any]
) -> None:
    method = {"objective": {"name": "greedy"}, **axis}
    train(configured(tmp_path, name, network, method=method))


@pytest.mark.parametrize(
    "objective", [{"name": "predsim"}, {"name": "infopro", "task": "contrast"}], ids=str
)
@pytest.mark.parametrize(("name", "network"), CASES[::2])
def test_a_loss_over_classes_is_refused(
    tmp_path: Path, name: str, network: str, objective: dict[str, Any]
) -> None:
    config = configured(tmp_path, name, network, method={"objective": objective})
    with pytest.raises(UserError, match="compares samples by their classes, and task"):
        check_plan(config, data.load(config.data, 0))


@pytest.mark.parametrize("word", ["mixup", "cutmix"])
def test_a_loss_over_classes_names_the_mixtures_that_leave_none(
    capsys: pytest.CaptureFixture[str], word: str
) -> None:
    assert main(["plan", "demo", "method=predsim", f"data.augment={word}"]) == 2
    line = capsys.readouterr().err
    assert "mixup and cutmix in data.augment; choose another objective, or leave" in line


def test_the_distance_l2_needs_a_cross_entropy(tmp_path: Path) -> None:
    method = {"objective": {"name": "greedy"}, "reconcile": {"distance": "l2"}}
    train(configured(tmp_path, "shapes", "places", method=method))
    config = configured(tmp_path, "areas", "small", method=method)
    with pytest.raises(UserError, match="l2 needs a cross-entropy.* the loss of task regression"):
        check_plan(config, data.load(config.data, 0))


# -- heads of places --------------------------------------------------------------------------


def site_of(
    task: Task, shape: tuple[int, ...], dtype: str = "uint8", image: tuple[int, ...] = (3, 16, 16)
) -> Site:
    """Return the position after the first of three blocks of a network that gives maps."""
    blocks = [Block(name, f"{name}.", nn.Identity) for name in "abc"]
    task = replace(task, sample=image)
    blueprint = Blueprint("network", tuple(blocks), blocks[0], task, image, dtype=dtype)
    return Site(0, 3, 0, shape, blueprint, lambda name, build: build(), Replicas())


def test_dgl_has_the_head_of_infopro_on_cityscapes() -> None:
    """A 3x3 convolution to half of the channels, dropout of channels, and a 1x1 convolution."""
    head = PlaceHead(1024, Segmentation(19, sample=(3, 16, 16)))
    conv, norm, _, dropout = head.layers
    assert isinstance(conv, nn.Conv2d) and conv.weight.shape == (512, 1024, 3, 3)
    assert conv.bias is not None and isinstance(norm, nn.BatchNorm2d)
    assert isinstance(dropout, nn.Dropout2d) and dropout.p == 0.1
    assert head.classify.weight.shape == (19, 512)
    assert head(torch.randn(2, 1024, 4, 4)).shape == (2, 19, 16, 16)


def test_large_images_have_the_decoder_and_head_of_cityscapes() -> None:
    site = site_of(Segmentation(4, sample=(3, 128, 128)), (32, 16, 16), image=(3, 128, 128))
    options = InfoPro.Options(image_weight=(1.0, 1.0), task_weight=(1.0, 1.0))
    objective = InfoPro(options, site)
    assert isinstance(objective.decoder, LargeDecoder) and isinstance(objective.head, PlaceHead)


def test_tokens_on_a_grid_are_places() -> None:
    task = Segmentation(4, Grid(2, 3, prefix=1), sample=(3, 16, 16))
    h = torch.randn(2, 7, 5)
    site = site_of(task, (7, 5))
    head = ConvHead("0c1f", task.features(site.shape), 4, site.blueprint.task)
    assert head(h).shape == (2, 4, 16, 16)
    assert Exit(5, site.blueprint.task, 4, normalise=True)(h).shape == (2, 4, 16, 16)


def test_a_reconstruction_of_other_inputs_than_bytes_is_refused() -> None:
    task = Segmentation(4, sample=(3, 16, 16))
    site = site_of(task, (8, 4, 4), "float32")
    options = InfoPro.Options(image_weight=(1.0, 1.0), task_weight=(1.0, 1.0))
    with pytest.raises(UserError, match=r"reconstructs images of bytes, .* float32 of shape"):
        InfoPro(options, site)
    assert InfoPro(replace(options, image_weight=(0.0, 0.0)), site).decoder is None


@pytest.mark.parametrize("objective", ["greedy", "dgl", "auglocal"])
def test_an_activation_without_places_is_refused(tmp_path: Path, objective: str) -> None:
    config = configured(
        tmp_path,
        "shapes",
        "bottleneck",
        method={"objective": objective},
        pipeline={"stages": 2, "cuts": [1]},
    )
    with pytest.raises(UserError, match=r"has no rule for stage 0's output of shape \(16,\)"):
        check_plan(config, data.load(config.data, 0))


def test_a_probe_of_an_activation_without_places_is_refused(tmp_path: Path) -> None:
    config = configured(
        tmp_path, "shapes", "bottleneck", method={"objective": "greedy"}, run={"probe": "linear"},
        pipeline={"stages": 2, "cuts": [0]},
    )  # fmt: skip
    with pytest.raises(UserError, match=r"segmentation has no rule for an activation of shape"):
        check_plan(config, data.load(config.data, 0))

"""Mixtures of two images of a step: partners, weights, and what they do not depend on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from localpipe.config.keys import Data
from localpipe.data.batches import BatchReader
from localpipe.data.transforms.mixtures import (
    CUTMIX,
    MIXUP,
    Mixture,
    draw_mixture,
    find_partners,
    one_hot,
)
from tests.harness import ImageDataset, load_images

SAMPLES, BATCH = 22, 8  # three steps, the last one of 6
WORDS = ["mixup:0.8", "cutmix", "mixup,cutmix"]


def synthetic(augment: str, **keys: Any) -> ImageDataset:
    values: dict[str, Any] = {"name": "synthetic", "samples": SAMPLES, "image_size": 8}
    values |= {"augment": augment, "batch_size": BATCH, **keys}
    return load_images(Data(**values), 0)


def soft(dataset: ImageDataset, classes: int = 10) -> ImageDataset:
    return replace(dataset, soft_classes=classes)


def read(augment: str, rows: slice, epoch: int = 2, seed: int = 3) -> dict[str, Tensor]:
    return BatchReader(soft(synthetic(augment)), seed).read_train(epoch, rows)


def test_the_partner_is_the_image_before_and_the_first_has_the_last_of_its_step() -> None:
    (one,) = find_partners(slice(8, 16), SAMPLES, BATCH)
    assert (one.start, one.own.tolist()) == (8, list(range(8, 16)))
    assert one.partners.tolist() == [15, *range(8, 15)]
    steps = find_partners(slice(14, 18), SAMPLES, BATCH)
    assert [(step.start, step.own.tolist(), step.partners.tolist()) for step in steps] == [
        (8, [14, 15], [13, 14]),
        (16, [16, 17], [21, 16]),
    ]
    assert find_partners(slice(30, 40), SAMPLES, BATCH) == []


@pytest.mark.parametrize("augment", WORDS)
@pytest.mark.parametrize("cuts", [[8], [4, 8], [1, 2, 5, 8], [3, 8]])
def test_a_part_of_a_step_has_the_bytes_of_the_whole_step(augment: str, cuts: list[int]) -> None:
    """So neither the replicas nor the messages of a step matter."""
    for start in (0, 8):
        whole = read(augment, slice(start, start + 8))
        first = start
        for cut in cuts:
            part = read(augment, slice(first, start + cut))
            for name, tensor in part.items():
                assert torch.equal(tensor, whole[name][first - start : cut]), name
            first = start + cut
    remainder = read(augment, slice(16, 24))
    assert len(remainder["target"]) == 6
    assert torch.equal(read(augment, slice(19, 22))["image"], remainder["image"][3:])


@pytest.mark.parametrize("augment", WORDS)
def test_a_mixture_follows_from_seed_epoch_and_step(augment: str) -> None:
    found = read(augment, slice(0, 8))
    again = read(augment, slice(0, 8))
    assert all(torch.equal(found[name], again[name]) for name in found)
    weights = {
        draw_mixture([("mixup", 1.0)], seed, epoch, start, (8, 8)).weight
        for seed, epoch, start in [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 8)]
    }
    assert len(weights) == 4


@pytest.mark.parametrize("augment", ["mixup:0.8", "cutmix"])
def test_a_batch_is_what_torchvision_makes_of_its_images(
    augment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read(augment, slice(8, 16))
    order = BatchReader(synthetic("none"), 3)
    plain = order.read_train(2, slice(8, 16))
    word, _, alpha = augment.partition(":")
    mixture = draw_mixture([(word, float(alpha or 1))], 3, 2, 8, (8, 8))
    reference: Any = {"mixup": v2.MixUp, "cutmix": v2.CutMix}[word](num_classes=10)
    top, left, bottom, right = mixture.box
    params: dict[str, Any] = {"lam": mixture.weight, "lam_adjusted": mixture.weight}
    params["box"] = (left, top, right, bottom)
    monkeypatch.setattr(reference, "make_params", lambda inputs: dict(params))
    image = plain["image"].float() if word == "mixup" else plain["image"]
    images, targets = reference(image, plain["target"])
    torch.testing.assert_close(found["image"], images, atol=1e-3, rtol=1e-6)
    torch.testing.assert_close(found["target"], targets, atol=1e-6, rtol=1e-6)
    assert 0 < mixture.weight < 1 and (found["image"] != image).any()


def test_mixup_is_float_in_0_to_255_and_cutmix_stays_bytes() -> None:
    mixed = read("mixup", slice(0, 8))["image"]
    assert mixed.dtype == torch.float32 and 100 < mixed.max() <= 255 and mixed.min() >= 0
    assert (mixed != mixed.round()).any()
    assert read("cutmix", slice(0, 8))["image"].dtype == torch.uint8


def test_images_that_are_not_trained_on_are_not_mixed() -> None:
    for augment, dtype in (("mixup", torch.float32), ("cutmix", torch.uint8)):
        dataset = synthetic(augment, validation=4)
        reader, plain = BatchReader(soft(dataset, 12), 3), BatchReader(dataset, 3)
        for held_out in ("read_test", "read_validation"):
            batch = getattr(reader, held_out)(slice(0, 4))
            expected = getattr(plain, held_out)(slice(0, 4))
            assert batch["image"].dtype == dtype
            assert torch.equal(batch["image"], expected["image"])
            assert batch["target"].shape == (4, 12) and batch["target"].dtype == torch.float32
            assert torch.equal(batch["target"].argmax(1), expected["target"])
            assert torch.equal(batch["target"].sum(1), torch.ones(4))


def test_probabilities_without_mixtures_are_those_of_one_class() -> None:
    dataset = synthetic("crop")
    target = BatchReader(soft(dataset), 3).read_train(1, slice(0, 8))["target"]
    assert torch.equal(
        target.argmax(1), BatchReader(dataset, 3).read_train(1, slice(0, 8))["target"]
    )
    assert torch.equal(target, torch.nn.functional.one_hot(target.argmax(1), 10).float())


def test_an_image_may_be_changed_before_it_is_mixed() -> None:
    found = read("crop_flip,colour,cutmix", slice(0, 8))
    changed = BatchReader(synthetic("crop_flip,colour"), 3).read_train(2, slice(0, 8))["image"]
    mixture = draw_mixture([("cutmix", 1.0)], 3, 2, 0, (8, 8))
    mixed = mixture.mix_images(changed.numpy(), changed.roll(1, 0).numpy())
    assert (found["image"].numpy() == mixed).all()


def test_weights_are_of_the_beta_distribution_and_boxes_have_their_share() -> None:
    alphas = {0.2: 0.1786, 1.0: 1 / 12, 4.0: 1 / 36}  # variances, 1 / (4 (2 alpha + 1))
    for alpha, variance in alphas.items():
        weights = [
            draw_mixture([("mixup", alpha)], 0, 1, start, (8, 8)).weight for start in range(4000)
        ]
        assert np.mean(weights) == pytest.approx(0.5, abs=0.02)
        assert np.var(weights) == pytest.approx(variance, rel=0.1)
    for start in range(300):
        found = draw_mixture([("cutmix", 1.0)], 0, 1, start, (32, 20))
        top, left, bottom, right = found.box
        assert 0 <= top <= bottom <= 32 and 0 <= left <= right <= 20
        assert found.weight == pytest.approx(1 - (bottom - top) * (right - left) / 640)


def test_of_two_mixtures_each_has_about_half_of_the_steps() -> None:
    words = [("mixup", 0.8), ("cutmix", 1.0)]
    found = [draw_mixture(words, 0, 1, start, (8, 8)).word for start in range(1000)]
    assert 440 < found.count(MIXUP) < 560 and found.count(CUTMIX) == 1000 - found.count(MIXUP)


def test_inputs_are_not_changed_by_a_mixture() -> None:
    images, partners = np.zeros((2, 3, 4, 4), np.uint8), np.full((2, 3, 4, 4), 9, np.uint8)
    mixed = Mixture(CUTMIX, 0.75, (0, 0, 2, 2)).mix_images(images, partners)
    assert mixed.sum() == 2 * 3 * 4 * 9 and not images.any()
    assert one_hot(np.array([1, 0]), 3).tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("augment", ["mixup", "cutmix"])
def test_an_empty_batch_has_the_shapes_of_a_batch(augment: str) -> None:
    batch = read(augment, slice(22, 30))
    assert batch["image"].shape == (0, 3, 8, 8) and batch["target"].shape == (0, 10)
    assert batch["image"].dtype == (torch.float32 if augment == "mixup" else torch.uint8)

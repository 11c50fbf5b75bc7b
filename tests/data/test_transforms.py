"""Changes of single images: what they do, beside torchvision's, and what they depend on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from localpipe.config.keys import Data
from localpipe.data.augment import augment_batch, read_batch
from localpipe.data.images import Split
from localpipe.data.transforms.boxes import draw_box
from localpipe.data.transforms.changes import change_images
from localpipe.data.transforms.colour import ADJUSTMENTS, adjust
from localpipe.data.transforms.randaugment import NAMES, apply
from tests.harness import ImageDataset, load_images

CHANGES = ["randaugment", "colour", "erasing:1", "cutout:3"]
MEAN = (0.1, 0.5, 0.9)
COLOUR = np.array([26, 128, 230])


def synthetic(augment: str) -> ImageDataset:
    keys: dict[str, Any] = {"name": "synthetic", "samples": 40, "image_size": 12}
    return load_images(Data(augment=augment, mean=MEAN, std=(0.2, 0.2, 0.2), **keys), 0)


def unchanged(dataset: ImageDataset, index: Any) -> np.ndarray:
    assert isinstance(dataset.train, Split)
    return read_batch(dataset.train, np.asarray(index))


def picture(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (18, 22, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("augment", [*CHANGES, ",".join(["crop_flip", *CHANGES])])
def test_an_image_depends_on_seed_epoch_and_index_alone(augment: str) -> None:
    dataset = synthetic(augment)
    whole = augment_batch(dataset, np.arange(40), 3, 5)
    index = np.array([7, 30, 7, 0])
    torch.manual_seed(99)
    np.random.seed(99)
    before = torch.get_rng_state()
    assert (augment_batch(dataset, index, 3, 5) == whole[index]).all()
    assert torch.equal(torch.get_rng_state(), before), "a stage draws its dropout from it"
    for seed, epoch in ((4, 5), (3, 6)):
        other = augment_batch(dataset, np.arange(40), seed, epoch)
        assert (other != whole).any((1, 2, 3)).mean() > 0.8


@pytest.mark.parametrize("augment", CHANGES)
def test_a_change_changes_images_and_leaves_the_data_set_alone(augment: str) -> None:
    dataset = synthetic(augment)
    before = unchanged(dataset, np.arange(40))
    found = augment_batch(dataset, np.arange(40), 0, 1)
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    assert (found != before).any((1, 2, 3)).mean() > 0.8
    assert (unchanged(dataset, np.arange(40)) == before).all()


def test_the_words_are_applied_in_their_order() -> None:
    images = unchanged(synthetic("none"), np.arange(4))
    first, second = images.copy(), images.copy()
    words = [("colour", 0.9), ("cutout", 6.0)]
    change_images(first, np.arange(4), 0, 1, words, MEAN)
    change_images(second, np.arange(4), 0, 1, words[::-1], MEAN)
    covered = (first == COLOUR[None, :, None, None]).all(1)
    assert covered.any() and not (second == COLOUR[None, :, None, None]).all(1).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_gray_images_are_changed_too(channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, channels, 9, 7), np.uint8)
    found = images.copy()
    words = [("randaugment", 9.0), ("colour", 0.4), ("erasing", 1.0), ("cutout", 3.0)]
    change_images(found, np.arange(6), 0, 1, words, MEAN[:channels])
    assert found.shape == images.shape and (found != images).any((1, 2, 3)).all()


@pytest.mark.parametrize("is_negative", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", NAMES)
def test_an_operation_is_torchvisions(
    name: str, mode: str, is_negative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = v2.RandAugment(num_ops=1, magnitude=9)
    item = (name, reference._AUGMENTATION_SPACE[name])
    monkeypatch.setattr(reference, "_get_random_item", lambda space: item)
    monkeypatch.setattr(torch, "rand", lambda size: torch.tensor(0.0 if is_negative else 1.0))
    expected = np.asarray(reference(picture(mode)))
    assert (np.asarray(apply(picture(mode), name, 9 / 30, is_negative)) == expected).all()


def test_randaugment_takes_every_operation_of_torchvision() -> None:
    assert set(NAMES) == set(v2.RandAugment._AUGMENTATION_SPACE)


def test_magnitude_0_of_randaugment_moves_nothing() -> None:
    keeping = set(NAMES) - {"AutoContrast", "Equalize", "Solarize", "Posterize"}
    for name in keeping:
        assert (np.asarray(apply(picture(), name, 0, True)) == np.asarray(picture())).all(), name


def test_colours_are_adjusted_as_torchvision_does(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = v2.ColorJitter(0.4, 0.4, 0.4)
    factors = iter([1.3, 0.7, 1.1])
    monkeypatch.setattr(reference, "_generate_value", lambda low, high: next(factors))
    monkeypatch.setattr(torch, "randperm", lambda count: torch.tensor([2, 0, 3, 1]))
    order = [("saturation", 1.1), ("brightness", 1.3), ("contrast", 0.7)]
    assert (np.asarray(adjust(picture(), order)) == np.asarray(reference(picture()))).all()
    assert ADJUSTMENTS == ("brightness", "contrast", "saturation")


def test_the_factors_of_colours_fill_their_range(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, float]] = []

    def note(image: Image.Image, factors: list[tuple[str, float]]) -> Image.Image:
        drawn.extend(factors)
        return image

    monkeypatch.setattr("localpipe.data.transforms.colour.adjust", note)
    images = np.zeros((500, 3, 2, 2), np.uint8)
    change_images(images, np.arange(500), 0, 1, [("colour", 0.4)], MEAN)
    values = np.array([factor for _, factor in drawn])
    assert 0.6 <= values.min() < 0.61 and 1.39 < values.max() <= 1.4
    assert abs(values.mean() - 1) < 0.02
    assert len({tuple(name for name, _ in drawn[i : i + 3]) for i in range(0, 1500, 3)}) == 6


def torchvisions_box(numbers: list[float], patch: pytest.MonkeyPatch) -> tuple[int, ...]:
    drawn, placed = iter(numbers[:20]), iter(numbers[20:])

    def uniform(self: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return self.fill_(low + (high - low) * next(drawn))

    def randint(low: int, high: int, size: Any) -> torch.Tensor:
        return torch.tensor([low + int(next(placed) * (high - low))])

    with patch.context() as here:
        here.setattr(torch.Tensor, "uniform_", uniform)
        here.setattr(torch, "randint", randint)
        found = v2.RandomErasing().make_params([torch.zeros(3, 20, 33)])
    if found["v"] is None:
        return 0, 0, 0, 0
    top, left = found["i"], found["j"]
    return top, left, top + found["h"], left + found["w"]


def test_a_box_is_erased_where_torchvision_would(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in np.random.default_rng(0).random((100, 22)).tolist():
        assert draw_box(row, 20, 33) == torchvisions_box(row, monkeypatch)
    # No box of these fits.
    assert draw_box([0.99, 1.0] * 11, 20, 200) == (0, 0, 0, 0)


def test_erasing_covers_a_box_of_some_images_with_the_mean() -> None:
    images = np.full((400, 3, 20, 20), 7, np.uint8)
    change_images(images, np.arange(400), 0, 1, [("erasing", 0.25)], MEAN)
    covered = (images == COLOUR[None, :, None, None]).all(1)
    assert ((images == 7).all(1) | covered).all()
    areas = covered.sum((1, 2)) / 400
    assert 0.18 < (areas > 0).mean() < 0.32
    assert areas[areas > 0].min() > 0.01 and areas.max() < 0.36


def test_cutout_covers_a_square_that_may_leave_the_image() -> None:
    images = np.full((4000, 3, 20, 20), 7, np.uint8)
    change_images(images, np.arange(4000), 0, 1, [("cutout", 8.0)], MEAN)
    covered = (images == COLOUR[None, :, None, None]).all(1)
    assert ((images == 7).all(1) | covered).all()
    areas = covered.sum((1, 2))
    assert areas.max() == 64 and areas.min() == 16
    assert covered[:, 0, 0].any() and covered[:, 19, 19].any()


def test_an_unknown_change_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        change_images(np.zeros((1, 3, 2, 2), np.uint8), np.arange(1), 0, 1, [("x", 1.0)], MEAN)

"""Random images of coloured shapes, with the class of every pixel, or the area of every class."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from localpipe import seeds
from localpipe.config.keys import Data
from localpipe.data.images import RawSamples, configured_size, refuse_test_share
from localpipe.data.samples import ArraySamples, InputFacts, hash_arrays, samples_from_arrays
from localpipe.fields import IMAGE

CLASSES = ("background", "disc", "square", "diamond")
OUTLINE = 255  # of pixels on an edge, which have no class
# Red, green and blue of every class.
_COLOURS = np.array([[40, 40, 60], [220, 80, 60], [70, 200, 90], [80, 110, 230]], np.uint8)
_NOISE = 96


def load_shapes(config: Data) -> RawSamples:
    """Make data.samples training images (3, H, W), and a quarter as many for tests, at least two.

    A mask (H, W) of bytes has the class of every pixel: background, disc, square or diamond, and
    255 on the edges of shapes. Every image has one shape of each kind, and later ones cover
    earlier ones. The images are the same for every seed. The size is data.image_size, 32 x 32 for
    `auto`. Raises UserError if data.test is set. Of the other keys only mean and std are read.
    """
    train, test = _make_splits(config)
    return _describe(train, test, "segmentation", CLASSES)


def load_areas(config: Data) -> RawSamples:
    """Make the images of `load_shapes`. The target of an image is three numbers in 0..1.

    They are the shares of its pixels that a disc, a square and a diamond cover. Raises UserError as
    `load_shapes` does.
    """
    train, test = (_measure_areas(split) for split in _make_splits(config))
    return _describe(train, test, "regression", CLASSES[1:])


def _describe(
    train: ArraySamples, test: ArraySamples, task: str, classes: tuple[str, ...]
) -> RawSamples:
    digest = hash_arrays(train.inputs, train.targets, test.inputs, test.targets)
    return RawSamples(
        train,
        test,
        num_classes=len(classes),
        inputs=InputFacts(train.inputs.shape[1:], None, task, digest),
        classes=classes,
        mean=(0.24, 0.27, 0.3),
        std=(0.22, 0.24, 0.2),
    )


def _measure_areas(split: ArraySamples) -> ArraySamples:
    """Return the same images with the share of the pixels of every shape, (N, 3)."""
    masks = split.targets.reshape(len(split), -1)
    shares = [(masks == label).mean(1) for label in range(1, len(CLASSES))]
    return replace(split, targets=np.stack(shares, 1).astype(np.float32))


def _make_splits(config: Data) -> tuple[ArraySamples, ArraySamples]:
    refuse_test_share(config)
    height, width = configured_size(config) or (32, 32)
    train = _make_split("train", config.samples, height, width)
    return train, _make_split("test", max(config.samples // 4, 2), height, width)


def _make_split(part: str, samples: int, height: int, width: int) -> ArraySamples:
    index = np.arange(samples, dtype=np.int64)
    masks = np.zeros((samples, height, width), np.uint8)
    fills = np.zeros_like(masks)
    for label in range(1, len(CLASSES)):
        distance = _measure_distance(part, label, index, height, width)
        fills[distance <= 0] = label
        masks[distance <= 0] = label
        masks[np.abs(distance) < 0.5] = OUTLINE

    # The colour of the class, with noise on every channel of every pixel.
    pixels = np.arange(samples * height * width * 3, dtype=np.int64)
    bits = seeds.uniform_bits(0, pixels, "shapes", part, "noise")
    noise = (bits % np.uint64(_NOISE)).astype(np.int64).reshape(samples, 3, height, width)
    colours = _COLOURS[fills].transpose(0, 3, 1, 2).astype(np.int64)
    images = np.clip(colours + noise - _NOISE // 2, 0, 255).astype(np.uint8)
    return samples_from_arrays(images, masks, IMAGE)


def _measure_distance(
    part: str, label: int, index: NDArray[np.int64], height: int, width: int
) -> NDArray[np.float64]:
    """Return how far every pixel is outside the shape of a class, (N, H, W), below 0 inside."""
    draws = [_draw(index, part, label, name) for name in ("y", "x", "radius")]
    y, x, radius = (draw[:, None, None] for draw in draws)
    rows = np.abs(np.arange(height)[:, None] + 0.5 - y * height)
    columns = np.abs(np.arange(width) + 0.5 - x * width)
    distances = {1: np.hypot(rows, columns), 2: np.maximum(rows, columns), 3: rows + columns}
    distance: NDArray[np.float64] = distances[label] - (0.1 + 0.2 * radius) * min(height, width)
    return distance


def _draw(index: NDArray[np.int64], *names: object) -> NDArray[np.float64]:
    """Return numbers in 0..1 that depend on the index and the names alone, (N,)."""
    bits = seeds.uniform_bits(0, index, "shapes", *names)
    return bits.astype(np.float64) / 2**64

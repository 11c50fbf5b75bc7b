"""Random images of ten classes that a network can distinguish."""

from __future__ import annotations

import math
import sys

import numpy as np
from numpy.typing import NDArray

from localpipe import seeds
from localpipe.config.keys import Data
from localpipe.data.images import (
    RawDataset,
    Recipe,
    Split,
    configured_size,
    refuse_test_share,
    split_from_arrays,
)


def load_synthetic(config: Data) -> RawDataset:
    """Make data.samples random training images, and a quarter as many for tests, at least two.

    There are 10 classes. The images are the same for every seed, and RGB. The size is
    data.image_size, 32x32 for `auto`. The class of image i is i % 10. Raises UserError if data.test
    is set. No other key is read.
    """
    refuse_test_share(config)
    size = configured_size(config) or (32, 32)
    train = _make_split("train", config.samples, size)
    test = _make_split("test", max(config.samples // 4, 2), size)
    return RawDataset(train, test, 10, Recipe("none", 4, "reflect"))


def _make_split(part: str, samples: int, size: tuple[int, int]) -> Split:
    """Make `samples` images (H, W, 3): half noise, half the 4x4 colour pattern of their class."""
    labels = np.arange(samples, dtype=np.int64) % 10
    noise = _random_bytes((samples, *size, 3), part)
    rows = np.arange(size[0]) * 4 // size[0]
    columns = np.arange(size[1]) * 4 // size[1]
    patterns = _random_bytes((10, 4, 4, 3), "pattern")[:, rows][:, :, columns]
    return split_from_arrays(noise // 2 + patterns[labels] // 2, labels)


def _random_bytes(shape: tuple[int, ...], name: str) -> NDArray[np.uint8]:
    """Return random bytes of a shape that depend on the name alone."""
    size = math.prod(shape)
    count = -(-size // 8)  # of 64-bit numbers
    if count > sys.maxsize // 8:
        raise MemoryError  # where numpy would raise errors of other classes
    numbers = seeds.uniform_bits(0, np.arange(count, dtype=np.int64), "synthetic", name)
    return numbers.astype("<u8").view(np.uint8)[:size].reshape(shape)

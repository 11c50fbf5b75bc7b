"""Random images of ten classes that can be told apart."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from localpipe import seeds
from localpipe.config.keys import Data
from localpipe.data.images import Raw, Recipe, Split, configured_size, split_from_arrays


def load_synthetic(config: Data) -> Raw:
    """Make random images of ten classes that can be told apart, the same images for every seed."""
    size = configured_size(config) or (32, 32)
    train = _noise("train", config.samples, size)
    test = _noise("test", max(config.samples // 4, 2), size)
    return Raw(train, test, 10, Recipe("none", 4, "reflect"))


def _noise(part: str, samples: int, size: tuple[int, int]) -> Split:
    """Make `samples` images (H, W, 3), half noise and half the pattern of their class, 4x4 fields of colour."""
    labels = np.arange(samples, dtype=np.int64) % 10
    noise = _bytes((samples, *size, 3), part)
    down, across = (np.arange(side) * 4 // side for side in size)
    pattern = _bytes((10, 4, 4, 3), "pattern")[:, down][:, :, across]
    return split_from_arrays(noise // 2 + pattern[labels] // 2, labels)


def _bytes(shape: tuple[int, ...], name: str) -> NDArray[np.uint8]:
    """Return random bytes that depend on the name alone."""
    size = math.prod(shape)
    words = seeds.uniform_bits(0, np.arange(-(-size // 8), dtype=np.int64), "synthetic", name)
    return words.astype("<u8").view(np.uint8)[:size].reshape(shape)

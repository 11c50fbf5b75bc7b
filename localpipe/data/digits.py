"""scikit-learn's handwritten digits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from localpipe import seeds
from localpipe.config.keys import Data
from localpipe.data.images import Raw, Recipe, split_from_arrays, take_rows


def load_digits(config: Data) -> Raw:
    """Load scikit-learn's 1,797 handwritten digits as 32x32 RGB; 360 of them, always the same, are the test."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = enlarge(digits.images.astype(np.int64))
    shuffled = seeds.permutation(0, len(images), "digits")
    test, train = np.sort(shuffled[:360]), np.sort(shuffled[360:])
    whole = split_from_arrays(images, digits.target)
    # Digits are not flipped: a mirrored 2 is no 2.
    return Raw(take_rows(whole, train), take_rows(whole, test), 10, Recipe("crop", 2, "zero"))


def enlarge(images: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Enlarge (N, 8, 8) of 0..16 to (N, 32, 32, 3) of 0..255; bilinear, in integers, so that every machine agrees."""
    # Pixel i of 32 lies at (i + 1/2) / 4 - 1/2 of 8, which is (2 i - 3) / 8; beyond the edge it is the edge.
    place = np.clip(2 * np.arange(32) - 3, 0, 56)
    low, eighths = place // 8, place % 8
    weights = np.zeros((32, 8), np.int64)
    np.add.at(weights, (np.arange(32), low), 8 - eighths)
    np.add.at(weights, (np.arange(32), np.minimum(low + 1, 7)), eighths)
    sums = weights @ images @ weights.T  # 0 .. 16 * 64
    gray = ((sums * 255 + 512) // 1024).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=3)

"""scikit-learn's handwritten digits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from localpipe import seeds
from localpipe.config.keys import Data
from localpipe.data.images import (
    RawDataset,
    Recipe,
    refuse_test_share,
    split_from_arrays,
)

_TEST_IMAGES = 360


def load_digits(config: Data) -> RawDataset:
    """Load scikit-learn's 1,797 handwritten digits as 32x32 RGB images of 10 classes.

    The test split is always the same 360 of them, and the other 1,437 are the training split. The
    files come with scikit-learn, so nothing is downloaded. Raises UserError if data.test is set. No
    other key is read.
    """
    from sklearn import datasets

    refuse_test_share(config)
    digits = datasets.load_digits()
    images = enlarge(digits.images.astype(np.int64))
    both = split_from_arrays(images, digits.target)
    rows = seeds.permutation(0, len(images), "digits")
    test = both.take(np.sort(rows[:_TEST_IMAGES]))
    train = both.take(np.sort(rows[_TEST_IMAGES:]))
    # Digits are not flipped: a mirrored 2 is no 2.
    return RawDataset(train, test, 10, Recipe("crop", 2, "zero"))


def enlarge(images: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Enlarge images (N, 8, 8) with values 0..16 to (N, 32, 32, 3), uint8, with values 0..255.

    The interpolation is bilinear and computed in integers, so that every machine agrees. The three
    channels are equal. Values out of 0..16 are not refused.
    """
    # The centre of pixel i of 32 is at (i + 1/2) / 4 - 1/2 of 8, which is (2 i - 3) / 8.
    # A centre outside the image is moved to its edge.
    centre = np.clip(2 * np.arange(32) - 3, 0, 56)
    low, eighths = centre // 8, centre % 8
    weights = np.zeros((32, 8), np.int64)
    np.add.at(weights, (np.arange(32), low), 8 - eighths)
    np.add.at(weights, (np.arange(32), np.minimum(low + 1, 7)), eighths)
    sums = weights @ images @ weights.T  # 0 .. 16 * 64
    gray = ((sums * 255 + 512) // 1024).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=3)

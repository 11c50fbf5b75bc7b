"""Mean and standard deviation per channel of images in 0..1: checked, or found of their values."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from localpipe.config.keys import Data
from localpipe.errors import UserError

Values = tuple[float, ...]  # one per channel


def check_values(key: str, values: Values, config: Data, channels: int) -> Values:
    """Return data.mean or data.std; raise UserError if its numbers are not fit to normalise."""
    if len(values) != channels:
        raise UserError(
            f"data: data.{key} has {len(values)} numbers, but {config.name} has {channels} "
            "channels; give one number a channel, or auto"
        )
    for value in values:
        if not math.isfinite(value) or (key == "std" and value <= 0):
            expected = "numbers"
            if key == "std":
                expected = "numbers above 0"
            raise UserError(f"data: data.{key} must be finite {expected}; got {list(values)}")
    return values


def find_moments(counts: NDArray[np.int64]) -> tuple[Values, Values]:
    """Return mean and standard deviation per channel, of images in 0..1.

    counts: (C, 256), how often every channel has every value. A constant channel has the standard
    deviation 1.
    """
    levels = np.arange(256) / 255
    weights = counts / counts.sum(1, keepdims=True)
    mean = (weights * levels).sum(1)
    std = np.sqrt((weights * (levels - mean[:, None]) ** 2).sum(1))
    std[std == 0] = 1.0  # a constant channel, which is not to be divided by 0
    return tuple(mean.tolist()), tuple(std.tolist())

"""ImageNet's crops: at random for training (Szegedy et al. 2015, as torchvision's RandomResizedCrop), of the centre for tests.

What is drawn is handed in, (B, DRAWS) numbers in 0..1 that follow from (seed, epoch, index).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from localpipe import seeds

if TYPE_CHECKING:
    from PIL.Image import Image
AREA = (0.08, 1.0)  # of the image's
RATIO = (3 / 4, 4 / 3)  # width / height
TRIES = 10
DRAWS = 2 * TRIES + 2
MARGIN = 256 / 224  # of the shorter side that a centre crop is cut from


def draw_crops(seed: int, index: NDArray[np.int64], epoch: int) -> NDArray[np.float64]:
    """Return (B, DRAWS) numbers in 0..1 for training images, index: (B,)."""
    bits = [
        seeds.uniform_bits(seed, index, "resized_crop", epoch, number) for number in range(DRAWS)
    ]
    return (np.stack(bits, 1) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def crop_box(numbers: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a random crop of an image.

    Area and ratio are drawn until the crop lies within the image; after ten tries it is the largest one at the centre
    whose ratio is allowed. `numbers` are one row of `draws`.
    """
    for area, ratio in zip(numbers[0 : 2 * TRIES : 2], numbers[1 : 2 * TRIES : 2], strict=True):
        pixels = height * width * (AREA[0] + (AREA[1] - AREA[0]) * area)
        shape = RATIO[0] * (RATIO[1] / RATIO[0]) ** ratio
        high, wide = round(math.sqrt(pixels / shape)), round(math.sqrt(pixels * shape))
        if 0 < high <= height and 0 < wide <= width:
            return (
                int(numbers[-2] * (height - high + 1)),
                int(numbers[-1] * (width - wide + 1)),
                high,
                wide,
            )
    high, wide = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    return (height - high) // 2, (width - wide) // 2, high, wide


def crop_at_random(picture: Image, size: tuple[int, int], numbers: Sequence[float]) -> Image:
    """Return the crop that `numbers` choose, resized to `size` (H, W)."""
    from torchvision.transforms import functional

    top, left, high, wide = crop_box(numbers, picture.height, picture.width)
    found: Image = functional.resized_crop(picture, top, left, high, wide, list(size))
    return found


def crop_centre(picture: Image, size: tuple[int, int]) -> Image:
    """Return the centre, `size` (H, W), of an image whose shorter side is resized to 256 / 224 of that."""
    from torchvision.transforms import functional

    larger = functional.resize(picture, [round(max(size) * MARGIN)])
    found: Image = functional.center_crop(larger, list(size))
    return found

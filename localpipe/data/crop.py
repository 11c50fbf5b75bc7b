"""ImageNet's crops: a random one for training, the centre one for tests.

The random crop is that of Szegedy et al. 2015, as torchvision's RandomResizedCrop. The caller
passes the random numbers, (B, DRAWS) in 0..1, which depend on (seed, epoch, index).
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
AREA = (0.08, 1.0)  # of the image's area
RATIO = (3 / 4, 4 / 3)  # width / height
TRIES = 10
DRAWS = 2 * TRIES + 2
MARGIN = 256 / 224  # shorter side that a centre crop is cut from, over the crop's longer side


def draw_crops(seed: int, index: NDArray[np.int64], epoch: int) -> NDArray[np.float64]:
    """Return (B, DRAWS) float64 random numbers in [0, 1) for the training images at `index` (B,).

    A row depends on (seed, its index, epoch) alone.
    """
    return seeds.uniform_numbers(seed, index, DRAWS, "resized_crop", epoch)


def crop_box(numbers: Sequence[float], height: int, width: int) -> tuple[int, int, int, int]:
    """Return (top, left, height, width), in pixels, of a random crop of an image of height x width.

    Area and ratio are drawn up to ten times until the crop lies within the image. After ten tries
    it is the largest centre crop with an allowed ratio. numbers: one row of `draw_crops`. The
    result depends on the arguments alone.
    """
    areas = numbers[0 : 2 * TRIES : 2]
    ratios = numbers[1 : 2 * TRIES : 2]
    for area, ratio in zip(areas, ratios, strict=True):
        # The area is uniform in AREA, the logarithm of the ratio is uniform in RATIO.
        pixels = height * width * (AREA[0] + (AREA[1] - AREA[0]) * area)
        shape = RATIO[0] * (RATIO[1] / RATIO[0]) ** ratio
        crop_height = round(math.sqrt(pixels / shape))
        crop_width = round(math.sqrt(pixels * shape))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top = int(numbers[-2] * (height - crop_height + 1))
            left = int(numbers[-1] * (width - crop_width + 1))
            return top, left, crop_height, crop_width

    # No try lies within the image.
    crop_height = min(height, round(width / RATIO[0]))
    crop_width = min(width, round(height * RATIO[1]))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def crop_at_random(picture: Image, size: tuple[int, int], numbers: Sequence[float]) -> Image:
    """Return a new image: the crop that `crop_box` gives for `numbers`, resized to `size` (H, W).

    The interpolation is bilinear. numbers: one row of `draw_crops`.
    """
    from torchvision.transforms import functional

    top, left, height, width = crop_box(numbers, picture.height, picture.width)
    crop: Image = functional.resized_crop(picture, top, left, height, width, list(size))
    return crop


def crop_centre(picture: Image, size: tuple[int, int]) -> Image:
    """Return the centre of a resized image, of `size` (H, W), as a new image.

    The image's shorter side is first resized to 256 / 224 of the longer side of `size`, bilinearly.
    """
    from torchvision.transforms import functional

    larger = functional.resize(picture, [round(max(size) * MARGIN)])
    crop: Image = functional.center_crop(larger, list(size))
    return crop

"""Random boxes of an image that are covered by one colour: random erasing, and cutout."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from localpipe import seeds

AREA = (0.02, 0.33)  # of the image's area
RATIO = (0.3, 3.3)  # height / width
TRIES = 10
_DRAWS = 2 * TRIES + 3

Box = tuple[int, int, int, int]  # top, left, bottom, right; without bottom and right themselves


def erase(
    images: NDArray[np.uint8],
    index: NDArray[np.int64],
    seed: int,
    epoch: int,
    probability: float,
    colour: NDArray[np.uint8],
) -> None:
    """Cover a random box of some images (B, C, H, W) in place (Zhong et al. 2020).

    index: (B,), of the images in the training split. colour: (C,). Area and ratio are those of
    torchvision's v2.RandomErasing. The boxes depend on (seed, epoch, index) alone.
    """
    height, width = images.shape[2:]
    numbers = seeds.uniform_numbers(seed, index, _DRAWS, "erasing", epoch)
    for image, row in zip(images, numbers.tolist(), strict=True):
        if row[0] < probability:
            _cover(image, draw_box(row[1:], height, width), colour)


def draw_box(numbers: Sequence[float], height: int, width: int) -> Box:
    """Return a random box within an image of height x width, empty where ten tries do not fit.

    numbers: 2 * TRIES + 2 of them in [0, 1): an area and a ratio for each try, then two places.
    """
    logs = [math.log(ratio) for ratio in RATIO]
    for area, ratio in zip(numbers[0 : 2 * TRIES : 2], numbers[1 : 2 * TRIES : 2], strict=True):
        pixels = height * width * (AREA[0] + (AREA[1] - AREA[0]) * area)
        shape = math.exp(logs[0] + (logs[1] - logs[0]) * ratio)
        box_height = round(math.sqrt(pixels * shape))
        box_width = round(math.sqrt(pixels / shape))
        if box_height < height and box_width < width:
            top = int(numbers[2 * TRIES] * (height - box_height + 1))
            left = int(numbers[2 * TRIES + 1] * (width - box_width + 1))
            return top, left, top + box_height, left + box_width
    return 0, 0, 0, 0


def cut_out(
    images: NDArray[np.uint8],
    index: NDArray[np.int64],
    seed: int,
    epoch: int,
    side: float,
    colour: NDArray[np.uint8],
) -> None:
    """Cover a square of every image (B, C, H, W) in place (DeVries and Taylor 2017).

    index: (B,), of the images in the training split. side: in pixels. colour: (C,). The centre is
    any pixel, and what lies outside the image is left out. It depends on (seed, epoch, index).
    """
    height, width = images.shape[2:]
    numbers = seeds.uniform_numbers(seed, index, 2, "cutout", epoch)
    for image, (y, x) in zip(images, numbers.tolist(), strict=True):
        top = int(y * height) - int(side) // 2
        left = int(x * width) - int(side) // 2
        bottom, right = top + int(side), left + int(side)
        _cover(image, (max(top, 0), max(left, 0), max(bottom, 0), max(right, 0)), colour)


def _cover(image: NDArray[np.uint8], box: Box, colour: NDArray[np.uint8]) -> None:
    top, left, bottom, right = box
    image[:, top:bottom, left:right] = colour[:, None, None]

"""The view of a scene that training sees: scaled, cropped and mirrored, with its mask.

The rules are those of InfoPro's code on Cityscapes (Wang et al. 2021), which has them from
MMSegmentation. The caller passes the random numbers, which depend on (seed, epoch, index).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from localpipe import seeds

if TYPE_CHECKING:
    from PIL.Image import Image

IGNORED = 255  # of the pixels of a mask that are no class
SCALES = (0.5, 2.0)
TRIES = 10  # crops that are drawn until one has no class with too many pixels
MOST_SHARE = 0.75  # of the pixels of a crop that are a class, in one class
DRAWS = 2 * TRIES + 2


@dataclass(frozen=True)
class ViewRecipe:
    """How training sees a scene.

    size: (H, W) of a crop. is_random: whether it is scaled, cropped and mirrored at random, else it
    is the centre. background: red, green and blue beyond the edges of a small image.
    """

    size: tuple[int, int]
    is_random: bool
    background: tuple[int, int, int]


def draw_views(seed: int, index: NDArray[np.int64], epoch: int) -> NDArray[np.float64]:
    """Return (B, DRAWS) float64 random numbers in [0, 1) for the training images at `index` (B,).

    A row depends on (seed, its index, epoch) alone.
    """
    return seeds.uniform_numbers(seed, index, DRAWS, "scene", epoch)


def view_scene(
    image: Image, mask: Image, recipe: ViewRecipe, numbers: Sequence[float]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return what training sees of an image and of its mask: (H, W, 3) and (H, W), uint8.

    image: of red, green and blue. mask: of one byte a pixel, as large. numbers: one row of
    `draw_views`. Where the scaled image is smaller than a crop, it lies at the top left, and the
    rest is the background and ignored. Pillow's bilinear filter averages where it shrinks.
    """
    height, width = recipe.size
    if recipe.is_random:
        image, mask = _scale(image, mask, numbers[0])
        classes = np.asarray(mask)
        top, left = _choose_corner(classes, recipe.size, numbers[1:-1])
    else:
        classes = np.asarray(mask)
        top = max(0, classes.shape[0] - height) // 2
        left = max(0, classes.shape[1] - width) // 2
    box = (slice(top, top + height), slice(left, left + width))
    pixels = _pad(np.asarray(image)[box], recipe.size, recipe.background)
    classes = _pad(classes[box], recipe.size, IGNORED)
    if recipe.is_random and numbers[-1] < 0.5:
        pixels, classes = pixels[:, ::-1], classes[:, ::-1]
    return pixels, classes


def _scale(image: Image, mask: Image, number: float) -> tuple[Image, Image]:
    from PIL.Image import Resampling

    scale = SCALES[0] + (SCALES[1] - SCALES[0]) * number
    width, height = image.size
    size = (int(width * scale + 0.5), int(height * scale + 0.5))
    return image.resize(size, Resampling.BILINEAR), mask.resize(size, Resampling.NEAREST)


def _choose_corner(
    classes: NDArray[np.uint8], size: tuple[int, int], numbers: Sequence[float]
) -> tuple[int, int]:
    """Return (top, left) of the first crop in which no class has too many pixels, or the last."""
    places = [max(0, whole - part) + 1 for whole, part in zip(classes.shape, size, strict=True)]
    top = left = 0
    for place in range(TRIES):
        top = int(numbers[2 * place] * places[0])
        left = int(numbers[2 * place + 1] * places[1])
        if _is_mixed(classes[top : top + size[0], left : left + size[1]]):
            break
    return top, left


def _is_mixed(classes: NDArray[np.uint8]) -> bool:
    """Return whether a crop has several classes, none of them with too many of their pixels."""
    counts = np.bincount(classes.ravel(), minlength=IGNORED + 1)[:IGNORED]
    return bool((counts > 0).sum() > 1 and counts.max() / counts.sum() < MOST_SHARE)


def _pad(pixels: NDArray[np.uint8], size: tuple[int, int], value: Any) -> NDArray[np.uint8]:
    """Return pixels (h, w, ...) as (*size, ...), with a value at the right and at the bottom."""
    if pixels.shape[:2] == size:
        return pixels
    padded = np.empty((*size, *pixels.shape[2:]), np.uint8)
    padded[...] = value
    padded[: pixels.shape[0], : pixels.shape[1]] = pixels
    return padded

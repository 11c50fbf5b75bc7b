"""Random brightness, contrast and saturation, as torchvision's v2.ColorJitter has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from localpipe import seeds
from localpipe.data.transforms.pictures import change_picture

if TYPE_CHECKING:
    from PIL.Image import Image

ADJUSTMENTS = ("brightness", "contrast", "saturation")


def change_colours(
    images: NDArray[np.uint8], index: NDArray[np.int64], seed: int, epoch: int, strength: float
) -> None:
    """Change images (B, C, H, W) in place, C 1 or 3.

    index: (B,), of the images in the training split. Three factors are uniform in 1 - strength to 1
    + strength, and are applied in a random order. They depend on (seed, epoch, index) alone. The
    hue stays.
    """
    count = len(ADJUSTMENTS)
    numbers = seeds.uniform_numbers(seed, index, 2 * count, "colour", epoch)
    factors = 1 + strength * (2 * numbers[:, :count] - 1)
    orders = np.argsort(numbers[:, count:], axis=1, kind="stable")
    for image, row, order in zip(images, factors.tolist(), orders.tolist(), strict=True):

        def change(picture: Image, row: list[float] = row, order: list[int] = order) -> Image:
            return adjust(picture, [(ADJUSTMENTS[number], row[number]) for number in order])

        change_picture(image, change)


def adjust(picture: Image, factors: list[tuple[str, float]]) -> Image:
    """Return a picture after adjustments in their order. factors: (one of ADJUSTMENTS, factor)."""
    from torchvision.transforms.v2 import functional

    for name, factor in factors:
        picture = getattr(functional, f"adjust_{name}")(picture, factor)
    return picture

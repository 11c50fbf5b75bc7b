"""Arrays of images as Pillow's pictures and back: its kernels give the same bytes everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image


def change_picture(image: NDArray[np.uint8], change: Callable[[Image], Image]) -> None:
    """Replace an image (C, H, W), C 1 or 3, by what `change` makes of its picture, in place.

    change: takes an RGB picture, or a gray one, and returns one of the same mode and size.
    """
    from PIL import Image

    channels, height, width = image.shape
    pixels = image.transpose(1, 2, 0)
    if channels == 1:
        pixels = image[0]
    picture = change(Image.fromarray(np.ascontiguousarray(pixels)))
    image[...] = np.asarray(picture).reshape(height, width, channels).transpose(2, 0, 1)

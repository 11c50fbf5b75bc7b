"""RandAugment (Cubuk et al. 2020): two random operations of one strength on every image.

The operations and their ranges are those of torchvision's v2.RandAugment, whose kernels do the
work. Its random numbers are those of the caller, so an image depends on them alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from localpipe import seeds
from localpipe.data.transforms.pictures import change_picture

if TYPE_CHECKING:
    from PIL.Image import Image

OPERATIONS = 2  # on every image
LARGEST = 30  # magnitude
_SHIFT = 150 / 331  # of an image's side, at the largest magnitude


def randaugment(
    images: NDArray[np.uint8], index: NDArray[np.int64], seed: int, epoch: int, magnitude: float
) -> None:
    """Change images (B, C, H, W) in place, C 1 or 3.

    index: (B,), of the images in the training split. magnitude: 0 to 30. What is done to an image
    depends on (seed, epoch, its index) alone.
    """
    numbers = seeds.uniform_numbers(seed, index, 2 * OPERATIONS, "randaugment", epoch)
    for image, row in zip(images, numbers.tolist(), strict=True):

        def change(picture: Image, row: list[float] = row) -> Image:
            for choice, sign in zip(row[0::2], row[1::2], strict=True):
                name = NAMES[int(choice * len(NAMES))]
                picture = apply(picture, name, magnitude / LARGEST, sign < 0.5)
            return picture

        change_picture(image, change)


def apply(picture: Image, name: str, strength: float, is_negative: bool) -> Image:
    """Return a picture after one operation. name: one of NAMES. strength: 0 to 1.

    is_negative: turn, shift, shear, dim and so on into the other direction, where there is one.
    """
    if is_negative and name in _SIGNED:
        strength = -strength
    return _OPERATIONS[name](picture, strength)


def _identity(picture: Image, _: float) -> Image:
    return picture


def _shear(picture: Image, x: float, y: float) -> Image:
    from torchvision.transforms.v2 import functional

    angles = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    sheared: Image = functional.affine(
        picture, angle=0.0, translate=[0, 0], scale=1.0, shear=angles, center=[0, 0]
    )
    return sheared


def _shear_x(picture: Image, strength: float) -> Image:
    return _shear(picture, 0.3 * strength, 0.0)


def _shear_y(picture: Image, strength: float) -> Image:
    return _shear(picture, 0.0, 0.3 * strength)


def _shift(picture: Image, x: float, y: float) -> Image:
    from torchvision.transforms.v2 import functional

    shifted: Image = functional.affine(
        picture, angle=0.0, translate=[int(x), int(y)], scale=1.0, shear=[0.0, 0.0]
    )
    return shifted


def _translate_x(picture: Image, strength: float) -> Image:
    return _shift(picture, _SHIFT * picture.width * strength, 0)


def _translate_y(picture: Image, strength: float) -> Image:
    return _shift(picture, 0, _SHIFT * picture.height * strength)


def _rotate(picture: Image, strength: float) -> Image:
    from torchvision.transforms.v2 import functional

    rotated: Image = functional.rotate(picture, angle=30 * strength)
    return rotated


def _enhance(name: str) -> Callable[[Image, float], Image]:
    """Return the operation of one of torchvision's `adjust_NAME`, by a factor of 0.1 to 1.9."""

    def enhance(picture: Image, strength: float) -> Image:
        from torchvision.transforms.v2 import functional

        enhanced: Image = getattr(functional, f"adjust_{name}")(picture, 1 + 0.9 * strength)
        return enhanced

    return enhance


def _posterize(picture: Image, strength: float) -> Image:
    from torchvision.transforms.v2 import functional

    posterized: Image = functional.posterize(picture, bits=round(8 - 4 * strength))
    return posterized


def _solarize(picture: Image, strength: float) -> Image:
    from torchvision.transforms.v2 import functional

    solarized: Image = functional.solarize(picture, threshold=255 * (1 - strength))
    return solarized


def _autocontrast(picture: Image, _: float) -> Image:
    from torchvision.transforms.v2 import functional

    changed: Image = functional.autocontrast(picture)
    return changed


def _equalize(picture: Image, _: float) -> Image:
    from torchvision.transforms.v2 import functional

    changed: Image = functional.equalize(picture)
    return changed


_OPERATIONS: Mapping[str, Callable[[Image, float], Image]] = {
    "Identity": _identity,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
    "Rotate": _rotate,
    "Brightness": _enhance("brightness"),
    "Color": _enhance("saturation"),
    "Contrast": _enhance("contrast"),
    "Sharpness": _enhance("sharpness"),
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
}
NAMES = tuple(_OPERATIONS)
_SIGNED = frozenset(NAMES[1:10])

"""All changes of single images that data.augment lists, in their order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from localpipe.data.transforms.boxes import cut_out, erase
from localpipe.data.transforms.colour import change_colours
from localpipe.data.transforms.randaugment import randaugment


def change_images(
    images: NDArray[np.uint8],
    index: NDArray[np.int64],
    seed: int,
    epoch: int,
    changes: Sequence[tuple[str, float]],
    mean: Sequence[float],
) -> None:
    """Change images (B, C, H, W) in place, C 1 or 3, as words and their numbers say.

    index: (B,), of the images in the training split. changes: of an `Augmentation`. mean: per
    channel, of images in 0..1. It is the colour that covers boxes, which is 0 after normalisation.
    The result of an image depends on (seed, epoch, its index) alone.
    """
    colour = np.round(np.array(mean) * 255).clip(0, 255).astype(np.uint8)
    for word, number in changes:
        if word == "randaugment":
            randaugment(images, index, seed, epoch, number)
        elif word == "colour":
            change_colours(images, index, seed, epoch, number)
        elif word == "erasing":
            erase(images, index, seed, epoch, number, colour)
        elif word == "cutout":
            cut_out(images, index, seed, epoch, number, colour)
        else:
            raise AssertionError(f"{word} is checked with the configuration")

"""Images read by index, and what a reader returns of a data set: both splits as they are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from localpipe.config.keys import Data
from localpipe.data.crop import crop_at_random
from localpipe.errors import UserError


class Images(Protocol):
    """The images of a split, read by index."""

    def __len__(self) -> int:
        """Return N."""

    def read(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the images at `index` (B,) as (B, H, W, C), C-contiguous; RunError names a file that is broken."""

    def crops(self, index: NDArray[np.int64], draws: NDArray[np.float64]) -> NDArray[np.uint8]:
        """Return a random crop of each, resized to (H, W), like `read`; `draws` (B, DRAWS) are those of `crop.draws`."""


@dataclass(frozen=True)
class Split:
    """Images and their classes, labels: (N,)."""

    images: Images
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Recipe:
    """What `auto` means for a data set: augmentation, and mean and std where there are published ones."""

    augment: str  # none | crop_flip | crop | resized_crop_flip
    padding: int  # pixels on every side before a crop
    padding_mode: str  # reflect | zero
    mean: tuple[float, ...] | None = None  # per channel, of images in 0..1
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Raw:
    """What a loader returns: both splits whole."""

    train: Split
    test: Split
    num_classes: int
    recipe: Recipe


@dataclass(frozen=True)
class ArrayImages:
    """Images in one array (N, H, W, C)."""

    array: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.array)

    def read(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self.array[index]

    def crops(self, index: NDArray[np.int64], draws: NDArray[np.float64]) -> NDArray[np.uint8]:
        from PIL import Image

        batch = self.array[index]
        for row, numbers in zip(batch, draws.tolist(), strict=True):
            picture = Image.fromarray(row if row.shape[2] == 3 else row[..., 0])
            row[...] = np.asarray(crop_at_random(picture, row.shape[:2], numbers)).reshape(
                row.shape
            )
        return batch


@dataclass(frozen=True)
class Rows:
    """Some images of others."""

    images: Images
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self.images.read(self.rows[index])

    def crops(self, index: NDArray[np.int64], draws: NDArray[np.float64]) -> NDArray[np.uint8]:
        return self.images.crops(self.rows[index], draws)


def split_from_arrays(images: NDArray[np.uint8], labels: Any) -> Split:
    """Make a split of (N, H, W, C) images and (N,) labels of any integer type."""
    return Split(ArrayImages(np.ascontiguousarray(images)), np.ascontiguousarray(labels, np.int64))


def take_rows(split: Split, rows: NDArray[np.int64]) -> Split:
    """Return some images of a split and their labels, in the order of `rows` (B,)."""
    return Split(Rows(split.images, rows), split.labels[rows])


def refuse_npz(config: Data) -> None:
    """Send a user whose root is an .npz file to the loader that reads it."""
    if config.root.lower().endswith(".npz"):
        raise UserError(
            f"data: {config.root} is an .npz file, {config.name} is read from a folder; set data.name=npz"
        )


def configured_size(config: Data) -> tuple[int, int] | None:
    """Return data.image_size as (H, W), None where it is auto."""
    if config.image_size == "auto":
        return None
    return (
        config.image_size
        if isinstance(config.image_size, tuple)
        else (config.image_size, config.image_size)
    )


def expand_path(root: str) -> Path:
    """Return data.root, its ~ replaced."""
    return Path(os.path.expanduser(root))


def one_line_reason(error: BaseException) -> str:
    """Return a foreign error in one line, without a full stop."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split()).rstrip(".")

"""Images that are read by index, and the type of what every loader of a data set returns."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from localpipe.config.keys import Data
from localpipe.data.crop import crop_at_random
from localpipe.data.samples import InputFacts, Samples
from localpipe.errors import UserError


class Images(Protocol):
    """The N images of a split, all (H, W, C) uint8, read by index."""

    def __len__(self) -> int:
        """Return N."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (H, W, C) of every image."""

    def read(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the images at `index` (B,) as (B, H, W, C), C-contiguous.

        The array is new memory that the caller may change. Raises IndexError for an index out of
        range, and RunError with the path of a broken file.
        """

    def read_crops(
        self, index: NDArray[np.int64], numbers: NDArray[np.float64]
    ) -> NDArray[np.uint8]:
        """Return a random crop of each image at `index` (B,), resized to (H, W), like `read`.

        numbers: (B, DRAWS), from `crop.draw_crops`. Raises what `read` raises.
        """


@dataclass(frozen=True)
class Split:
    """Images and their classes. labels: (N,), of the N images in their order."""

    images: Images
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[np.int64]) -> Split:
        """Return a split of the images and labels at `rows` (B,), in that order.

        The images are not copied, but read through `ImageSubset`. The labels are copied. Raises
        IndexError if a row is out of range.
        """
        return Split(ImageSubset(self.images, rows), self.labels[rows])


@dataclass(frozen=True)
class Recipe:
    """The values of `auto` for a data set; mean and std are None if none are published."""

    augment: str  # none | crop_flip | crop | resized_crop_flip
    padding: int  # pixels on every side before a crop
    padding_mode: str  # reflect | zero
    mean: tuple[float, ...] | None = None  # per channel, of images in 0..1
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class RawDataset:
    """What a loader returns: both splits complete, before validation images are held out.

    Labels are in 0 .. num_classes - 1. notes: lines for the user, in the order to print. classes:
    the name of every label, None where they have no names. has_own_names: the names are a user's,
    who may change them, and not published ones.
    """

    train: Split
    test: Split
    num_classes: int
    recipe: Recipe
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    has_own_names: bool = False


@dataclass(frozen=True)
class RawSamples:
    """What a loader of samples returns that are no images with a class: both splits complete.

    num_classes: outputs of a sample, a token or a place. notes, classes: as of a RawDataset. mean,
    std: of images of bytes, per channel, of values in 0..1, else (). augment: the word of
    data.augment that its own loader reads, which is the value of auto. check: reads the files of
    some splits, as data.verify says, and returns notes; it raises UserError for broken ones.
    """

    train: Samples
    test: Samples
    num_classes: int
    inputs: InputFacts
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    validation: Samples | None = None
    augment: str = "none"
    check: Callable[[Collection[str]], tuple[str, ...]] | None = None


@dataclass(frozen=True)
class RawTest:
    """What a loader of the test images alone returns.

    recipe, notes, classes: as of a RawDataset. Without labels every label is 0.
    """

    split: Split
    num_classes: int
    recipe: Recipe
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    has_labels: bool = True


@dataclass(frozen=True)
class ArrayImages:
    """Images in one array (N, H, W, C), which is not copied."""

    array: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.array)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (H, W, C) of a row of the array."""
        _, height, width, channels = self.array.shape
        return height, width, channels

    def read(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return copies of the rows of the array at `index`. No RunError can occur."""
        return self.array[index]

    def read_crops(
        self, index: NDArray[np.int64], numbers: NDArray[np.float64]
    ) -> NDArray[np.uint8]:
        """Return crops of copies of rows of the array, which stays as it is. C must be 1 or 3."""
        from PIL import Image

        batch = self.array[index]
        for image, row in zip(batch, numbers.tolist(), strict=True):
            # Pillow has no gray images with a channel axis.
            pixels = image
            if image.shape[2] == 1:
                pixels = image[..., 0]
            crop = crop_at_random(Image.fromarray(pixels), image.shape[:2], row)
            image[...] = np.asarray(crop).reshape(image.shape)
        return batch


@dataclass(frozen=True)
class ImageSubset:
    """The images of others at `rows` (N,), without a copy. The same row may occur twice."""

    images: Images
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (H, W, C) of the others."""
        return self.images.shape

    def read(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the images at `index`, which are positions in `rows`."""
        return self.images.read(self.rows[index])

    def read_crops(
        self, index: NDArray[np.int64], numbers: NDArray[np.float64]
    ) -> NDArray[np.uint8]:
        """Return crops of the images at `index`, which are positions in `rows`."""
        return self.images.read_crops(self.rows[index], numbers)


def split_from_arrays(images: NDArray[np.uint8], labels: Any) -> Split:
    """Make a split of images (N, H, W, C), uint8, and labels (N,) of any integer type or a list.

    Arrays that are contiguous, and labels that are int64, are not copied. Neither values nor
    lengths are checked.
    """
    return Split(ArrayImages(np.ascontiguousarray(images)), np.ascontiguousarray(labels, np.int64))


def refuse_npz(config: Data) -> None:
    """Raise UserError if data.root ends in .npz, in any case. Only the npz loader reads it.

    Only the name is looked at, so the file need not exist.
    """
    if config.root.lower().endswith(".npz"):
        raise UserError(
            f"data: {config.root} is an .npz file, {config.name} is read from a folder; "
            "set data.name=npz"
        )


def refuse_test_share(config: Data) -> None:
    """Raise UserError if data.test is set, for a data set that has a test split of its own."""
    if config.test is not None:
        raise UserError(
            f"data: data.test is {config.test:g}, but {config.name} has a test split of its own; "
            "set data.test=null"
        )


def configured_size(config: Data) -> tuple[int, int] | None:
    """Return data.image_size as (H, W), or None for auto. One number stands for both sides."""
    size = config.image_size
    if size is None or size == "auto":
        return None
    if isinstance(size, tuple):
        return size
    return size, size


def expand_path(root: str) -> Path:
    """Return data.root with a leading ~ replaced by the home directory. It need not exist."""
    return Path(os.path.expanduser(root))


def one_line_reason(error: BaseException) -> str:
    """Return the text of another library's error in one line, without a full stop at its end.

    It is the system's text for an OSError, and the name of the class for an error without text.
    """
    if isinstance(error, MemoryError):
        return "memory does not suffice"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split()).rstrip(".")

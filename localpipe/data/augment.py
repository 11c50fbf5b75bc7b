"""Batches of images as uint8 in 0..255, augmented for training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from localpipe import seeds
from localpipe.config.augmentation import Augment, read_words
from localpipe.data.crop import draw_crops
from localpipe.data.images import ArrayImages, Images, ImageSubset, Split
from localpipe.data.transforms.changes import change_images

if TYPE_CHECKING:
    from localpipe.data.dataset import Dataset

_CHUNK = 4096  # images that are padded at once
_MOST_BYTES = 1 << 30  # of padded images that are kept


@dataclass(frozen=True)
class PaddedImages:
    """All images of a split with a border, channels first, from which crops are gathered.

    array: (N, C, H + 2 * padding, W + 2 * padding), uint8, C-contiguous. Padding, and the order of
    the channels, are then no work of a batch. A crop's row is W bytes in a row of the array.
    """

    array: NDArray[np.uint8]
    padding: int

    def crop(
        self, index: NDArray[np.int64], top: NDArray[np.uint64], left: NDArray[np.uint64]
    ) -> NDArray[np.uint8]:
        """Return the crops (B, C, H, W) of the images at `index` (B,), a new array.

        top, left: (B,), the offsets of every crop in its padded image.
        """
        _, channels, padded_height, padded_width = self.array.shape
        height, width = padded_height - 2 * self.padding, padded_width - 2 * self.padding
        # Every W bytes that begin anywhere in the array are one item, so that a row is one copy.
        rows = np.ndarray(
            (self.array.size - width + 1,), f"V{width}", buffer=self.array, strides=(1,)
        )
        plane = padded_height * padded_width
        first = (index * channels * plane).astype(np.int64)
        first += top.astype(np.int64) * padded_width + left.astype(np.int64)
        inside = np.arange(channels)[:, None] * plane + np.arange(height) * padded_width
        crops: NDArray[np.uint8] = rows[first[:, None, None] + inside].view(np.uint8)
        return crops.reshape(len(index), channels, height, width)


def pad_images(dataset: Dataset) -> PaddedImages | None:
    """Return the training images with their border, None where they are not to be kept so.

    They are kept where the augmentation crops from a border, all images are in one array, and the
    result takes at most 1 GiB. It is the work of a second for 50,000 small images.
    """
    train, padding = dataset.train, dataset.padding
    crop = read_words(dataset.augment).crop
    if crop not in ("crop", "crop_flip") or not isinstance(train, Split):
        return None
    height, width, channels = train.images.shape
    shape = (len(train), channels, height + 2 * padding, width + 2 * padding)
    if not _is_in_memory(train.images) or np.prod(shape) > _MOST_BYTES:
        return None
    array = np.empty(shape, np.uint8)
    for start in range(0, len(train), _CHUNK):
        index = np.arange(start, min(start + _CHUNK, len(train)))
        array[index] = _pad(read_batch(train, index), padding, dataset.padding_mode)
    return PaddedImages(array, padding)


def _is_in_memory(images: Images) -> bool:
    if isinstance(images, ImageSubset):
        return _is_in_memory(images.images)
    return isinstance(images, ArrayImages)


@dataclass(frozen=True)
class ImageRecipe:
    """How training images are augmented, one by one.

    augment: words of data.augment, whose mixtures are not read. padding, padding_mode: of the
    border that crops are cut from. mean: per channel, of images in 0..1.
    """

    augment: Augment
    padding: int
    padding_mode: str
    mean: tuple[float, ...]


def augment_batch(
    dataset: Dataset,
    index: NDArray[np.int64],
    seed: int,
    epoch: int,
    padded: PaddedImages | None = None,
) -> NDArray[np.uint8]:
    """Return the augmented training images at `index` (B,), as (B, C, H, W) uint8, C-contiguous.

    index: rows of `dataset.train`, in any order. B may be 0. How an image is cropped, flipped and
    changed depends on (seed, epoch, its index) alone. With `dataset.augment` none, the images are
    as they are. Mixtures of images are not made here. padded: `pad_images` of the data set, which
    gives the same bytes faster. The array is new memory. Raises IndexError for an index out of
    range, and RunError for a broken image file.
    """
    train = dataset.train
    assert isinstance(train, Split), "only images are augmented here"
    return augment_images(dataset.recipe, train.images, index, index, seed, epoch, padded)


def augment_images(
    recipe: ImageRecipe,
    images: Images,
    rows: NDArray[np.int64],
    index: NDArray[np.int64],
    seed: int,
    epoch: int,
    padded: PaddedImages | None = None,
) -> NDArray[np.uint8]:
    """Return augmented images as `augment_batch` does, of which not all need to be there.

    rows: (B,), where the images are in `images`. index: (B,), of the training images, from which
    the random numbers come. padded: of the images.
    """
    words = read_words(recipe.augment)
    if words.crop == "resized_crop_flip":
        numbers = draw_crops(seed, index, epoch)
        batch = _to_channels_first(images.read_crops(rows, numbers))
    elif words.crop is not None:
        bits = seeds.uniform_bits(seed, index, "crop", epoch)
        batch = _crop(recipe, images, rows, bits, padded)
    else:
        batch = read_channels_first(images, rows)
    if words.flips:
        flip = draw_flips(seed, index, epoch)
        batch[flip] = batch[flip, :, :, ::-1]
    change_images(batch, index, seed, epoch, words.changes, recipe.mean)
    return batch


def draw_flips(seed: int, index: NDArray[np.int64], epoch: int) -> NDArray[np.bool_]:
    """Return whether each image at `index` (B,) is mirrored, (B,), by (seed, epoch, its index)."""
    bits = seeds.uniform_bits(seed, index, "flip", epoch)
    return (bits & np.uint64(1)).astype(bool)


def read_batch(split: Split, index: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return the images at `index` (B,), not augmented, as (B, C, H, W) uint8, C-contiguous.

    The array is new memory. Raises IndexError for an index out of range, and RunError for a broken
    image file.
    """
    return read_channels_first(split.images, index)


def read_channels_first(images: Images, index: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return images as `read_batch` does."""
    return _to_channels_first(images.read(index))


def _to_channels_first(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _crop(
    recipe: ImageRecipe,
    images: Images,
    rows: NDArray[np.int64],
    bits: NDArray[np.uint64],
    padded: PaddedImages | None,
) -> NDArray[np.uint8]:
    """Pad every image at `rows` (B,), then crop it to its size at offsets from its `bits` (B,)."""
    offsets = np.uint64(2 * recipe.padding + 1)
    top = bits % offsets
    left = (bits >> np.uint64(32)) % offsets
    if padded is not None:
        return padded.crop(rows, top, left)
    batch = read_channels_first(images, rows)
    height, width = batch.shape[2:]
    windows = sliding_window_view(
        _pad(batch, recipe.padding, recipe.padding_mode), (height, width), axis=(2, 3)
    )
    return np.ascontiguousarray(windows[np.arange(len(batch)), :, top, left])


def _pad(images: NDArray[np.uint8], padding: int, mode: str) -> NDArray[np.uint8]:
    """Add `padding` pixels to every side of images (B, C, H, W)."""
    widths = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    if mode == "zero":
        return np.pad(images, widths)
    # A reflection needs more pixels than it adds.
    if padding < min(images.shape[2:]):
        return np.pad(images, widths, mode="reflect")
    return np.pad(images, widths, mode="edge")

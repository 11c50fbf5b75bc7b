"""Batches of images as uint8 in 0..255, augmented for training."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from localpipe import seeds
from localpipe.data.crop import draw_crops
from localpipe.data.dataset import Dataset
from localpipe.data.images import Split


def augment_batch(
    dataset: Dataset, index: NDArray[np.int64], seed: int, epoch: int
) -> NDArray[np.uint8]:
    """Return the augmented training images at `index` (B,), as (B, C, H, W) uint8, C-contiguous.

    index: rows of `dataset.train`, in any order. B may be 0. How an image is cropped and flipped
    depends on (seed, epoch, its index) alone. With `dataset.augment` none, the images are as they
    are. The array is new memory. Raises IndexError for an index out of range, and RunError for a
    broken image file.
    """
    train = dataset.train
    assert isinstance(train, Split), "only images are augmented here"
    if dataset.augment == "resized_crop_flip":
        numbers = draw_crops(seed, index, epoch)
        images = _to_channels_first(train.images.read_crops(index, numbers))
    else:
        images = read_batch(train, index)
    if dataset.augment in ("crop", "crop_flip"):
        bits = seeds.uniform_bits(seed, index, "crop", epoch)
        images = _pad_and_crop(images, dataset, bits)
    if dataset.augment in ("crop_flip", "resized_crop_flip"):
        bits = seeds.uniform_bits(seed, index, "flip", epoch)
        flip = (bits & np.uint64(1)).astype(bool)
        images[flip] = images[flip, :, :, ::-1]
    return images


def read_batch(split: Split, index: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return the images at `index` (B,), not augmented, as (B, C, H, W) uint8, C-contiguous.

    The array is new memory. Raises IndexError for an index out of range, and RunError for a broken
    image file.
    """
    return _to_channels_first(split.images.read(index))


def _to_channels_first(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _pad_and_crop(
    images: NDArray[np.uint8], dataset: Dataset, bits: NDArray[np.uint64]
) -> NDArray[np.uint8]:
    """Pad every image (B, C, H, W), then crop it to its size at offsets from its `bits` (B,)."""
    height, width = images.shape[2:]
    offsets = np.uint64(2 * dataset.padding + 1)
    top = bits % offsets
    left = (bits >> np.uint64(32)) % offsets
    padded = _pad(images, dataset.padding, dataset.padding_mode)
    windows = sliding_window_view(padded, (height, width), axis=(2, 3))
    return np.ascontiguousarray(windows[np.arange(len(images)), :, top, left])


def _pad(images: NDArray[np.uint8], padding: int, mode: str) -> NDArray[np.uint8]:
    """Add `padding` pixels to every side of images (B, C, H, W)."""
    widths = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    if mode == "zero":
        return np.pad(images, widths)
    # A reflection needs more pixels than it adds.
    if padding < min(images.shape[2:]):
        return np.pad(images, widths, mode="reflect")
    return np.pad(images, widths, mode="edge")

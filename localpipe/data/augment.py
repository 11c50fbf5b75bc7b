"""Batches of images, the training ones augmented: still uint8, still in 0..255."""

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
    """Return training images (B, C, H, W); each is cropped and flipped by (seed, epoch, its own index), index: (B,)."""
    if dataset.augment == "resized_crop_flip":
        images = _channels_first(dataset.train.images.crops(index, draw_crops(seed, index, epoch)))
    else:
        images = read_batch(dataset.train, index)
    if dataset.augment in ("crop", "crop_flip"):
        images = _cropped(images, dataset, seeds.uniform_bits(seed, index, "crop", epoch))
    if dataset.augment in ("crop_flip", "resized_crop_flip"):
        flip = (seeds.uniform_bits(seed, index, "flip", epoch) & np.uint64(1)).astype(bool)
        images[flip] = images[flip, :, :, ::-1]
    return images


def read_batch(split: Split, index: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return the images at `index` (B,) as they are, (B, C, H, W)."""
    return _channels_first(split.images.read(index))


def _channels_first(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _cropped(
    images: NDArray[np.uint8], dataset: Dataset, bits: NDArray[np.uint64]
) -> NDArray[np.uint8]:
    """Cut every image (B, C, H, W), padded on all sides, back to its size at a place that its `bits` (B,) choose."""
    height, width = images.shape[2:]
    places = np.uint64(2 * dataset.padding + 1)
    top, left = bits % places, (bits >> np.uint64(32)) % places
    windows = sliding_window_view(
        _padded(images, dataset.padding, dataset.padding_mode), (height, width), axis=(2, 3)
    )
    return np.ascontiguousarray(windows[np.arange(len(images)), :, top, left])


def _padded(images: NDArray[np.uint8], padding: int, mode: str) -> NDArray[np.uint8]:
    widths = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    if mode == "zero":
        return np.pad(images, widths)
    # A reflection needs more pixels than it adds.
    return np.pad(images, widths, mode="reflect" if padding < min(images.shape[2:]) else "edge")

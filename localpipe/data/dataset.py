"""A data set as the configuration asks for it: read, split, normalised, in an order."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localpipe import seeds
from localpipe.config import registry
from localpipe.config.keys import Data
from localpipe.config.resolve import DataFacts
from localpipe.data.images import (
    ArrayImages,
    Images,
    Raw,
    Recipe,
    Split,
    configured_size,
    take_rows,
)
from localpipe.errors import RunError, UserError

_TOLD = 16  # images that tell a data set from others


@dataclass(frozen=True)
class Dataset:
    """A data set as the configuration asks for it, nothing left `auto`."""

    name: str
    train: Split
    test: Split
    validation: Split | None  # held out of train
    num_classes: int
    image: tuple[int, int, int]  # (C, H, W)
    mean: tuple[float, ...]  # per channel, of images in 0..1
    std: tuple[float, ...]
    augment: str  # none | crop_flip | crop | resized_crop_flip
    padding: int
    padding_mode: str  # reflect | zero
    sha256: str = (
        ""  # of all labels and, where they lie in memory, a few images, before anything is held out
    )

    @property
    def facts(self) -> DataFacts:
        """What a configuration's `auto` keys take from the data set."""
        return DataFacts(self.image, self.num_classes, self.mean, self.std, self.augment)


def load(config: Data, seed: int) -> Dataset:
    """Read a data set and split it; `seed` chooses validation images and subset. Every problem is a UserError."""
    loader = registry.look_up(registry.DATASETS, config.name, "config: data.name")
    try:
        return _resolve(config, loader(config), seed)
    except RunError as error:  # a broken image, found before the run has begun
        raise UserError(str(error)) from None
    except MemoryError:
        raise UserError(
            f"data: {config.name} does not fit into memory; take fewer or smaller images"
        ) from None


def epoch_order(dataset_size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of an epoch's training images, a permutation of range(dataset_size)."""
    return seeds.permutation(seed, dataset_size, "order", epoch)


def check_labels(dataset: Dataset, num_classes: int) -> None:
    """Raise UserError where a label has no output among `num_classes`."""
    prefix = "y_" if dataset.name == "npz" else ""
    for name, split in (
        ("train", dataset.train),
        ("train", dataset.validation),
        ("test", dataset.test),
    ):
        largest = int(split.labels.max()) if split is not None else 0
        if largest >= num_classes:
            raise UserError(
                f"data: {dataset.name}: the largest label in {prefix}{name} is {largest}, but model.num_classes is "
                f"{num_classes}; set model.num_classes to at least {largest + 1}, or to auto"
            )


def _resolve(config: Data, raw: Raw, seed: int) -> Dataset:
    height, width, channels = raw.train.images.read(np.zeros(1, np.int64)).shape[1:]
    if configured_size(config) not in (None, (height, width)):
        there = f"the images of {config.name} are {height} x {width}"
        raise UserError(
            f"data: data.image_size is {config.image_size}, but {there}; set it to auto"
        )
    train, validation = _hold_out(raw.train, config, seed)
    train = _subset(train, config, seed)
    mean, std = _normalisation(config, raw.recipe, train.images, channels)
    return Dataset(
        name=config.name,
        train=train,
        test=raw.test,
        validation=validation,
        num_classes=raw.num_classes,
        image=(channels, height, width),
        mean=mean,
        std=std,
        augment=raw.recipe.augment if config.augment == "auto" else config.augment,
        padding=raw.recipe.padding,
        padding_mode=raw.recipe.padding_mode,
        sha256=_sha256(raw),
    )


def _sha256(raw: Raw) -> str:
    """Return what tells one data set from another, on any machine: files are not decoded, decoders differ."""
    digest = hashlib.sha256()
    for split in (raw.train, raw.test):
        digest.update(split.labels.astype("<i8").tobytes())
        if isinstance(split.images, ArrayImages):
            digest.update(split.images.read(np.arange(min(_TOLD, len(split.images)))).tobytes())
    return digest.hexdigest()


def _hold_out(train: Split, config: Data, seed: int) -> tuple[Split, Split | None]:
    """Return what is left of the training images, in their own order, and the held-out ones."""
    size, held = len(train.labels), config.validation
    if held == 0:
        return train, None
    if held >= size:
        there = f"{config.name} has {size} training images"
        raise UserError(
            f"data: data.validation is {held}, but {there}; set it to at most {size - 1}"
        )
    rows = seeds.permutation(seed, size, "validation")
    return take_rows(train, np.sort(rows[held:])), take_rows(train, rows[:held])


def _subset(train: Split, config: Data, seed: int) -> Split:
    """Return the first train_subset images of a permutation, so that a smaller subset is part of a larger one."""
    size, wanted = len(train.labels), config.train_subset
    if wanted is None:
        return train
    if wanted > size:
        left = " left after data.validation" if config.validation else ""
        there = f"{config.name} has {size} training images{left}"
        raise UserError(
            f"data: data.train_subset is {wanted}, but {there}; set it to at most {size}"
        )
    return take_rows(train, seeds.permutation(seed, size, "subset")[:wanted])


def _normalisation(
    config: Data, recipe: Recipe, images: Images, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std: what the configuration gives, else the published constants, else those of `images`."""
    mean = recipe.mean if config.mean == "auto" else _given("mean", config.mean, config, channels)
    std = recipe.std if config.std == "auto" else _given("std", config.std, config, channels)
    if mean is None or std is None:
        own_mean, own_std = _moments(images, channels)
        mean, std = mean or own_mean, std or own_std
    return mean, std


def _given(key: str, values: tuple[float, ...], config: Data, channels: int) -> tuple[float, ...]:
    if len(values) != channels:
        raise UserError(
            f"data: data.{key} has {len(values)} numbers, but {config.name} has {channels} channels; "
            "give one number a channel, or auto"
        )
    if not all(math.isfinite(value) and (key == "mean" or value > 0) for value in values):
        expected = "numbers" if key == "mean" else "numbers above 0"
        raise UserError(f"data: data.{key} must be finite {expected}; got {list(values)}")
    return values


def _moments(images: Images, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel of images in 0..1, reading every image once, a few at a time."""
    counts = np.zeros((channels, 256), np.int64)
    for start in range(0, len(images), 256):
        batch = images.read(np.arange(start, min(start + 256, len(images))))
        for channel in range(channels):
            counts[channel] += np.bincount(batch[..., channel].ravel(), minlength=256)
    levels = np.arange(256) / 255
    share = counts / counts.sum(1, keepdims=True)
    mean = (share * levels).sum(1)
    std = np.sqrt((share * (levels - mean[:, None]) ** 2).sum(1))
    std[std == 0] = 1.0  # a constant channel says nothing; it must not divide by 0
    return tuple(mean.tolist()), tuple(std.tolist())

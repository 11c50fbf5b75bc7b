"""Data sets as uint8 images read by index, and the augmentation of training images.

    loader(config)   -> Raw           both splits as they are: images (N, H, W, C) read by index, labels (N,)
    load             -> Dataset       validation held out, train_subset taken, mean, std and augmentation resolved
    order            -> (N,)          the training images in the order of an epoch
    augmented        -> (B, C, H, W)  a batch of them, cropped and flipped; still uint8, still in 0..255

Order and augmentation are functions of (seed, epoch, index), so a resume or another batch size finds the same images.
A loader takes the `data` section and returns a Raw; the registry names it, and it imports what it needs itself.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from localpipe import registry, seeds
from localpipe.config import Data
from localpipe.errors import RunError, UserError


class Images(Protocol):
    """The images of a split, read by index."""

    def __len__(self) -> int:
        """Return N."""

    def read(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the images at `index` (B,) as (B, H, W, C), C-contiguous; RunError names a file that is broken."""


@dataclass(frozen=True)
class Split:
    """Images and their classes, labels: (N,)."""

    images: Images
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Recipe:
    """What `auto` means for a data set: augmentation, and mean and std where there are published ones."""

    augment: str  # none | crop_flip | crop
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
    augment: str  # none | crop_flip | crop
    padding: int
    padding_mode: str  # reflect | zero


def load(config: Data, seed: int) -> Dataset:
    """Read a data set and split it; `seed` chooses validation images and subset. Every problem is a UserError."""
    loader = registry.look_up(registry.DATASETS, config.name, "config: data.name")
    try:
        return _resolve(config, loader(config), seed)
    except RunError as error:  # a broken image, found before the run has begun
        raise UserError(str(error)) from None
    except MemoryError:
        raise UserError(f"data: {config.name} does not fit into memory; take fewer or smaller images") from None


def augmented(dataset: Dataset, index: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.uint8]:
    """Return training images (B, C, H, W); each is cropped and flipped by (seed, epoch, its own index), index: (B,)."""
    images = plain(dataset.train, index)
    if dataset.augment == "none":
        return images
    images = _cropped(images, dataset, seeds.uniform_bits(seed, index, "crop", epoch))
    if dataset.augment == "crop_flip":
        flip = (seeds.uniform_bits(seed, index, "flip", epoch) & np.uint64(1)).astype(bool)
        images[flip] = images[flip, :, :, ::-1]
    return images


def plain(split: Split, index: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return the images at `index` (B,) as they are, (B, C, H, W)."""
    return np.ascontiguousarray(split.images.read(index).transpose(0, 3, 1, 2))


def order(dataset_size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of an epoch's training images, a permutation of range(dataset_size)."""
    return seeds.permutation(seed, dataset_size, "order", epoch)


def check_labels(dataset: Dataset, num_classes: int) -> None:
    """Raise UserError where a label has no output among `num_classes`."""
    prefix = "y_" if dataset.name == "npz" else ""
    for name, split in (("train", dataset.train), ("train", dataset.validation), ("test", dataset.test)):
        largest = int(split.labels.max()) if split is not None else 0
        if largest >= num_classes:
            raise UserError(
                f"data: {dataset.name}: the largest label in {prefix}{name} is {largest}, but model.num_classes is "
                f"{num_classes}; set model.num_classes to at least {largest + 1}, or to auto"
            )


# --- Loaders


@dataclass(frozen=True)
class _Memory:
    """Images in one array (N, H, W, C)."""

    array: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.array)

    def read(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self.array[index]


@dataclass(frozen=True)
class _Files:
    """Images in files, decoded when they are read, each fitted into `size` (H, W)."""

    paths: Sequence[str]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        batch = np.empty((len(index), *self.size, 3), np.uint8)
        for row, i in enumerate(index):
            batch[row] = _decode(self.paths[i], self.size)
        return batch


@dataclass(frozen=True)
class _Rows:
    """Some images of others."""

    images: Images
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self.images.read(self.rows[index])


def load_digits(config: Data) -> Raw:
    """Load scikit-learn's 1,797 handwritten digits as 32x32 RGB; 360 of them, always the same, are the test."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = _enlarged_digits(digits.images.astype(np.int64))
    shuffled = seeds.permutation(0, len(images), "digits")
    test, train = np.sort(shuffled[:360]), np.sort(shuffled[360:])
    whole = _in_memory(images, digits.target)
    # Digits are not flipped: a mirrored 2 is no 2.
    return Raw(_take(whole, train), _take(whole, test), 10, Recipe("crop", 2, "zero"))


def load_npz(config: Data) -> Raw:
    """Load x_train, y_train, x_test, y_test from one .npz file; x: uint8 (N, H, W, C) or (N, H, W); y: (N,)."""
    arrays = _read_npz(config.root)
    x_train, x_test = (_npz_images(arrays, name, config.root) for name in ("x_train", "x_test"))
    y_train = _npz_labels(arrays, "y_train", len(x_train), config.root)
    y_test = _npz_labels(arrays, "y_test", len(x_test), config.root)
    if x_train.shape[1:] != x_test.shape[1:]:
        raise UserError(
            f"data: {config.root}: an image of x_train is {x_train.shape[1:]}, of x_test {x_test.shape[1:]}; "
            "expected the same height, width and channels"
        )
    num_classes = 1 + int(max(y_train.max(), y_test.max()))
    recipe = Recipe("crop_flip", 4, "reflect")
    return Raw(_in_memory(x_train, y_train), _in_memory(x_test, y_test), num_classes, recipe)


def load_torchvision(config: Data) -> Raw:
    """Load cifar10, cifar100, svhn (without `extra`) or stl10 (the labelled images) from torchvision's files."""
    _refuse_npz(config)
    train, test = (_torchvision_split(config, part) for part in ("train", "test"))
    known = _TORCHVISION[config.name]
    return Raw(train, test, known.num_classes, known.recipe)


def load_image_folder(config: Data) -> Raw:
    """Load root/train and root/test, one folder of images a class, each image fitted into data.image_size.

    `image_size: auto` is a square with the shorter side of the first training image, at most 224.
    """
    _refuse_npz(config)
    train_paths, train_labels, classes = _scan(config.root, "train")
    test_paths, test_labels, test_classes = _scan(config.root, "test")
    if classes != test_classes:
        odd = min(set(classes) ^ set(test_classes))
        has, lacks = ("train", "test") if odd in classes else ("test", "train")
        raise UserError(f"data: {config.root}: {has} has a class {odd!r}, {lacks} has not; expected the same in both")
    size = _size(config) or (min(_shorter_side(train_paths[0]), 224),) * 2
    train, test = Split(_Files(train_paths, size), train_labels), Split(_Files(test_paths, size), test_labels)
    return Raw(train, test, len(classes), Recipe("crop_flip", 4, "reflect"))


def load_synthetic(config: Data) -> Raw:
    """Make random images of ten classes that can be told apart, the same images for every seed."""
    size = _size(config) or (32, 32)
    train = _noise("train", config.samples, size)
    test = _noise("test", max(config.samples // 4, 2), size)
    return Raw(train, test, 10, Recipe("none", 4, "reflect"))


def _in_memory(images: NDArray[np.uint8], labels: Any) -> Split:
    """Make a split of (N, H, W, C) images and (N,) labels of any integer type."""
    return Split(_Memory(np.ascontiguousarray(images)), np.ascontiguousarray(labels, np.int64))


def _refuse_npz(config: Data) -> None:
    """Send a user whose root is an .npz file to the loader that reads it."""
    if config.root.lower().endswith(".npz"):
        raise UserError(f"data: {config.root} is an .npz file, {config.name} is read from a folder; set data.name=npz")


def _size(config: Data) -> tuple[int, int] | None:
    """Return data.image_size as (H, W), None where it is auto."""
    if config.image_size == "auto":
        return None
    return config.image_size if isinstance(config.image_size, tuple) else (config.image_size, config.image_size)


def _path(root: str) -> Path:
    return Path(os.path.expanduser(root))


def _reason(error: BaseException) -> str:
    """Return a foreign error in one line, without a full stop."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split()).rstrip(".")


# --- Digits and synthetic


def _enlarged_digits(images: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Enlarge (N, 8, 8) of 0..16 to (N, 32, 32, 3) of 0..255; bilinear, in integers, so that every machine agrees."""
    # Pixel i of 32 lies at (i + 1/2) / 4 - 1/2 of 8, which is (2 i - 3) / 8; beyond the edge it is the edge.
    place = np.clip(2 * np.arange(32) - 3, 0, 56)
    low, eighths = place // 8, place % 8
    weights = np.zeros((32, 8), np.int64)
    np.add.at(weights, (np.arange(32), low), 8 - eighths)
    np.add.at(weights, (np.arange(32), np.minimum(low + 1, 7)), eighths)
    sums = weights @ images @ weights.T  # 0 .. 16 * 64
    gray = ((sums * 255 + 512) // 1024).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=3)


def _noise(part: str, samples: int, size: tuple[int, int]) -> Split:
    """Make `samples` images (H, W, 3), half noise and half the pattern of their class, 4x4 fields of colour."""
    labels = np.arange(samples, dtype=np.int64) % 10
    noise = _bytes((samples, *size, 3), part)
    down, across = (np.arange(side) * 4 // side for side in size)
    pattern = _bytes((10, 4, 4, 3), "pattern")[:, down][:, :, across]
    return _in_memory(noise // 2 + pattern[labels] // 2, labels)


def _bytes(shape: tuple[int, ...], name: str) -> NDArray[np.uint8]:
    """Return random bytes that depend on the name alone."""
    size = math.prod(shape)
    words = seeds.uniform_bits(0, np.arange(-(-size // 8), dtype=np.int64), "synthetic", name)
    return words.astype("<u8").view(np.uint8)[:size].reshape(shape)


# --- One .npz file

_NPZ_NAMES = ("x_train", "y_train", "x_test", "y_test")


def _read_npz(root: str) -> dict[str, NDArray[Any]]:
    """Return the four arrays of a file, unpickling nothing."""
    path, names = _path(root), ", ".join(_NPZ_NAMES)
    if not os.path.exists(path):
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.npz")], n=1)
        advice = f"did you mean {path.parent / near[0]}?" if near else "set data.root to an .npz file"
        raise UserError(f"data: {root} does not exist; {advice}")
    if os.path.isdir(path):
        raise UserError(f"data: {root} is a folder; expected one .npz file with {names}; set data.root to it")
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise UserError(f"data: {root} holds a single array; expected {names}; use numpy.savez")
            return {name: _npz_array(archive, name, root) for name in _NPZ_NAMES}
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and numpy each have their own for a damaged file
        raise UserError(f"data: {root} is no .npz file that can be read ({_reason(error)}); use numpy.savez") from None


def _npz_array(archive: Any, name: str, root: str) -> NDArray[Any]:
    if name not in archive.files:
        there = ", ".join(archive.files[:8]) or "nothing"
        raise UserError(f"data: {root} has no array {name}; expected {', '.join(_NPZ_NAMES)}; got {there}")
    try:
        array = archive[name]
    except Exception as error:
        raise UserError(f"data: {root}: cannot read {name} ({_reason(error)}); write the file again") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"data: {root}: {name} is not an array; use numpy.savez")
    return array


def _npz_images(arrays: dict[str, NDArray[Any]], name: str, root: str) -> NDArray[np.uint8]:
    """Check images and return them as (N, H, W, C)."""
    x = arrays[name]
    expected = "expected uint8 (N, H, W, 3), (N, H, W, 1) or (N, H, W)"
    gray = x.ndim == 3
    if x.dtype != np.uint8 or not (gray or (x.ndim == 4 and x.shape[3] in (1, 3))):
        raise UserError(f"data: {root}: {name} is {x.dtype} {x.shape}; {expected}")
    if x.size == 0:
        raise UserError(f"data: {root}: {name} is empty, {x.dtype} {x.shape}; {expected} with at least one image")
    return x[..., None] if gray else x


def _npz_labels(arrays: dict[str, NDArray[Any]], name: str, images: int, root: str) -> NDArray[np.int64]:
    """Check labels and return them as (N,)."""
    y = arrays[name]
    if y.dtype.kind not in "iu" or not (y.ndim == 1 or (y.ndim == 2 and y.shape[1] == 1)):
        raise UserError(f"data: {root}: {name} is {y.dtype} {y.shape}; expected integers (N,), a class index an image")
    if len(y) != images:
        raise UserError(f"data: {root}: {name} has {len(y)} labels for the {images} images of {name.replace('y', 'x')}")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high > np.iinfo(np.int32).max:
        wrong = low if low < 0 else high
        raise UserError(f"data: {root}: {name} has the label {wrong}; expected 0 .. num_classes - 1")
    return y.reshape(-1).astype(np.int64)


# --- torchvision's files


@dataclass(frozen=True)
class _Published:
    class_name: str  # in torchvision.datasets
    holds: str  # what its root holds
    num_classes: int
    recipe: Recipe


def _per_255(*values: float) -> tuple[float, ...]:
    return tuple(value / 255 for value in values)


_HALF = _per_255(127.5, 127.5, 127.5)
# Augmentation and constants of the InfoPro and ContSup recipes; CIFAR-100's constants are the usual ones.
_TORCHVISION = {
    "cifar10": _Published(
        "CIFAR10",
        "cifar-10-batches-py",
        10,
        Recipe("crop_flip", 4, "reflect", _per_255(125.3, 123.0, 113.9), _per_255(63.0, 62.1, 66.7)),
    ),
    "cifar100": _Published(
        "CIFAR100",
        "cifar-100-python",
        100,
        Recipe("crop_flip", 4, "reflect", _per_255(129.3, 124.1, 112.4), _per_255(68.2, 65.4, 70.4)),
    ),
    "svhn": _Published("SVHN", "train_32x32.mat", 10, Recipe("crop", 2, "zero", _HALF, _HALF)),
    "stl10": _Published("STL10", "stl10_binary", 10, Recipe("crop_flip", 4, "zero", _HALF, _HALF)),
}


def _torchvision_split(config: Data, part: str) -> Split:
    """Read `train` or `test` through torchvision, which checks the files' published checksums first."""
    from torchvision import datasets

    cifar = config.name.startswith("cifar")
    options = {"train": part == "train"} if cifar else {"split": part}
    cls = getattr(datasets, _TORCHVISION[config.name].class_name)
    try:
        found = cls(_path(config.root), download=config.download, **options)
    except Exception as error:  # missing, damaged, or not to be had: each of the four raises something else
        raise UserError(_not_found(config, error)) from None
    if cifar:
        return _in_memory(found.data, found.targets)
    return _in_memory(found.data.transpose(0, 2, 3, 1), found.labels)


def _not_found(config: Data, error: Exception) -> str:
    holds = _TORCHVISION[config.name].holds
    if config.download:
        return (
            f"data: cannot download {config.name} to {config.root} ({_reason(error)}); "
            f"set data.root to a folder that holds {holds}"
        )
    if os.path.exists(_path(config.root) / holds):
        return (
            f"data: {config.name} in {config.root} is incomplete or damaged ({_reason(error)}); "
            f"remove {holds} and set data.download=true"
        )
    return (
        f"data: {config.name} is not in {config.root}; set data.download=true, "
        f"or data.root to the folder that holds {holds}"
    )


# --- A folder of images


def _scan(root: str, part: str) -> tuple[list[str], NDArray[np.int64], list[str]]:
    """Return the paths, labels (N,) and class names of root/part."""
    from torchvision.datasets import ImageFolder

    folder = _path(root) / part
    if not os.path.isdir(folder):
        raise UserError(
            f"data: {folder} is not a folder; expected {root}/train and {root}/test with a folder of images per class"
        )
    try:
        found = ImageFolder(folder, allow_empty=True)
    except FileNotFoundError:
        raise UserError(f"data: {folder} has no class folders; expected a folder of images per class") from None
    except OSError as error:
        raise UserError(f"data: cannot read {folder} ({_reason(error)})") from None
    labels = np.array(found.targets, np.int64)
    empty = set(range(len(found.classes))) - set(labels.tolist())
    if empty:
        raise UserError(f"data: {folder / found.classes[min(empty)]} has no images; fill or remove it")
    return [path for path, _ in found.samples], labels, found.classes


def _decode(path: str, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return an image as (H, W, 3): RGB, resized until it just covers `size` (H, W), and its centre."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.fit(image.convert("RGB"), (size[1], size[0]), Image.Resampling.BILINEAR))
    except Exception as error:  # every decoder has its own way to fail
        raise _broken(path, error) from None


def _shorter_side(path: str) -> int:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return min(image.size)
    except Exception as error:
        raise _broken(path, error) from None


def _broken(path: str, error: Exception) -> RunError:
    return RunError(f"data: {path} cannot be read as an image ({_reason(error)}); mend or remove it")


# --- From Raw to Dataset


def _resolve(config: Data, raw: Raw, seed: int) -> Dataset:
    height, width, channels = raw.train.images.read(np.zeros(1, np.int64)).shape[1:]
    if _size(config) not in (None, (height, width)):
        there = f"the images of {config.name} are {height} x {width}"
        raise UserError(f"data: data.image_size is {config.image_size}, but {there}; set it to auto")
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
    )


def _take(split: Split, rows: NDArray[np.int64]) -> Split:
    return Split(_Rows(split.images, rows), split.labels[rows])


def _hold_out(train: Split, config: Data, seed: int) -> tuple[Split, Split | None]:
    """Return what is left of the training images, in their own order, and the held-out ones."""
    size, held = len(train.labels), config.validation
    if held == 0:
        return train, None
    if held >= size:
        there = f"{config.name} has {size} training images"
        raise UserError(f"data: data.validation is {held}, but {there}; set it to at most {size - 1}")
    rows = seeds.permutation(seed, size, "validation")
    return _take(train, np.sort(rows[held:])), _take(train, rows[:held])


def _subset(train: Split, config: Data, seed: int) -> Split:
    """Return the first train_subset images of a permutation, so that a smaller subset is part of a larger one."""
    size, wanted = len(train.labels), config.train_subset
    if wanted is None:
        return train
    if wanted > size:
        left = " left after data.validation" if config.validation else ""
        there = f"{config.name} has {size} training images{left}"
        raise UserError(f"data: data.train_subset is {wanted}, but {there}; set it to at most {size}")
    return _take(train, seeds.permutation(seed, size, "subset")[:wanted])


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


# --- Augmentation


def _cropped(images: NDArray[np.uint8], dataset: Dataset, bits: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Cut every image (B, C, H, W), padded on all sides, back to its size at a place that its `bits` (B,) choose."""
    height, width = images.shape[2:]
    places = np.uint64(2 * dataset.padding + 1)
    top, left = bits % places, (bits >> np.uint64(32)) % places
    windows = sliding_window_view(_padded(images, dataset.padding, dataset.padding_mode), (height, width), axis=(2, 3))
    return np.ascontiguousarray(windows[np.arange(len(images)), :, top, left])


def _padded(images: NDArray[np.uint8], padding: int, mode: str) -> NDArray[np.uint8]:
    widths = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    if mode == "zero":
        return np.pad(images, widths)
    # A reflection needs more pixels than it adds.
    return np.pad(images, widths, mode="reflect" if padding < min(images.shape[2:]) else "edge")

"""The small data sets that torchvision reads and downloads: CIFAR-10 and -100, SVHN, STL-10."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from localpipe.config.keys import Data
from localpipe.data.images import (
    ArrayImages,
    RawDataset,
    RawTest,
    Recipe,
    Split,
    expand_path,
    one_line_reason,
    refuse_npz,
    refuse_test_share,
    split_from_arrays,
)
from localpipe.errors import UserError


@dataclass(frozen=True)
class _PublishedSet:
    class_name: str  # in torchvision.datasets
    file: str  # the file or folder that its root contains
    num_classes: int
    recipe: Recipe


def _from_bytes(*values: float) -> tuple[float, ...]:
    """Return values of 0..255 as values of 0..1."""
    return tuple(value / 255 for value in values)


# Augmentation and constants of the InfoPro and ContSup recipes; CIFAR-100's constants are the
# usual ones.
_CIFAR10_MEAN = _from_bytes(125.3, 123.0, 113.9)
_CIFAR10_STD = _from_bytes(63.0, 62.1, 66.7)
_CIFAR100_MEAN = _from_bytes(129.3, 124.1, 112.4)
_CIFAR100_STD = _from_bytes(68.2, 65.4, 70.4)
_HALF = _from_bytes(127.5, 127.5, 127.5)

_CIFAR10 = Recipe("crop_flip", 4, "reflect", _CIFAR10_MEAN, _CIFAR10_STD)
_CIFAR100 = Recipe("crop_flip", 4, "reflect", _CIFAR100_MEAN, _CIFAR100_STD)
_SVHN = Recipe("crop", 2, "zero", _HALF, _HALF)
_STL10 = Recipe("crop_flip", 4, "zero", _HALF, _HALF)

_SETS = {
    "cifar10": _PublishedSet("CIFAR10", "cifar-10-batches-py", 10, _CIFAR10),
    "cifar100": _PublishedSet("CIFAR100", "cifar-100-python", 100, _CIFAR100),
    "svhn": _PublishedSet("SVHN", "train_32x32.mat", 10, _SVHN),
    "stl10": _PublishedSet("STL10", "stl10_binary", 10, _STL10),
}


def load_torchvision(config: Data) -> RawDataset:
    """Load cifar10, cifar100, svhn or stl10 (data.name) from torchvision's files in data.root.

    svhn has its `extra` images with data.extra alone, after the others. stl10 has the labelled
    images only. Missing files are downloaded if data.download is set. Raises UserError if files are
    missing or damaged, a download fails, data.root is an .npz file, or data.test is set. Raises
    KeyError for another name.
    """
    refuse_npz(config)
    refuse_test_share(config)
    published = _SETS[config.name]
    train, classes = _read_split(config, "train")
    if config.extra:
        extra, _ = _read_split(config, "extra")
        train = _join(train, extra)
    test, _ = _read_split(config, "test")
    return RawDataset(train, test, published.num_classes, published.recipe, classes=classes)


def load_torchvision_test(config: Data) -> RawTest:
    """Load the test images of a data set as `load_torchvision`, and none of the training images."""
    refuse_npz(config)
    published = _SETS[config.name]
    test, classes = _read_split(config, "test")
    return RawTest(test, published.num_classes, published.recipe, classes=classes)


def _read_split(config: Data, part: str) -> tuple[Split, tuple[str, ...] | None]:
    """Read `train`, `test` or `extra` with torchvision, which checks the files' checksums.

    The second value has the names of the classes, or is None where torchvision has none (SVHN).
    """
    from torchvision import datasets

    cls = getattr(datasets, _SETS[config.name].class_name)
    is_cifar = config.name.startswith("cifar")
    options: dict[str, object] = {"split": part}
    if is_cifar:
        options = {"train": part == "train"}
    # Missing or damaged files and failed downloads: each class raises errors of its own.
    try:
        images = cls(expand_path(config.root), download=config.download, **options)
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(_describe_failure(config, error, part)) from None
    classes = None
    if hasattr(images, "classes"):
        classes = tuple(images.classes)
    if is_cifar:
        return split_from_arrays(images.data, images.targets), classes
    return split_from_arrays(images.data.transpose(0, 2, 3, 1), images.labels), classes


def _join(first: Split, second: Split) -> Split:
    """Return the images of both splits in one array, those of `first` before the others."""
    arrays = []
    for split in (first, second):
        assert isinstance(split.images, ArrayImages), "torchvision's sets are arrays"
        arrays.append(split.images.array)
    labels = np.concatenate([first.labels, second.labels])
    return split_from_arrays(np.concatenate(arrays), labels)


def _describe_failure(config: Data, error: Exception, part: str) -> str:
    file = _SETS[config.name].file
    if part == "extra":
        file = "extra_32x32.mat"
    reason = one_line_reason(error)
    if config.download:
        return (
            f"data: cannot download {config.name} to {config.root} ({reason}); "
            f"set data.root to a folder that holds {file}"
        )
    if os.path.exists(expand_path(config.root) / file):
        return (
            f"data: {config.name} in {config.root} is incomplete or damaged ({reason}); "
            f"remove {file} and set data.download=true"
        )
    return (
        f"data: {config.name} is not in {config.root}; set data.download=true, "
        f"or data.root to the folder that holds {file}"
    )

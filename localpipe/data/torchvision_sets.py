"""The small data sets that torchvision reads and fetches: CIFAR-10 and -100, SVHN, STL-10."""

from __future__ import annotations

import os
from dataclasses import dataclass

from localpipe.config.keys import Data
from localpipe.data.images import (
    Raw,
    Recipe,
    Split,
    expand_path,
    one_line_reason,
    refuse_npz,
    split_from_arrays,
)
from localpipe.errors import UserError


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
        Recipe(
            "crop_flip", 4, "reflect", _per_255(125.3, 123.0, 113.9), _per_255(63.0, 62.1, 66.7)
        ),
    ),
    "cifar100": _Published(
        "CIFAR100",
        "cifar-100-python",
        100,
        Recipe(
            "crop_flip", 4, "reflect", _per_255(129.3, 124.1, 112.4), _per_255(68.2, 65.4, 70.4)
        ),
    ),
    "svhn": _Published("SVHN", "train_32x32.mat", 10, Recipe("crop", 2, "zero", _HALF, _HALF)),
    "stl10": _Published("STL10", "stl10_binary", 10, Recipe("crop_flip", 4, "zero", _HALF, _HALF)),
}


def load_torchvision(config: Data) -> Raw:
    """Load cifar10, cifar100, svhn (without `extra`) or stl10 (the labelled images) from torchvision's files."""
    refuse_npz(config)
    train, test = (_torchvision_split(config, part) for part in ("train", "test"))
    known = _TORCHVISION[config.name]
    return Raw(train, test, known.num_classes, known.recipe)


def _torchvision_split(config: Data, part: str) -> Split:
    """Read `train` or `test` through torchvision, which checks the files' published checksums first."""
    from torchvision import datasets

    cifar = config.name.startswith("cifar")
    options = {"train": part == "train"} if cifar else {"split": part}
    cls = getattr(datasets, _TORCHVISION[config.name].class_name)
    try:
        found = cls(expand_path(config.root), download=config.download, **options)
    except (
        Exception
    ) as error:  # missing, damaged, or not to be had: each of the four raises something else
        raise UserError(_not_found(config, error)) from None
    if cifar:
        return split_from_arrays(found.data, found.targets)
    return split_from_arrays(found.data.transpose(0, 2, 3, 1), found.labels)


def _not_found(config: Data, error: Exception) -> str:
    holds = _TORCHVISION[config.name].holds
    if config.download:
        return (
            f"data: cannot download {config.name} to {config.root} ({one_line_reason(error)}); "
            f"set data.root to a folder that holds {holds}"
        )
    if os.path.exists(expand_path(config.root) / holds):
        return (
            f"data: {config.name} in {config.root} is incomplete or damaged ({one_line_reason(error)}); "
            f"remove {holds} and set data.download=true"
        )
    return (
        f"data: {config.name} is not in {config.root}; set data.download=true, "
        f"or data.root to the folder that holds {holds}"
    )

"""Folders of image files, one a class."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from localpipe.config.keys import Data
from localpipe.data.crop import crop_at_random, crop_centre
from localpipe.data.images import (
    Raw,
    Recipe,
    Split,
    configured_size,
    expand_path,
    one_line_reason,
    refuse_npz,
)
from localpipe.errors import RunError, UserError

if TYPE_CHECKING:
    from PIL.Image import Image
Fit = Callable[["Image", tuple[int, int]], "Image"]  # from a picture and (H, W)
DECODERS = min(len(os.sched_getaffinity(0)), 16)  # threads; the decoders let go of Python's lock
# torchvision's own constants for ImageNet. A padded crop, where it is asked for, has as large a share as CIFAR's.
IMAGENET = Recipe("resized_crop_flip", 28, "reflect", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def load_image_folder(config: Data) -> Raw:
    """Load root/train and root/test, one folder of images a class, each image fitted into data.image_size.

    `image_size: auto` is a square with the shorter side of the first training image, at most 224.
    """
    train, test = _scan_both(config, "test")
    size = configured_size(config) or (min(_shorter_side(train.paths[0]), 224),) * 2
    recipe = Recipe("crop_flip", 4, "reflect")
    return Raw(
        _split(train, size, fit_image), _split(test, size, fit_image), len(train.classes), recipe
    )


def load_imagenet(config: Data) -> Raw:
    """Load root/train and root/val, one folder of images a class, as ILSVRC 2012 is usually unpacked.

    Training images are random crops resized to data.image_size (224), validation images centre crops, out of the files'
    whole images.
    """
    if config.download:
        raise UserError(
            "data: imagenet cannot be downloaded; set data.download=false, and data.root to its folder"
        )
    train, test = _scan_both(config, "val")
    size = configured_size(config) or (224, 224)
    centre = crop_centre
    return Raw(
        _split(train, size, centre), _split(test, size, centre), len(train.classes), IMAGENET
    )


@dataclass(frozen=True)
class Files:
    """Images in files, decoded when they are read, by a few threads; each becomes `size` (H, W) by `fit`."""

    paths: Sequence[str]
    size: tuple[int, int]
    fit: Fit

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        return self._decoded(index, [self.fit] * len(index))

    def crops(self, index: NDArray[np.int64], draws: NDArray[np.float64]) -> NDArray[np.uint8]:
        return self._decoded(
            index, [partial(crop_at_random, numbers=numbers) for numbers in draws.tolist()]
        )

    def _decoded(self, index: NDArray[np.int64], fits: Sequence[Fit]) -> NDArray[np.uint8]:
        batch = np.empty((len(index), *self.size, 3), np.uint8)

        def decode(row: int) -> None:
            batch[row] = _decode(self.paths[index[row]], self.size, fits[row])

        # A pool of the call's own: nothing is left over for a fork to trip on. The first broken image is the one told.
        with ThreadPoolExecutor(DECODERS, "decoder") as pool:
            deque(pool.map(decode, range(len(index))), maxlen=0)
        return batch


def fit_image(picture: Image, size: tuple[int, int]) -> Image:
    """Return an image resized until it just covers `size` (H, W), and its centre."""
    from PIL import Image, ImageOps

    return ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.BILINEAR)


@dataclass(frozen=True)
class _Scanned:
    """What a folder of class folders holds."""

    paths: list[str]
    labels: NDArray[np.int64]
    classes: list[str]


def _split(found: _Scanned, size: tuple[int, int], fit: Fit) -> Split:
    return Split(Files(found.paths, size, fit), found.labels)


def _scan_both(config: Data, test: str) -> tuple[_Scanned, _Scanned]:
    """Return what root/train and root/`test` hold, the same classes in both."""
    refuse_npz(config)
    held = {part: _scan(config.root, part, test) for part in ("train", test)}
    odd = set(held["train"].classes) ^ set(held[test].classes)
    if odd:
        has, lacks = ("train", test) if min(odd) in held["train"].classes else (test, "train")
        raise UserError(
            f"data: {config.root}: {has} has a class {min(odd)!r}, {lacks} has not; expected the same in both"
        )
    return held["train"], held[test]


def _scan(root: str, part: str, test: str) -> _Scanned:
    """Return what root/part holds; `test` is what the other part is called."""
    from torchvision.datasets import ImageFolder

    folder = expand_path(root) / part
    if not os.path.isdir(folder):
        raise UserError(
            f"data: {folder} is not a folder; expected {root}/train and {root}/{test} with a folder of images per class"
        )
    try:
        found = ImageFolder(folder, allow_empty=True)
    except FileNotFoundError:
        raise UserError(
            f"data: {folder} has no class folders; expected a folder of images per class"
        ) from None
    except OSError as error:
        raise UserError(f"data: cannot read {folder} ({one_line_reason(error)})") from None
    labels = np.array(found.targets, np.int64)
    empty = set(range(len(found.classes))) - set(labels.tolist())
    if empty:
        raise UserError(
            f"data: {folder / found.classes[min(empty)]} has no images; fill or remove it"
        )
    return _Scanned([path for path, _ in found.samples], labels, found.classes)


def _decode(path: str, size: tuple[int, int], fit: Fit) -> NDArray[np.uint8]:
    """Return an image in RGB, fitted, as (H, W, 3)."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return np.asarray(fit(picture.convert("RGB"), size))
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
    return RunError(
        f"data: {path} cannot be read as an image ({one_line_reason(error)}); mend or remove it"
    )

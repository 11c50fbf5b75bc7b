"""Folders of image files, one folder a class."""

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
    RawDataset,
    Recipe,
    Split,
    configured_size,
    expand_path,
    one_line_reason,
    refuse_npz,
)
from localpipe.environment import available_cores
from localpipe.errors import RunError, UserError

if TYPE_CHECKING:
    from PIL.Image import Image
Fit = Callable[["Image", tuple[int, int]], "Image"]  # resizes and crops a picture to (H, W)
DECODERS = min(available_cores(), 16)  # threads; the decoders release the interpreter lock
# The mean and std of ImageNet that torchvision uses.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
# The padding, for a padded crop that a user configures, is as large a share as CIFAR's.
IMAGENET = Recipe("resized_crop_flip", 28, "reflect", _MEAN, _STD)


def load_image_folder(config: Data) -> RawDataset:
    """Load root/train and root/test, which have one folder of images for each class.

    Classes are numbered by the sorted names of their folders. Every image is resized and cropped to
    data.image_size. For `auto` that is a square with the shorter side of the first training image,
    at most 224. Files are decoded when they are read. Raises UserError if a folder is missing or
    empty, or the two have other classes. Raises RunError if the first training image is broken.
    """
    train, test = _scan_both(config, "test")
    size = configured_size(config)
    if size is None:
        side = min(_shorter_side(train.paths[0]), 224)
        size = (side, side)
    recipe = Recipe("crop_flip", 4, "reflect")
    return _raw_dataset(train, test, size, fit_image, recipe)


def load_imagenet(config: Data) -> RawDataset:
    """Load root/train and root/val, one folder of images a class, the usual form of ILSVRC 2012.

    Training images are random crops of the files' complete images, resized to data.image_size (224
    for `auto`). Validation images are centre crops, and are the test split. Files are decoded when
    they are read. Raises UserError if data.download is set, a folder is missing or empty, or the
    two have other classes.
    """
    if config.download:
        raise UserError(
            "data: imagenet cannot be downloaded; set data.download=false, "
            "and data.root to its folder"
        )
    train, test = _scan_both(config, "val")
    size = configured_size(config) or (224, 224)
    return _raw_dataset(train, test, size, crop_centre, IMAGENET)


@dataclass(frozen=True)
class FileImages:
    """RGB image files that threads decode when they are read. `fit` makes each `size` (H, W).

    `read` calls fit(picture, size) with a Pillow image, from several threads at once.
    """

    paths: Sequence[str]
    size: tuple[int, int]
    fit: Fit

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the images at `index`, each made by `fit`.

        Raises RunError for the first broken file in the order of `index`.
        """
        return self._decode_batch(index, [self.fit] * len(index))

    def read_crops(
        self, index: NDArray[np.int64], numbers: NDArray[np.float64]
    ) -> NDArray[np.uint8]:
        """Return random crops of the complete images of the files. `fit` is not called.

        Raises RunError for the first broken file in the order of `index`.
        """
        fits = [partial(crop_at_random, numbers=row) for row in numbers.tolist()]
        return self._decode_batch(index, fits)

    def _decode_batch(self, index: NDArray[np.int64], fits: Sequence[Fit]) -> NDArray[np.uint8]:
        """Return the images at `index` (B,), each resized and cropped by its own `fit`."""
        batch = np.empty((len(index), *self.size, 3), np.uint8)

        def decode_row(row: int) -> None:
            batch[row] = _decode(self.paths[index[row]], self.size, fits[row])

        # The pool lives for this call only, because a fork must not copy its threads.
        # `map` raises the error of the first broken image, whichever thread fails first.
        with ThreadPoolExecutor(DECODERS, "decoder") as pool:
            deque(pool.map(decode_row, range(len(index))), maxlen=0)
        return batch


def fit_image(picture: Image, size: tuple[int, int]) -> Image:
    """Resize an image until it just covers `size` (H, W), and return its centre of that size.

    The interpolation is bilinear, and the result a new image.
    """
    from PIL import Image, ImageOps

    return ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.BILINEAR)


@dataclass(frozen=True)
class _ClassFolders:
    """The image files in a folder of class folders, and the class of each, labels: (N,)."""

    paths: list[str]
    labels: NDArray[np.int64]
    classes: list[str]


def _raw_dataset(
    train: _ClassFolders, test: _ClassFolders, size: tuple[int, int], fit: Fit, recipe: Recipe
) -> RawDataset:
    train_split = Split(FileImages(train.paths, size, fit), train.labels)
    test_split = Split(FileImages(test.paths, size, fit), test.labels)
    return RawDataset(train_split, test_split, len(train.classes), recipe)


def _scan_both(config: Data, test_name: str) -> tuple[_ClassFolders, _ClassFolders]:
    """Return the class folders of root/train and root/`test_name`, which have equal classes."""
    refuse_npz(config)
    train = _scan(config.root, "train", test_name)
    test = _scan(config.root, test_name, test_name)
    # The first class, by name, that one of the two lacks.
    unpaired = sorted(set(train.classes) ^ set(test.classes))
    if unpaired:
        has, lacks = test_name, "train"
        if unpaired[0] in train.classes:
            has, lacks = "train", test_name
        raise UserError(
            f"data: {config.root}: {has} has a class {unpaired[0]!r}, {lacks} has not; "
            "expected the same in both"
        )
    return train, test


def _scan(root: str, part: str, test_name: str) -> _ClassFolders:
    """Return the class folders of root/part; `test_name` is the name of the test part."""
    from torchvision.datasets import ImageFolder

    folder = expand_path(root) / part
    if not os.path.isdir(folder):
        raise UserError(
            f"data: {folder} is not a folder; expected {root}/train and {root}/{test_name} "
            "with a folder of images per class"
        )
    try:
        scan = ImageFolder(folder, allow_empty=True)
    except FileNotFoundError:
        raise UserError(
            f"data: {folder} has no class folders; expected a folder of images per class"
        ) from None
    except OSError as error:
        raise UserError(f"data: cannot read {folder} ({one_line_reason(error)})") from None

    # A class without images would be a class that no test can measure.
    labels = np.array(scan.targets, np.int64)
    empty = set(range(len(scan.classes))) - set(labels.tolist())
    if empty:
        raise UserError(
            f"data: {folder / scan.classes[min(empty)]} has no images; fill or remove it"
        )
    paths = [path for path, _ in scan.samples]
    return _ClassFolders(paths, labels, scan.classes)


def _decode(path: str, size: tuple[int, int], fit: Fit) -> NDArray[np.uint8]:
    """Return the RGB image of a file, resized and cropped by `fit`, as (H, W, 3)."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return np.asarray(fit(picture.convert("RGB"), size))
    except Exception as error:  # every decoder has errors of its own
        raise _broken_image(path, error) from None


def _shorter_side(path: str) -> int:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return min(picture.size)
    except Exception as error:
        raise _broken_image(path, error) from None


def _broken_image(path: str, error: Exception) -> RunError:
    return RunError(
        f"data: {path} cannot be read as an image ({one_line_reason(error)}); mend or remove it"
    )

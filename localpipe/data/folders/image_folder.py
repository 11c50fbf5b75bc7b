"""Folders of image files, one folder a class."""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from localpipe.config.keys import Data
from localpipe.data.crop import crop_at_random, crop_centre
from localpipe.data.folders.class_folders import (
    ClassFolders,
    FoundFiles,
    find_part,
    holds_folders,
    number_classes,
    scan_classes,
    split_classes,
)
from localpipe.data.folders.decode import (
    DEFAULT_RENDERING,
    Rendering,
    broken_image,
    find_rendering,
    open_image,
    seen_size,
    to_rgb,
)
from localpipe.data.images import (
    RawDataset,
    Recipe,
    Split,
    configured_size,
    expand_path,
    refuse_npz,
)
from localpipe.environment import available_cores
from localpipe.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
Fit = Callable[["Image", tuple[int, int]], "Image"]  # resizes and crops a picture to (H, W)
DECODERS = min(available_cores(), 16)  # threads; the decoders release the interpreter lock
TEST_NAMES = ("test", "val", "valid", "validation")  # of folders, the first one found is read
_LARGEST_SIDE = 224  # of an automatic size, in pixels
_MEASURED_FILES = 10_000  # at most, evenly spaced, for an automatic size
# The mean and std of ImageNet that torchvision uses.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
IMAGE_FOLDER = Recipe("crop_flip", 4, "reflect")
# The padding, for a padded crop that a user configures, is as large a share as CIFAR's.
IMAGENET = Recipe("resized_crop_flip", 28, "reflect", _MEAN, _STD)


def load_image_folder(config: Data) -> FoundFiles[RawDataset]:
    """Find root/train and root/test, which have one folder of images for each class.

    The test part may also be called val, valid or validation. With data.test there is none, and the
    test split is a share of the images in root/train, or in root itself without a train part.
    Classes are numbered by the sorted names of their folders in train, or as data.classes says. The
    test split may lack some.

    Every image is resized and cropped to data.image_size. For `auto` that is the size of half the
    training images or more, else a square with the median of their shorter sides, at most 224.
    Files are decoded when they are read. Raises UserError if a folder is missing or empty, or of an
    unknown class. `build` raises RunError if every training image is broken and the size is `auto`.
    """
    refuse_npz(config)
    train, test = _scan_splits(config, TEST_NAMES)

    def build(train: ClassFolders, test: ClassFolders) -> RawDataset:
        notes = []
        size = configured_size(config)
        if size is None:
            size, note = decide_size(train.paths)
            notes.append(note)
        return _raw_dataset(config, train, test, size, fit_image, IMAGE_FOLDER, notes)

    return FoundFiles(expand_path(config.root), train, test, build)


def load_imagenet(config: Data) -> FoundFiles[RawDataset]:
    """Find root/train and root/val, one folder of images a class, the usual form of ILSVRC 2012.

    Training images are random crops of the files' complete images, resized to data.image_size (224
    for `auto`). Validation images are centre crops, and are the test split. data.test takes it from
    train instead, as in `load_image_folder`. Files are decoded when they are read. Raises UserError
    if data.download is set, a folder is missing or empty, or val has an unknown class.
    """
    if config.download:
        raise UserError(
            "data: imagenet cannot be downloaded; set data.download=false, "
            "and data.root to its folder"
        )
    refuse_npz(config)
    train, test = _scan_splits(config, ("val",))

    def build(train: ClassFolders, test: ClassFolders) -> RawDataset:
        size = configured_size(config) or (224, 224)
        return _raw_dataset(config, train, test, size, crop_centre, IMAGENET)

    return FoundFiles(expand_path(config.root), train, test, build)


@dataclass(frozen=True)
class FileImages:
    """RGB image files that `threads` decode when they are read. `fit` makes each `size` (H, W).

    `read` calls fit(picture, size) with a Pillow image, from several threads at once.
    """

    paths: Sequence[str]
    size: tuple[int, int]
    fit: Fit
    rendering: Rendering = DEFAULT_RENDERING
    threads: int = DECODERS

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (H, W, 3), which no file needs to be read for."""
        return *self.size, 3

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
            path = self.paths[index[row]]
            batch[row] = _decode(path, self.size, fits[row], self.rendering)

        if self.threads == 1:
            for row in range(len(index)):
                decode_row(row)
            return batch
        # The pool lives for this call only, because a fork must not copy its threads.
        # `map` raises the error of the first broken image, whichever thread fails first.
        with ThreadPoolExecutor(self.threads, "decoder") as pool:
            deque(pool.map(decode_row, range(len(index))), maxlen=0)
        return batch


def fit_image(picture: Image, size: tuple[int, int]) -> Image:
    """Resize an image until it just covers `size` (H, W), and return its centre of that size.

    The interpolation is bilinear, and the result a new image.
    """
    from PIL import Image, ImageOps

    return ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.BILINEAR)


# What makes a whole picture an image of the data set, by its name.
FITS: dict[str, Fit] = {fit.__name__: fit for fit in (fit_image, crop_centre)}


def _raw_dataset(
    config: Data,
    train: ClassFolders,
    test: ClassFolders,
    size: tuple[int, int],
    fit: Fit,
    recipe: Recipe,
    notes: Sequence[str] = (),
) -> RawDataset:
    rendering = find_rendering(config)
    train_split = Split(FileImages(train.paths, size, fit, rendering), train.labels)
    test_split = Split(FileImages(test.paths, size, fit, rendering), test.labels)
    notes = (*train.notes, *test.notes, *notes)
    classes = tuple(train.classes)
    return RawDataset(train_split, test_split, len(classes), recipe, notes, classes)


def _scan_splits(config: Data, test_names: Sequence[str]) -> tuple[ClassFolders, ClassFolders]:
    """Return the class folders of the training and the test split, with equal lists of classes.

    The classes are data.classes, else the folders of the training part. Either part may lack some.
    test_names: what a test part may be called.
    """
    if config.test is not None:
        return take_share(config, config.test, test_names)
    test_name = find_part(config.root, test_names)
    train = scan_classes(config.root, "train", test_name)
    test = scan_classes(config.root, test_name, test_name)
    names = _list_names(config, train)
    train = number_classes(train, names, f"{config.root}/train")
    test = number_classes(test, names, f"{config.root}/{test_name}")

    notes = test.notes
    for name in test_names:
        if name != test_name and (expand_path(config.root) / name).is_dir():
            notes += (f"note: {config.root}/{name} is not read; the tests use {test_name}",)
    return train, replace(test, notes=notes)


def take_share(
    config: Data, share: float, test_names: Sequence[str]
) -> tuple[ClassFolders, ClassFolders]:
    """Return the class folders of data.root without a test part, with a share of them for tests.

    They lie in root/train, or in root itself. Raises UserError if there is a test part too.
    """
    # A class may be called as a part is, but its folder holds images and no folders.
    for name in test_names:
        if holds_folders(config.root, name):
            raise UserError(
                f"data: data.test is {share:g}, but {config.root}/{name} has test images too; "
                "set data.test=null to test on them, or move them away"
            )
    part, folder = "", config.root
    if holds_folders(config.root, "train"):
        part, folder = "train", f"{config.root}/train"
    found = scan_classes(config.root, part, None)
    found = number_classes(found, _list_names(config, found), folder)
    return split_classes(found, share, folder)


def _list_names(config: Data, found: ClassFolders) -> tuple[str, ...]:
    """Return data.classes, or the names of the class folders where it is no list."""
    if isinstance(config.classes, tuple):
        return config.classes
    return tuple(found.classes)


def decide_size(paths: Sequence[str], part: str = "training") -> tuple[tuple[int, int], str]:
    """Return the (H, W) of `auto` for image files, and a note on it that names their part.

    It is the size that half of them or more have, if no side of it is above _LARGEST_SIDE. Else it
    is a square with the median of their shorter sides, or with _LARGEST_SIDE where that is less.
    Files that cannot be read do not count. Raises RunError if all are such.
    """
    sample = paths[:: math.ceil(len(paths) / _MEASURED_FILES)]
    with ThreadPoolExecutor(DECODERS, "header") as pool:
        sizes = [size for size in pool.map(_measure, sample) if size is not None]
    if not sizes:
        _decode(paths[0], (1, 1), fit_image)  # raises the reason
        raise AssertionError(f"{paths[0]} is read, and its header is not")

    # Of two sizes that are equally frequent the larger one counts.
    counts = Counter(sizes)
    size, count = max(counts.items(), key=lambda item: (item[1], item[0][0] * item[0][1], item[0]))
    reason = f"the size of {count} of {len(sizes)} {part} images"
    if 2 * count < len(sizes) or max(size) > _LARGEST_SIDE:
        side = min(statistics.median_low(min(each) for each in sizes), _LARGEST_SIDE)
        size = (side, side)
        reason = f"the median shorter side of {len(sizes)} {part} images, at most {_LARGEST_SIDE}"
    return size, f"note: data.image_size: auto is {size[0]} x {size[1]}, {reason}"


def _measure(path: str) -> tuple[int, int] | None:
    """Return the (H, W) of an image from its file's header, or None if it cannot be read."""
    try:
        with open_image(path) as picture:
            return seen_size(picture)
    except Exception:  # every decoder has errors of its own
        return None


def _decode(
    path: str, size: tuple[int, int], fit: Fit, rendering: Rendering = DEFAULT_RENDERING
) -> NDArray[np.uint8]:
    """Return the RGB image of a file, resized and cropped by `fit`, as (H, W, 3)."""
    try:
        with open_image(path) as picture:
            return np.asarray(fit(to_rgb(picture, rendering), size))
    except Exception as error:  # every decoder has errors of its own
        raise broken_image(path, error) from None

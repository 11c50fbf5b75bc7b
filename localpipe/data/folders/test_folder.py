"""Folders of test images alone: with a folder for each class, or without labels."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from localpipe.config.keys import Data
from localpipe.data.crop import crop_centre
from localpipe.data.folders.class_folders import (
    ClassFolders,
    FoundFiles,
    find_part,
    list_folder,
    number_classes,
    scan_classes,
)
from localpipe.data.folders.decode import find_rendering
from localpipe.data.folders.image_folder import (
    IMAGE_FOLDER,
    IMAGENET,
    TEST_NAMES,
    FileImages,
    Fit,
    decide_size,
    fit_image,
    take_share,
)
from localpipe.data.images import (
    RawTest,
    Recipe,
    Split,
    configured_size,
    expand_path,
    refuse_npz,
)
from localpipe.errors import UserError

_LAYOUTS = "a folder of images per class, or images without folders"


def load_folder_test(config: Data) -> FoundFiles[RawTest]:
    """Find the test images of an `image_folder`, without its training images.

    They are in root/test (or val, valid, validation), else in root itself. There they have a folder
    for each class, or lie side by side and have no labels. With data.test they are that share of
    the class folders. Class folders are matched by name with data.classes, which may name more.
    Without data.classes they are numbered by their sorted names. Raises UserError for a missing or
    empty folder, and for an unknown class.
    """
    return _find(config, TEST_NAMES, fit_image, IMAGE_FOLDER, configured_size(config))


def load_imagenet_test(config: Data) -> FoundFiles[RawTest]:
    """Find ImageNet's test images, as `load_folder_test`, in root/val where that is a folder."""
    size = configured_size(config) or (224, 224)
    return _find(config, ("val", *TEST_NAMES), crop_centre, IMAGENET, size)


def _find(
    config: Data, names: Sequence[str], fit: Fit, recipe: Recipe, size: tuple[int, int] | None
) -> FoundFiles[RawTest]:
    refuse_npz(config)
    found, has_labels = _scan(config, names)

    def build(_: ClassFolders, test: ClassFolders) -> RawTest:
        notes, final_size = test.notes, size
        if final_size is None:
            final_size, note = decide_size(test.paths, "test")
            notes += (note,)
        images = FileImages(test.paths, final_size, fit, find_rendering(config))
        classes = tuple(test.classes) if has_labels else None
        num_classes = max(len(test.classes), 1)
        return RawTest(Split(images, test.labels), num_classes, recipe, notes, classes, has_labels)

    no_files = ClassFolders([], np.empty(0, np.int64), found.classes, ())
    return FoundFiles(expand_path(config.root), no_files, found, build)


def _scan(config: Data, names: Sequence[str]) -> tuple[ClassFolders, bool]:
    """Return the test images, and whether they have labels. names: what a test part may be."""
    if config.test is not None:
        _, found = take_share(config, config.test, names)
        return found, True
    part = _find_images(config, names)
    folder = expand_path(config.root) / part
    listing, _ = list_folder(folder)
    if not listing.folders:
        return _scan_unlabelled(folder), False
    found = scan_classes(config.root, part, part)
    if isinstance(config.classes, tuple):
        found = number_classes(found, config.classes, str(folder))
    return found, True


def _find_images(config: Data, names: Sequence[str]) -> str:
    """Return the part of data.root that has the test images: one of `names`, or "" for the root.

    Raises UserError if there is none.
    """
    root = expand_path(config.root)
    if not root.is_dir():
        raise UserError(
            f"data: {config.root} is not a folder; expected {config.root}/{names[0]} or "
            f"{config.root} with {_LAYOUTS}; set data.root to it"
        )
    listing, _ = list_folder(root)
    trained: Collection[str] = ()
    if isinstance(config.classes, tuple):
        trained = config.classes
    # A class may be called `test`: then all folders beside it are classes too.
    if listing.folders and set(listing.folders) <= set(trained):
        return ""
    part = find_part(config.root, names)
    if (root / part).is_dir():
        return part
    knows_none = bool(trained) and not set(listing.folders) & set(trained)
    if "train" in listing.folders or (listing.folders and knows_none):
        raise UserError(
            f"data: {root / part} is not a folder, and {config.root} has no folder of a trained "
            f"class; expected {_LAYOUTS} in one of them; set data.root to what holds it"
        )
    return ""


def _scan_unlabelled(folder: Path) -> ClassFolders:
    """Return the images that lie directly in a folder, in the order of their names, as class 0."""
    listing, notes = list_folder(folder)
    if not listing.images:
        raise UserError(f"data: {folder} has no images; expected {_LAYOUTS}")
    paths = [str(folder / name) for name in sorted(listing.images)]
    return ClassFolders(paths, np.zeros(len(paths), np.int64), [], notes)

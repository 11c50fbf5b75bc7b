"""Folders of test images alone: with a folder for each class, or without labels."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from localpipe.config.keys import Data
from localpipe.data.class_folders import (
    ClassFolders,
    find_part,
    list_folder,
    number_classes,
    scan_classes,
)
from localpipe.data.crop import crop_centre
from localpipe.data.image_folder import (
    IMAGE_FOLDER,
    IMAGENET,
    TEST_NAMES,
    FileImages,
    Fit,
    decide_size,
    fit_image,
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


def load_folder_test(config: Data) -> RawTest:
    """Load the test images of an `image_folder`, without its training images.

    They are in root/test (or val, valid, validation), else in root itself. There they have a folder
    for each class, or lie side by side and have no labels. Class folders are matched by name with
    data.classes, which may name more. Without data.classes they are numbered by their sorted names.
    Raises UserError for a missing or empty folder, and for an unknown class.
    """
    return _load(config, TEST_NAMES, fit_image, IMAGE_FOLDER, configured_size(config))


def load_imagenet_test(config: Data) -> RawTest:
    """Load ImageNet's test images, as `load_folder_test`, from root/val where that is a folder."""
    size = configured_size(config) or (224, 224)
    return _load(config, ("val", *TEST_NAMES), crop_centre, IMAGENET, size)


def _load(
    config: Data, names: Sequence[str], fit: Fit, recipe: Recipe, size: tuple[int, int] | None
) -> RawTest:
    refuse_npz(config)
    part = _find_images(config, names)
    folder = expand_path(config.root) / part
    listing, _ = list_folder(folder)
    has_labels = bool(listing.folders)
    if has_labels:
        found = scan_classes(config.root, part, part)
        if isinstance(config.classes, tuple):
            found = number_classes(found, config.classes, str(folder))
    else:
        found = _scan_unlabelled(folder)

    notes = found.notes
    if size is None:
        size, note = decide_size(found.paths, "test")
        notes += (note,)
    split = Split(FileImages(found.paths, size, fit), found.labels)
    classes = tuple(found.classes) if has_labels else None
    return RawTest(split, max(len(found.classes), 1), recipe, notes, classes, has_labels)


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

"""One .npz file with the images and labels of both splits."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localpipe.config.keys import Data
from localpipe.data.images import (
    RawDataset,
    RawTest,
    Recipe,
    expand_path,
    one_line_reason,
    refuse_test_share,
    split_from_arrays,
)
from localpipe.errors import UserError

_NAMES = ("x_train", "y_train", "x_test", "y_test")
_CLASSES = "classes"  # an array that the file may have
_LISTED_LABELS = 5  # in a note
_RECIPE = Recipe("crop_flip", 4, "reflect")


def load_npz(config: Data) -> RawDataset:
    """Load x_train, y_train, x_test and y_test from the one .npz file data.root.

    x: uint8 (N, H, W, C) or (N, H, W), C 1 or 3. y: integers (N,) or (N, 1), from 0. An array
    `classes` of text (K,), where there is one, names the labels. The number of classes is K, else
    the largest label of both splits plus 1. Other arrays of the file are not read. Raises UserError
    if the file is missing or damaged, lacks an array, or an array is empty or of another shape or
    dtype. It also does if x and y differ in length, the splits in the shape of an image, labels and
    names do not fit, or data.test is set.
    """
    refuse_test_share(config)
    arrays = _read_arrays(config.root, _NAMES)
    x_train = _check_images(arrays, "train", config.root)
    x_test = _check_images(arrays, "test", config.root)
    y_train = _check_labels(arrays, "train", len(x_train), config.root)
    y_test = _check_labels(arrays, "test", len(x_test), config.root)
    if x_train.shape[1:] != x_test.shape[1:]:
        raise UserError(
            f"data: {config.root}: an image of x_train is {x_train.shape[1:]}, "
            f"of x_test {x_test.shape[1:]}; expected the same height, width and channels"
        )
    train = split_from_arrays(x_train, y_train)
    test = split_from_arrays(x_test, y_test)
    num_classes = 1 + int(max(y_train.max(), y_test.max()))
    notes = _describe_labels(y_train, y_test, config.root)
    names = None
    if _CLASSES in arrays:
        names = _check_names(arrays[_CLASSES], num_classes, config.root)
        num_classes = len(names)
    return RawDataset(train, test, num_classes, _RECIPE, notes, names, names is not None)


def load_npz_test(config: Data) -> RawTest:
    """Load x_test and y_test from the one .npz file data.root, in the form of `load_npz`.

    Without y_test the images have no labels. Raises UserError as `load_npz` does.
    """
    refuse_test_share(config)
    arrays = _read_arrays(config.root, ("x_test",), ("y_test",))
    images = _check_images(arrays, "test", config.root)
    if "y_test" not in arrays:
        unlabelled = split_from_arrays(images, np.zeros(len(images), np.int64))
        return RawTest(unlabelled, 1, _RECIPE, has_labels=False)
    labels = _check_labels(arrays, "test", len(images), config.root)
    num_classes = 1 + int(labels.max())
    names = None
    if _CLASSES in arrays:
        names = _check_names(arrays[_CLASSES], num_classes, config.root)
        num_classes = len(names)
    return RawTest(split_from_arrays(images, labels), num_classes, _RECIPE, classes=names)


def _read_arrays(
    root: str, names: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, NDArray[Any]]:
    """Return arrays of a file by their names, without unpickling anything.

    optional: names that the file may lack. The names of the classes are read where it has them.
    """
    listed = ", ".join(names)
    path = expand_path(root)
    if not os.path.exists(path):
        raise UserError(f"data: {root} does not exist; {_suggest_file(path)}")
    if os.path.isdir(path):
        raise UserError(
            f"data: {root} is a folder; expected one .npz file with {listed}; set data.root to it"
        )

    # Opening a pipe would wait for ever.
    if not os.path.isfile(path):
        raise UserError(f"data: {root} is a pipe or a device; set data.root to an .npz file")

    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise UserError(
                    f"data: {root} holds a single array; expected {listed}; use numpy.savez"
                )
            found = [*names, *(name for name in optional if name in archive.files)]
            arrays = {name: _read_array(archive, name, root, listed) for name in found}
            if _CLASSES in archive.files:
                arrays[_CLASSES] = _read_names(archive, root)
            return arrays
    except (UserError, MemoryError):
        raise
    # zipfile, zlib and numpy each raise errors of their own for a damaged file.
    except Exception as error:
        reason = one_line_reason(error)
        # numpy takes an unknown format for pickled objects, and advises to load them unsafely.
        if "allow_pickle" in str(error):
            reason = "no format of numpy's"
        raise UserError(
            f"data: {root} is no .npz file that can be read ({reason}); use numpy.savez"
        ) from None


def _suggest_file(path: Path) -> str:
    """Return advice for a path that does not exist: the .npz file of the nearest name, if any."""
    names = [file.name for file in path.parent.glob("*.npz")]
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"did you mean {path.parent / near[0]}?"
    return "set data.root to an .npz file"


def _read_array(archive: Any, name: str, root: str, listed: str) -> NDArray[Any]:
    if name not in archive.files:
        names = ", ".join(archive.files[:8]) or "nothing"
        raise UserError(f"data: {root} has no array {name}; expected {listed}; got {names}")
    try:
        array = archive[name]
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(
            f"data: {root}: cannot read {name} ({one_line_reason(error)}); write the file again"
        ) from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"data: {root}: {name} is not an array; use numpy.savez")
    return array


def _read_names(archive: Any, root: str) -> NDArray[Any]:
    """Return the array of class names. numpy pickles a list of objects, which is not read."""
    try:
        return np.asarray(archive[_CLASSES])
    except Exception as error:
        raise UserError(
            f"data: {root}: cannot read {_CLASSES} ({one_line_reason(error)}); expected text (K,), "
            "a name a class, as numpy.array(names, str)"
        ) from None


def _check_names(names: NDArray[Any], labels: int, root: str) -> tuple[str, ...]:
    """Return the class names; raise UserError for other arrays, and for fewer names than labels."""
    if names.dtype.kind != "U" or names.ndim != 1:
        raise UserError(
            f"data: {root}: {_CLASSES} is {names.dtype} {names.shape}; expected text (K,), "
            "a name a class; rename the array if it is something else"
        )
    listed: tuple[str, ...] = tuple(names.tolist())
    for name, count in Counter(listed).items():
        if not name or count > 1:
            raise UserError(
                f"data: {root}: {_CLASSES} has the name {name!r} {count} times; "
                "expected a name of its own for each class"
            )
    if len(listed) < labels:
        raise UserError(
            f"data: {root}: {_CLASSES} has {len(listed)} names, but the largest label is "
            f"{labels - 1}; give a name for each of 0 .. {labels - 1}, or let the labels begin at 0"
        )
    return listed


def _describe_labels(
    train: NDArray[np.int64], test: NDArray[np.int64], root: str
) -> tuple[str, ...]:
    """Return notes on labels that may not be meant: none is 0, or some are only tested."""
    notes = []
    if min(train.min(), test.min()) == 1:
        notes.append(
            f"note: {root}: labels begin at 1, so class 0 has no images; "
            "subtract 1 if that is not meant"
        )
    only_tested = np.setdiff1d(test, train)
    if len(only_tested):
        listed = ", ".join(map(str, only_tested[:_LISTED_LABELS]))
        if len(only_tested) > _LISTED_LABELS:
            listed += ", ..."
        notes.append(f"note: {root}: y_train has no image of the labels {listed} of y_test")
    return tuple(notes)


def _check_images(arrays: dict[str, NDArray[Any]], part: str, root: str) -> NDArray[np.uint8]:
    """Return the images of `train` or `test` as (N, H, W, C); raise UserError for other arrays."""
    name = f"x_{part}"
    x = arrays[name]
    is_gray = x.ndim == 3
    has_channels = x.ndim == 4 and x.shape[3] in (1, 3)
    expected = "expected uint8 (N, H, W, 3), (N, H, W, 1) or (N, H, W)"
    if x.dtype != np.uint8 or not (is_gray or has_channels):
        raise UserError(f"data: {root}: {name} is {x.dtype} {x.shape}; {expected}")
    if x.size == 0:
        raise UserError(
            f"data: {root}: {name} is empty, {x.dtype} {x.shape}; {expected} "
            "with at least one image"
        )
    if is_gray:
        return x[..., None]
    return x


def _check_labels(
    arrays: dict[str, NDArray[Any]], part: str, images: int, root: str
) -> NDArray[np.int64]:
    """Return the labels of `train` or `test` as (N,); raise UserError for other arrays."""
    name = f"y_{part}"
    y = arrays[name]
    is_column = y.ndim == 2 and y.shape[1] == 1
    if y.dtype.kind not in "iu" or not (y.ndim == 1 or is_column):
        raise UserError(
            f"data: {root}: {name} is {y.dtype} {y.shape}; "
            "expected integers (N,), a class index an image"
        )
    if len(y) != images:
        raise UserError(
            f"data: {root}: {name} has {len(y)} labels for the {images} images of x_{part}"
        )
    label = int(y.min())
    if label >= 0:
        label = int(y.max())
    if label < 0 or label > np.iinfo(np.int32).max:
        raise UserError(
            f"data: {root}: {name} has the label {label}; expected 0 .. num_classes - 1"
        )
    return y.reshape(-1).astype(np.int64)

"""One .npz file with the images and labels of both splits."""

from __future__ import annotations

import difflib
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localpipe.config.keys import Data
from localpipe.data.images import Raw, Recipe, expand_path, one_line_reason, split_from_arrays
from localpipe.errors import UserError

_NPZ_NAMES = ("x_train", "y_train", "x_test", "y_test")


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
    return Raw(
        split_from_arrays(x_train, y_train), split_from_arrays(x_test, y_test), num_classes, recipe
    )


def _read_npz(root: str) -> dict[str, NDArray[Any]]:
    """Return the four arrays of a file, unpickling nothing."""
    path, names = expand_path(root), ", ".join(_NPZ_NAMES)
    if not os.path.exists(path):
        near = difflib.get_close_matches(
            path.name, [file.name for file in path.parent.glob("*.npz")], n=1
        )
        advice = (
            f"did you mean {path.parent / near[0]}?" if near else "set data.root to an .npz file"
        )
        raise UserError(f"data: {root} does not exist; {advice}")
    if os.path.isdir(path):
        raise UserError(
            f"data: {root} is a folder; expected one .npz file with {names}; set data.root to it"
        )
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise UserError(
                    f"data: {root} holds a single array; expected {names}; use numpy.savez"
                )
            return {name: _npz_array(archive, name, root) for name in _NPZ_NAMES}
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and numpy each have their own for a damaged file
        # numpy takes what it does not know for pickled objects, and advises to load them unsafely.
        reason = "no format of numpy's" if "allow_pickle" in str(error) else one_line_reason(error)
        raise UserError(
            f"data: {root} is no .npz file that can be read ({reason}); use numpy.savez"
        ) from None


def _npz_array(archive: Any, name: str, root: str) -> NDArray[Any]:
    if name not in archive.files:
        there = ", ".join(archive.files[:8]) or "nothing"
        raise UserError(
            f"data: {root} has no array {name}; expected {', '.join(_NPZ_NAMES)}; got {there}"
        )
    try:
        array = archive[name]
    except Exception as error:
        raise UserError(
            f"data: {root}: cannot read {name} ({one_line_reason(error)}); write the file again"
        ) from None
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
        raise UserError(
            f"data: {root}: {name} is empty, {x.dtype} {x.shape}; {expected} with at least one image"
        )
    return x[..., None] if gray else x


def _npz_labels(
    arrays: dict[str, NDArray[Any]], name: str, images: int, root: str
) -> NDArray[np.int64]:
    """Check labels and return them as (N,)."""
    y = arrays[name]
    if y.dtype.kind not in "iu" or not (y.ndim == 1 or (y.ndim == 2 and y.shape[1] == 1)):
        raise UserError(
            f"data: {root}: {name} is {y.dtype} {y.shape}; expected integers (N,), a class index an image"
        )
    if len(y) != images:
        raise UserError(
            f"data: {root}: {name} has {len(y)} labels for the {images} images of {name.replace('y', 'x')}"
        )
    low, high = int(y.min()), int(y.max())
    if low < 0 or high > np.iinfo(np.int32).max:
        wrong = low if low < 0 else high
        raise UserError(
            f"data: {root}: {name} has the label {wrong}; expected 0 .. num_classes - 1"
        )
    return y.reshape(-1).astype(np.int64)

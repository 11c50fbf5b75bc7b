"""How often every channel of images has every value. Of image files it is kept in a cache."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray

from localpipe.data.folders.image_folder import DECODERS, FileImages
from localpipe.data.images import Images, ImageSubset
from localpipe.data.verify.cache import UNKNOWN, find_keys
from localpipe.data.verify.progress import FileProgress
from localpipe.environment import cache_folder
from localpipe.files import write_whole

Histogram = NDArray[np.int64]  # (C, 256)

_VERSION = 1  # of how the values are counted; what another version has counted is not read
_CHUNK = 256  # images that are read at a time


def count_values(images: Images) -> Histogram:
    """Return how often every channel has every value, (C, 256), after reading every image once.

    What was counted of image files is kept in the user's cache folder, if there is one. It is read
    there as long as no file has another size or time. Raises RunError for a broken file.
    """
    files, rows = _find_files(images)
    if files is None:
        return _count(images)
    kept = _find_place(files, [files.paths[row] for row in rows.tolist()])
    shape = (images.shape[2], 256)
    histogram = _read(kept, shape)
    if histogram is None:
        histogram = _count(images, FileProgress("measuring data.mean and data.std", len(images)))
        _write(kept, histogram)
    return histogram


def _find_files(images: Images) -> tuple[FileImages | None, NDArray[np.int64]]:
    """Return the files that images are read from, or None, and the row of each image in them."""
    rows = np.arange(len(images))
    while isinstance(images, ImageSubset):
        rows = images.rows[rows]
        images = images.images
    if isinstance(images, FileImages):
        return images, rows
    return None, rows


def _count(images: Images, progress: FileProgress | None = None) -> Histogram:
    """Return the histogram of images that are read, a few of them in memory at a time."""
    channels = images.shape[2]
    histogram = np.zeros((channels, 256), np.int64)
    with progress or contextlib.nullcontext():
        for start in range(0, len(images), _CHUNK):
            batch = images.read(np.arange(start, min(start + _CHUNK, len(images))))
            for channel in range(channels):
                histogram[channel] += np.bincount(batch[..., channel].ravel(), minlength=256)
            if progress is not None:
                progress.add(len(batch))
    return histogram


def _find_place(files: FileImages, paths: Sequence[str]) -> Path | None:
    """Return where the histogram of files at `paths` is kept, None for nowhere."""
    folder = cache_folder()
    if folder is None:
        return None
    # The values follow from the files, from how they are decoded, resized and cropped, and by what.
    made = (_VERSION, PIL.__version__, files.size, files.fit.__name__, files.rendering)
    with ThreadPoolExecutor(DECODERS, "keys") as pool:
        whole = [os.path.abspath(path) for path in paths]
        keys = find_keys(pool, whole, Path(), repr(made))
    if np.any(keys == UNKNOWN):
        return None
    name = hashlib.blake2b(np.sort(keys).tobytes(), digest_size=16).hexdigest()
    return folder / "histograms" / f"{name}.npy"


def _read(file: Path | None, shape: tuple[int, int]) -> Histogram | None:
    """Return the histogram in a file, or None for a file that is missing or damaged."""
    if file is None:
        return None
    try:
        histogram = np.load(file, allow_pickle=False)
    except Exception:  # numpy has errors of several classes for a damaged file
        return None
    if histogram.dtype == np.int64 and histogram.shape == shape:
        return np.asarray(histogram)
    return None


def _write(file: Path | None, histogram: Histogram) -> None:
    """Keep a histogram. A folder that cannot be written keeps nothing."""
    if file is None:
        return
    content = io.BytesIO()
    np.save(content, histogram)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, content.getbuffer(), fsync=False)

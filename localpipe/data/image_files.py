"""Looks at every image file of a data set before the first step, so that no run ends at one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from localpipe.data.decode import (
    DEFAULT_RENDERING,
    Rendering,
    check_mode,
    has_more_frames,
    load_pixels,
    open_image,
)
from localpipe.data.image_folder import DECODERS, FileImages
from localpipe.data.images import RawDataset, Split, one_line_reason
from localpipe.errors import UserError

_DECODED_BYTES = 2**30  # of files that take no longer to decode than the start of a run
_CHECKED_FILES = 100_000  # at most; of more data the test split alone is looked at
_LISTED = 5  # broken files in an error


def check_image_files(raw: RawDataset) -> tuple[str, ...]:
    """Look at the image files of both splits, and return notes on what was found.

    Files of up to 1 GiB altogether are decoded, JPEG at an eighth of its size. Of more only the
    headers are read, and above 100,000 files those of the test split alone. Data without image
    files have no notes. Raises UserError that lists the files that cannot be read.
    """
    test = _list_files(raw.test)
    paths = _list_files(raw.train) + test
    total = len(paths)
    decodes = False
    if total > _CHECKED_FILES:
        paths = test
    else:
        decodes = _count_bytes(paths) <= _DECODED_BYTES

    with ThreadPoolExecutor(DECODERS, "checker") as pool:
        look = partial(_look, rendering=_find_rendering(raw), decodes=decodes)
        looks = list(pool.map(look, paths))
    checked = zip(paths, looks, strict=True)
    broken = [f"{path} ({look.problem})" for path, look in checked if look.problem]
    if broken:
        raise UserError(_describe_broken(broken, len(paths)))

    notes = []
    if not decodes:
        notes.append(
            f"note: {total} image files are too many to decode before the start; "
            f"the headers of {len(paths)} were checked"
        )
    several = sum(look.has_more_frames for look in looks)
    if several:
        notes.append(
            f"note: of {several} of {len(paths)} image files, which are animations or have "
            "several pages, only the first image is used"
        )
    return tuple(notes)


@dataclass(frozen=True)
class _Look:
    problem: str  # "" for a file that can be read
    has_more_frames: bool = False


def _list_files(split: Split) -> list[str]:
    """Return the paths of a split's image files, and none for images in memory."""
    if isinstance(split.images, FileImages):
        return list(split.images.paths)
    return []


def _find_rendering(raw: RawDataset) -> Rendering:
    """Return the rendering of a data set's image files, which both splits share."""
    if isinstance(raw.test.images, FileImages):
        return raw.test.images.rendering
    return DEFAULT_RENDERING


def _look(path: str, rendering: Rendering, decodes: bool) -> _Look:
    try:
        with open_image(path) as picture:
            check_mode(picture, rendering)
            several = has_more_frames(picture)
            if decodes:
                picture.draft(None, (1, 1))  # of JPEG alone: as small as its decoder can
                load_pixels(picture, rendering)
    except Exception as error:  # every decoder has errors of its own
        return _Look(one_line_reason(error))
    return _Look("", several)


def _count_bytes(paths: Sequence[str]) -> int:
    """Return the sum of the files' sizes. A file that cannot be looked at counts as 0."""
    total = 0
    for path in paths:
        try:
            total += os.stat(path).st_size
        except OSError:  # it is reported when it is opened
            continue
    return total


def _describe_broken(broken: Sequence[str], files: int) -> str:
    """Return the error for files, each with its reason in brackets."""
    listed = ", ".join(broken[:_LISTED])
    if len(broken) > _LISTED:
        listed += f" and {len(broken) - _LISTED} more"
    return (
        f"data: {len(broken)} of {files} image files cannot be read: {listed}; "
        "mend them, or remove them for a new run"
    )

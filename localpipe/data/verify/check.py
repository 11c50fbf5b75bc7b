"""Reads image files in parallel before a run, to find those that cannot be read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray

from localpipe.data.folders.decode import Rendering, check_mode, has_more_frames, open_image, to_rgb
from localpipe.data.folders.image_folder import DECODERS
from localpipe.data.images import one_line_reason
from localpipe.data.verify.cache import DECODED, READ, SEVERAL, VerifiedFiles, find_keys, split_rows
from localpipe.data.verify.progress import FileProgress

_VERSION = 1  # of the check; what another version has found does not count


@dataclass(frozen=True)
class CheckedFiles:
    """What was found of image files.

    problems: why a file cannot be read, by its row in the list of files. several: how many files
    are animations or have several pages.
    """

    problems: dict[int, str]
    several: int


def check_files(
    paths: Sequence[str], root: Path, rendering: Rendering, decodes: bool, are_all: bool
) -> CheckedFiles:
    """Check image files below `root`, but those that the user's cache folder knows to be good.

    rendering: of their pixels. decodes: read the pixels as training does, but of JPEG an eighth of
    the size. Else only the headers are read. are_all: `root` has no other files of the data. The
    progress is shown on standard error. No file raises an error.
    """
    # Decoders differ between versions of Pillow, and a range allows other values.
    check = f"{_VERSION} {PIL.__version__} {rendering.value_range}"
    cache = VerifiedFiles(root)
    with _threads() as pool:
        keys = find_keys(pool, paths, root, check)
        facts = cache.find(keys)
        needed = DECODED if decodes else READ
        rows = np.flatnonzero((facts & needed) == 0)
        problems: dict[int, str] = {}
        if len(rows):
            look = partial(_look, rendering=rendering, decodes=decodes)
            try:
                _check_rows(pool, paths, rows, look, facts, problems)
            finally:  # what an interrupted check has found is not lost
                cache.add(keys, facts, keeps_others=not are_all)
    return CheckedFiles(problems, int(np.count_nonzero(facts & SEVERAL)))


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Give a pool of threads, which does not go on after an interrupt."""
    # Decoders release the interpreter lock, so processes would be no faster.
    pool = ThreadPoolExecutor(DECODERS, "checker")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _check_rows(
    pool: ThreadPoolExecutor,
    paths: Sequence[str],
    rows: NDArray[np.int64],
    look: Callable[[str], _Look],
    facts: NDArray[np.uint8],
    problems: dict[int, str],
) -> None:
    """Look at the files at `rows`; write what is found of them into `facts` and `problems`."""

    def look_at_part(part: slice) -> list[_Look]:
        return [look(paths[row]) for row in rows[part]]

    parts = split_rows(len(rows))
    with FileProgress("checking image files", len(rows)) as progress:
        for part, found in zip(parts, pool.map(look_at_part, parts), strict=True):
            for row, one in zip(rows[part].tolist(), found, strict=True):
                facts[row] |= one.facts
                if one.problem:
                    problems[row] = one.problem
            progress.add(len(found))


@dataclass(frozen=True)
class _Look:
    facts: int  # bits of the cache, 0 for a file that cannot be read
    problem: str = ""


def _look(path: str, rendering: Rendering, decodes: bool) -> _Look:
    """Read one file, or its header alone."""
    try:
        with open_image(path) as picture:
            check_mode(picture, rendering)
            facts = READ
            if has_more_frames(picture):
                facts |= SEVERAL
            if decodes:
                picture.draft(None, (1, 1))  # of JPEG alone: as small as its decoder can
                to_rgb(picture, rendering)
                facts |= DECODED
    except Exception as error:  # every decoder has errors of its own
        return _Look(0, one_line_reason(error))
    return _Look(facts)

"""Reads image files in parallel before a run, to find those that cannot be read."""

from __future__ import annotations

import contextlib
import math
import time
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
from localpipe.data.verify.cache import DECODED, READ, SEVERAL, VerifiedFiles, file_keys
from localpipe.output import show_progress

_VERSION = 1  # of the check; what another version has found does not count
_AT_ONCE = 64  # files of a task of the threads
_QUIET_S = 1.0  # before the progress is shown
_SHOWN_S, _PRINTED_S = 0.2, 10.0  # between two states of it, on a terminal and elsewhere


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
        keys = _find_keys(pool, paths, root, check)
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


def _find_keys(
    pool: ThreadPoolExecutor, paths: Sequence[str], root: Path, check: str
) -> NDArray[np.uint64]:
    """Return the cache's key of every file. The threads wait for a slow disk together."""

    def find(part: slice) -> NDArray[np.uint64]:
        return file_keys(paths[part], root, check)

    keys = [np.zeros(0, np.uint64), *pool.map(find, _parts(len(paths)))]
    return np.concatenate(keys)


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

    parts = _parts(len(rows))
    with _Progress(len(rows)) as progress:
        for part, found in zip(parts, pool.map(look_at_part, parts), strict=True):
            for row, one in zip(rows[part].tolist(), found, strict=True):
                facts[row] |= one.facts
                if one.problem:
                    problems[row] = one.problem
            progress.add(len(found))


def _parts(count: int) -> list[slice]:
    """Return the tasks of the threads, which are together the rows 0 .. count - 1."""
    return [slice(start, start + _AT_ONCE) for start in range(0, count, _AT_ONCE)]


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


class _Progress:
    """Shows on standard error how many of `total` files are checked, once it takes a second."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._start = time.monotonic()
        self._shown, self._printed = -math.inf, self._start

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown > 0:
            show_progress("")

    def add(self, files: int) -> None:
        """Count files, and show the state unless it was shown a moment ago."""
        self._done += files
        now = time.monotonic()
        if now - self._start < _QUIET_S or now - self._shown < _SHOWN_S:
            return
        is_due = now - self._printed >= _PRINTED_S
        left_s = (now - self._start) / self._done * (self._total - self._done)
        share = 100 * self._done / self._total
        show_progress(
            f"checking image files: {self._done:,} of {self._total:,} ({share:.0f} %), "
            f"{left_s:.0f} s left",
            is_frequent=not is_due,
        )
        self._shown = now
        if is_due:
            self._printed = now

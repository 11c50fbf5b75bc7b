"""What is shown while many files are read before the first step."""

from __future__ import annotations

import math
import time

from localpipe.output import show_progress

_QUIET_S = 1.0  # before the progress is shown
_SHOWN_S, _PRINTED_S = 0.2, 10.0  # between two states of it, on a terminal and elsewhere


class FileProgress:
    """Shows on standard error how many of `total` files are done, once it takes a second.

    what: the words before the numbers, as `checking image files`.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total
        self._done = 0
        self._start = time.monotonic()
        self._shown, self._printed = -math.inf, self._start

    def __enter__(self) -> FileProgress:
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
            f"{self._what}: {self._done:,} of {self._total:,} ({share:.0f} %), {left_s:.0f} s left",
            is_frequent=not is_due,
        )
        self._shown = now
        if is_due:
            self._printed = now

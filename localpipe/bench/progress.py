"""What a person sees of a benchmark while it runs."""

from __future__ import annotations

import contextlib
import sys

from localpipe.environment import is_dumb_terminal
from localpipe.output import warn


def show_progress(text: str, is_frequent: bool = False) -> None:
    """Print what runs now, on standard error.

    On a terminal that can move its cursor every text replaces the previous one, and an empty text
    clears the line. Elsewhere only the infrequent ones are printed, each on a line, and an empty
    one is not. It never raises OSError.
    """
    if sys.stderr.isatty() and not is_dumb_terminal():
        with contextlib.suppress(OSError):
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text and not is_frequent:
        warn(text)

"""What a person sees of a benchmark while it runs."""

from __future__ import annotations

import sys


def show_progress(text: str, is_frequent: bool = False) -> None:
    """Print what runs now, on standard error.

    On a terminal every text replaces the previous one, and an empty text clears the line. Elsewhere
    only the infrequent ones are printed, each on a line, and an empty one is not.
    """
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text and not is_frequent:
        print(text, file=sys.stderr, flush=True)

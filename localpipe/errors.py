"""The errors that end a command, and the suggestion for a misspelt name.

A message reads `where: what; expected / got; what to do`, in one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LISTED = 40  # choices of a suggestion; a data set may have thousands of classes


class UserError(Exception):
    """A mistake that the user can correct: printed as one line, exit status 2."""


class RunError(Exception):
    """Any other failure that ends a run: printed as one line, exit status 1. Not a UserError."""


class CrashError(RunError):
    """An unexpected exception: printed with its traceback."""


class NeighbourLostError(RunError):
    """The connection to a neighbour is lost.

    It is never the first cause, so the launcher prints it only if there is no other error.
    """


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that is not empty, else the name of its class."""
    for line in str(error).splitlines():
        if line.strip():
            return line.strip()
    return type(error).__name__


def find_nearest(name: str, choices: Iterable[str]) -> str | None:
    """Return the nearest of the choices, or None if none is near or there are none.

    Near means a ratio of at least 0.6 by difflib. Upper and lower case differ.
    """
    # Names with a long common part (all the ResNets) are near each other, so a cutoff is needed.
    near = difflib.get_close_matches(name, sorted(choices), n=1, cutoff=0.6)
    if not near:
        return None
    return near[0]


def suggest(name: str, choices: Iterable[str], prefix: str = "") -> str:
    """Return `did you mean X?` for the nearest choice, or the list of choices if none is near.

    The list is `choose one of A, B`, sorted, of 40 choices at most. `prefix` comes before every
    choice in the result.
    """
    names = sorted(choices)
    nearest = find_nearest(name, names)
    if nearest is not None:
        return f"did you mean {prefix}{nearest}?"
    listed = ", ".join(prefix + choice for choice in names[:_LISTED])
    if len(names) > _LISTED:
        listed += ", ..."
    return f"choose one of {listed}"

"""The errors that end a command, and the suggestion for a misspelt name.

A message reads `where: what; expected / got; what to do`, in one line. Names of files and texts of
a configuration are part of it, so it is made one line where it is read.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Sequence

_LONGEST = 2000  # signs of a message that are printed
_END = 500  # of these, how many are the last ones, which say what to do
_LISTED = 40  # choices of a suggestion; a data set may have thousands of classes


class _OneLineError(Exception):
    """An error whose text is one line, whatever is part of its message."""

    def __str__(self) -> str:
        return to_line(super().__str__())


class UserError(_OneLineError):
    """A mistake that the user can correct: printed as one line, exit status 2."""


class RunError(_OneLineError):
    """Any other failure that ends a run: printed as one line, exit status 1. Not a UserError."""


class CrashError(RunError):
    """An unexpected exception: printed with its traceback. Its text may have several lines."""

    def __str__(self) -> str:
        return Exception.__str__(self)


class NeighbourLostError(RunError):
    """The connection to a neighbour is lost.

    It is never the first cause, so the launcher prints it only if there is no other error.
    """


def to_line(text: str) -> str:
    """Return a text as one line that every terminal prints as it is, of at most 2,000 signs.

    Line ends, control signs and bytes that are no text become escapes, as `\\n`. Of a longer text
    the middle is left out.
    """
    if not text.isprintable():
        text = "".join(map(_escape, text))
    if len(text) > _LONGEST:
        return f"{text[: _LONGEST - _END - 5]} ... {text[-_END:]}"
    return text


def _escape(sign: str) -> str:
    """Return a sign, or its escape if it cannot be printed. A space is a space in any alphabet."""
    if sign.isprintable() or unicodedata.category(sign) == "Zs":
        return sign
    return sign.encode("unicode_escape").decode("ascii")


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


def describe_names(names: Sequence[str]) -> str:
    """Return a few names as text: `a`, or `a and 3 more`. names: at least one."""
    if len(names) == 1:
        return names[0]
    return f"{names[0]} and {len(names) - 1} more"

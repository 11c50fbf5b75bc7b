"""The two ways a run ends badly, and how a wrong word finds its nearest right one.

A message reads `where: what; expected / got; what to do`, in one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend: printed as one line, exit status 2."""


class RunError(Exception):
    """Anything else that ends a run: exit status 1."""


class CrashError(RunError):
    """An exception that nobody expected: shown with its traceback."""


class PeerLostError(RunError):
    """A neighbour went away. Never the first cause, so a supervisor shows it only when nothing better is known."""


def suggest(word: str, choices: Iterable[str], prefix: str = "") -> str:
    """Return `did you mean X?` for the nearest choice, or the list of choices where none is near."""
    known = sorted(choices)
    # Long shared tails (all the ResNets) make every choice near: difflib's ratio decides, the threshold keeps it honest.
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    return f"choose one of {', '.join(prefix + name for name in known)}"

"""Standard output and standard error as conveniences: whatever happens to them, a run goes on.

They may be closed, their reader may have gone, or their disk may be full.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO, cast

from localpipe.environment import is_dumb_terminal

if TYPE_CHECKING:
    from rich.console import Console

_NAMES = ("stdin", "stdout", "stderr")


def open_closed_streams() -> None:
    """Open those of the standard streams that are closed, on the null device.

    Call it before a file is opened, else that file would get the number of the closed stream, and
    what is printed would go into it. `sys.stdout` and `sys.stderr` are never None afterwards.
    """
    for number, name in enumerate(_NAMES):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is this one, because those below it are open.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def escape_what_cannot_be_encoded() -> None:
    """Let standard output write escapes for what its encoding lacks, as standard error does.

    A name of a file or a class may hold bytes that are no text. It must not end a command.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Print a line on standard output. It never raises OSError: see `TolerantStream`."""
    print(text, file=_tolerant("stdout"), flush=True)


def warn(text: str) -> None:
    """Print a line on standard error. It never raises OSError: see `TolerantStream`."""
    print(text, file=_tolerant("stderr"), flush=True)


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


def make_console(width: int | None = None, tolerant: bool = False) -> Console:
    """Return a rich console on standard output that prints every text as it is.

    Square brackets and colons of a path or a name are text, and no markup. width: None for the
    terminal's. tolerant: never raise OSError, for what is printed of a run.
    """
    from rich.console import Console

    file: TextIO | None = None
    if tolerant:
        file = cast(TextIO, TolerantStream(_unwrapped_output, _note_end_of_output))
    return Console(width=width, markup=False, emoji=False, file=file)


def tolerate_own_output() -> None:
    """Let this worker's own prints, and those of a user's code, never raise OSError."""
    for name in ("stdout", "stderr"):
        setattr(sys, name, TolerantStream(partial(_same, getattr(sys, name))))


class TolerantStream:
    """A text stream in place of another one. After an error of the other, text is thrown away.

    find: returns the other stream, or None for none. note: called with the reason, once, when the
    stream is lost. A sign that the other's encoding lacks becomes `?`. Attributes are the other's.
    """

    def __init__(
        self, find: Callable[[], TextIO | None], note: Callable[[str], None] | None = None
    ) -> None:
        self._find = find
        self._note = note

    def write(self, text: str) -> int:
        """Write a text, or throw it away. Return its length."""
        stream = self._find()
        if stream is not None:
            try:
                stream.write(text)
            except UnicodeEncodeError:
                encoding = stream.encoding or "ascii"
                self.write(text.encode(encoding, "replace").decode(encoding))
            except (OSError, ValueError) as error:
                self._lose(stream, error)
        return len(text)

    def flush(self) -> None:
        """Flush the other stream, or do nothing."""
        stream = self._find()
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError) as error:
                self._lose(stream, error)

    def isatty(self) -> bool:
        """Return whether the other stream is a terminal."""
        stream = self._find()
        try:
            return stream is not None and stream.isatty()
        except ValueError:  # it is closed
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._find(), name)

    def _lose(self, stream: TextIO, error: OSError | ValueError) -> None:
        """Let all that is still written go to the null device, also what the stream has kept."""
        try:
            descriptor = os.open(os.devnull, os.O_WRONLY)
            os.dup2(descriptor, stream.fileno())
            os.close(descriptor)
        except (OSError, ValueError):  # a closed object, or no file at all
            self._find = _no_stream
            if sys.stdout is stream:
                sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if self._note is not None:
            self._note(getattr(error, "strerror", None) or str(error))


def _same(stream: TextIO) -> TextIO:
    return stream


def _no_stream() -> None:
    return None


def _tolerant(name: str) -> TextIO:
    """Return the standard stream of a name as it is now, in a tolerant form."""
    note = _note_end_of_output if name == "stdout" else None
    return cast(TextIO, TolerantStream(lambda: getattr(sys, name), note))


def _unwrapped_output() -> TextIO | None:
    """Return standard output, below what rich puts over it while a live display runs."""
    stream: TextIO | None = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
    return stream


def _note_end_of_output(reason: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        warn(f"localpipe: standard output cannot be written: {reason}; no more is printed")

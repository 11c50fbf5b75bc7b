"""Runs commands of localpipe in processes that are forked from a server which has torch imported.

A command costs its own work, not the seconds of the imports. Its ranks are forked too.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.forked_ranks import CONTEXT

LIMIT_S = 120.0
_GRACE_S = 30.0  # after a kill
_STATUS = threading.Lock()
_LOST = 255  # no command of localpipe ends with it
HUNG = -1000  # the status of a command that was killed after LIMIT_S
Break = Callable[[], None]


@dataclass(frozen=True)
class Result:
    """What a command did: its exit status, what it printed, and the seconds it took."""

    words: tuple[str, ...]
    status: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def command(self) -> str:
        return shlex.join(["localpipe", *self.words])

    @property
    def is_lost(self) -> bool:
        """Whether the server that forks has lost the status, which multiprocessing makes 255."""
        return self.status == _LOST and not self.stdout and not self.stderr

    @property
    def refusal(self) -> str | None:
        """The line of a command that was refused as it must be: status 2, one line, no more."""
        lines = self.stderr.splitlines()
        if self.status == 2 and len(lines) == 1 and lines[0].startswith("localpipe: "):
            return lines[0].removeprefix("localpipe: ")
        return None


class Runner:
    """Runs commands in a folder that becomes their working directory, from any thread.

    break_: called in every process before its command, to show that a sweep finds a fault.
    """

    def __init__(self, folder: Path, break_: Break | None = None) -> None:
        self.folder = folder
        self.commands = 0
        self.lost = 0
        self._break = break_

    def run(self, *words: object, before: Break | None = None) -> Result:
        """Run `localpipe WORDS` to its end, or kill it after LIMIT_S.

        before: called in the process before the command.
        """
        result = self._fork(tuple(map(str, words)), None, before)
        if result.is_lost:
            self.lost += 1
            result = self._fork(tuple(map(str, words)), None, before)
        return result

    def call(self, function: Callable[..., Any], *arguments: Any) -> Result:
        """Call a function in a process of its own: what it prints is the result's `stdout`."""
        return self._fork((function.__name__, *map(str, arguments)), (function, arguments))

    def _fork(
        self, words: tuple[str, ...], call: tuple[Any, Any] | None, before: Break | None = None
    ) -> Result:
        start = time.monotonic()
        breaks = [break_ for break_ in (self._break, before) if break_ is not None]
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="said_") as said:
            return self._fork_into(Path(said), words, call, breaks, start)

    def _fork_into(
        self,
        said: Path,
        words: tuple[str, ...],
        call: tuple[Any, Any] | None,
        breaks: Sequence[Break],
        start: float,
    ) -> Result:
        arguments = (self.folder, said, words, call, breaks)
        process = CONTEXT.Process(target=_work, args=arguments)
        # A start asks for the status of every other process too. Two threads that ask for one at
        # the same time take it from each other.
        with _STATUS:
            process.start()
        wait([process.sentinel], LIMIT_S)
        with _STATUS:
            status = process.exitcode
            if status is None:
                status = HUNG
            _kill(process)
        self.commands += 1
        stdout, stderr = (_read(said / name) for name in ("stdout", "stderr"))
        return Result(words, status, stdout, stderr, time.monotonic() - start)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _kill(process: BaseProcess) -> None:
    """Kill what is left of a command: its ranks die with it."""
    if process.is_alive() and process.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    # Where the server that forks has died, nobody would end an endless wait.
    process.join(_GRACE_S)


def _work(
    folder: Path,
    said: Path,
    words: tuple[str, ...],
    call: tuple[Any, Any] | None,
    breaks: Sequence[Break],
) -> None:
    """Run one command in this process, its output in two files, and end with its status."""
    os.setsid()
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(said / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
    status = 1
    try:
        from tests.sweep.forks.ranks import fork_ranks

        fork_ranks()
        for break_ in breaks:
            break_()
        if call is not None:
            function, arguments = call
            function(*arguments)
            status = 0
        else:
            from localpipe.cli import main

            status = main(list(words))
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status)

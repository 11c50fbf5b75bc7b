"""Turns: the launcher asks one system at a time for a window of work; everybody else sleeps in a read.

Two named pipes a worker, in the private folder that it shares with its launcher: no port, no polling, no spinning.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from localpipe.errors import RunError

_LOOK_S = 0.5  # between looks at whether everybody still lives
_CHUNK = 1 << 16


class Caller:
    """The launcher's side: asks every worker of a system, and waits for all answers."""

    def __init__(self, folder: Path, world: int) -> None:
        # Read-write, so that opening waits for nobody.
        self._asks = [os.open(_pipe(folder, "ask", rank), os.O_RDWR) for rank in range(world)]
        self._answers = [
            os.open(_pipe(folder, "answer", rank), os.O_RDWR | os.O_NONBLOCK)
            for rank in range(world)
        ]

    def ask(
        self, what: dict[str, Any], timeout_s: float, check: Callable[[], None]
    ) -> list[dict[str, Any]]:
        """Return the answers by rank. `check` is called now and then, and raises when an answer will never come."""
        line = (json.dumps(what) + "\n").encode()
        for descriptor in self._asks:
            os.write(descriptor, line)
        got = dict.fromkeys(self._answers, b"")
        deadline = time.monotonic() + timeout_s
        while waiting := [answer for answer, text in got.items() if not text.endswith(b"\n")]:
            ready, _, _ = select.select(waiting, [], [], _LOOK_S)
            for answer in ready:
                got[answer] += os.read(answer, _CHUNK)
            if not ready:
                check()
                if time.monotonic() > deadline:
                    raise RunError(f"no answer within {timeout_s:g} s: it hangs")
        return [json.loads(got[answer]) for answer in self._answers]

    def close(self) -> None:
        """Let go of the pipes; a worker that still listens reads their end."""
        for descriptor in (*self._asks, *self._answers):
            os.close(descriptor)


class Called:
    """A worker's side: what it is asked, line by line."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._asks = open(_pipe(folder, "ask", rank), encoding="utf-8")  # noqa: SIM115  # open as long as the process
        self._answers = open(_pipe(folder, "answer", rank), "w", encoding="utf-8")  # noqa: SIM115

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for line in self._asks:
            yield json.loads(line)

    def answer(self, **values: Any) -> None:
        """Answer the question asked last."""
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()


def _pipe(folder: Path, name: str, rank: int) -> Path:
    path = folder / f"{name}_{rank}"
    with contextlib.suppress(FileExistsError):
        os.mkfifo(path, 0o600)
    return path

"""Ranks that are forked from their launcher, which has imported everything: a tenth of a second."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import IO, NoReturn

from localpipe.environment import worker_environment
from localpipe.pipeline.launch import launcher, recovery, start
from localpipe.plan import measure, measure_worker
from localpipe.runs import train

_TICK_S = 0.02
_PIECE_S = 0.02  # of a piece that is measured


class ForkedRank:
    """A rank like the Popen of `start_rank`: what the launcher calls of it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal, or None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status. Raises TimeoutExpired after `timeout` seconds."""
        end = time.monotonic() + (timeout or float("inf"))
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("rank", timeout or 0)
            time.sleep(_TICK_S)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def start_forked_rank(
    module: str, rank: int, world: int, folder: Path, stderr: IO[bytes] | None = None
) -> ForkedRank:
    """Fork one rank of a job; arguments and result are those of `start_rank`."""
    environment = worker_environment(rank, world, folder)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _become_rank(module, environment, stderr)
    return ForkedRank(pid)


def _become_rank(module: str, environment: dict[str, str], stderr: IO[bytes] | None) -> NoReturn:
    """Run a rank as `start.py` does in a process of its own, and end."""
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        if stderr is not None:
            os.dup2(stderr.fileno(), 2)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["start.py", module]
        status = start.main()
        os._exit(status)
    except BaseException:  # nothing may return into the launcher's code
        traceback.print_exc()
        os._exit(1)


def fork_ranks() -> None:
    """Let every launcher of this process fork its ranks, and look at them more often.

    Pieces are timed for a moment: the sweep asks what a measured plan says, and not how exactly.
    """
    for module in (launcher, measure, recovery):
        module.start_rank = start_forked_rank  # type: ignore[attr-defined]
    launcher._TICK_S = _TICK_S
    measure_worker.BUDGET_S = _PIECE_S


def end_before_ranks() -> None:
    """Let a training run of this process end with status 0 where it would start its ranks."""

    def end(*_: object, **__: object) -> NoReturn:
        raise SystemExit(0)

    for name in ("Workers", "RecoveringWorkers"):
        setattr(train, name, end)

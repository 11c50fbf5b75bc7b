"""Ranks that are forked from a server which has imported everything once: a start takes no time."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import subprocess
from pathlib import Path
from typing import IO

from localpipe.environment import PARENT, die_with_parent, worker_environment

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["localpipe.runs.train_worker", "localpipe.methods.infopro", "localpipe.networks.user_network"]
)


class ForkedRank:
    """A rank of a job, with the methods of `subprocess.Popen` that the launcher calls."""

    def __init__(self, module: str, environment: dict[str, str], folder: str) -> None:
        arguments = (module, environment, folder)
        self._process = _CONTEXT.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal, and None while the rank runs."""
        return self._process.exitcode

    def wait(self, timeout_s: float) -> int:
        """Wait for the end, and return the exit status."""
        self._process.join(timeout_s)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired("rank", timeout_s)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal to the rank, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)


def start_rank(
    module: str, rank: int, world: int, folder: Path, stderr: IO[bytes] | None = None
) -> ForkedRank:
    """Start a rank as the launcher's own function does."""
    return ForkedRank(module, worker_environment(rank, world, folder), os.getcwd())


def _serve(module: str, environment: dict[str, str], folder: str) -> None:
    """Be a rank: run `main()` of a module in a folder."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.environ[PARENT] = str(os.getppid())
    die_with_parent()
    os.chdir(folder)
    raise SystemExit(importlib.import_module(module).main())

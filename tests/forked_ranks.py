"""Ranks that are forked from a server which has imported everything once: a start takes no time."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any

from localpipe.environment import PARENT, die_with_parent, worker_environment
from localpipe.pipeline.launch.rank import RankNetwork
from localpipe.pipeline.launch.rank import start_rank as start_process

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.warm"])


class ForkedRank:
    """A rank of a job, with the methods of `subprocess.Popen` that the launcher calls."""

    def __init__(self, module: str, environment: dict[str, str], outputs: tuple[int, int]) -> None:
        files = [_OpenFile(number) for number in outputs]
        arguments = (module, environment, os.getcwd(), files)
        self._process = CONTEXT.Process(target=_serve, args=arguments, daemon=True)
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


class _OpenFile:
    """An open file of this process, of which the process that is started gets a copy's number."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _take_file, (DupFd(self._number),)


def _take_file(copy: Any) -> int:
    number: int = copy.detach()
    return number


def start_rank(
    module: str,
    rank: int,
    world: int,
    folder: Path,
    stderr: IO[bytes] | None = None,
    network: RankNetwork | None = None,
) -> ForkedRank | subprocess.Popen[bytes]:
    """Fork a rank, or start one with a network. Arguments are those of the launcher's function."""
    if network is not None:
        return start_process(module, rank, world, folder, stderr, network)
    outputs = (1, 2 if stderr is None else stderr.fileno())
    return ForkedRank(module, worker_environment(rank, world, folder), outputs)


def _serve(module: str, environment: dict[str, str], folder: str, outputs: list[int]) -> None:
    """Be a rank: run `main()` of a module in a folder."""
    os.setsid()
    for number, file in enumerate(outputs, 1):
        os.dup2(file, number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.environ[PARENT] = str(os.getppid())
    die_with_parent()
    os.chdir(folder)
    raise SystemExit(importlib.import_module(module).main())

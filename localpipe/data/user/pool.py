"""Loader processes as the process that needs their items sees them: requests in, answers out."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import weakref
from collections import deque
from collections.abc import Iterable, Iterator

from torch import Tensor

from localpipe.data.user.wire import SLOTS, ArrayReader, Content, Progress, Wire
from localpipe.environment import loader_environment, start_command
from localpipe.errors import RunError

Answer = tuple[Content, dict[str, Tensor]]
_MODULE = "localpipe.data.user.loader_process"
_TICK_S = 1.0
_END_S = 5.0  # a process that hangs in the kernel cannot be killed at all


class LoaderPool:
    """Loader processes for a user's function, none at first.

    name: the function. timeout_s: for an item, and for the call of the function. The processes are
    killed by `close`, and when nothing refers to the pool any more.
    """

    def __init__(self, name: str, timeout_s: float) -> None:
        self._name, self._timeout_s = name, timeout_s
        self._processes: list[_LoaderProcess] = []
        weakref.finalize(self, _kill_processes, self._processes)

    def grow(self, processes: int) -> None:
        """Start processes until there are so many. Raises OSError if one cannot be started."""
        while len(self._processes) < processes:
            self._processes.append(_LoaderProcess(self._name, self._timeout_s))

    def close(self) -> None:
        """Kill the processes. The pool may grow again."""
        _kill_processes(self._processes)

    def answer(self, requests: Iterable[Content]) -> Iterator[Answer]:
        """Yield the answer to every request, in order. Requests are sent ahead of their answers.

        A process gets a request only when its answer SLOTS requests before has been copied.
        Raises RunError for an item that cannot be read or takes too long, and for a process that
        dies. No more answers come then.
        """
        coming = iter(requests)
        turns = itertools.cycle(self._processes)
        waiting: deque[_LoaderProcess] = deque()
        while True:
            free = len(self._processes) * SLOTS - len(waiting)
            for request in itertools.islice(coming, free):
                process = next(turns)
                process.send(request)
                waiting.append(process)
            if not waiting:
                return
            yield waiting.popleft().receive()


def _kill_processes(processes: list[_LoaderProcess]) -> None:
    """Kill all processes of a list, and empty it."""
    while processes:
        processes.pop().kill()


class _LoaderProcess:
    """One loader process, the socket to it, and the memory that shows what it reads."""

    def __init__(self, name: str, timeout_s: float) -> None:
        self._name, self._timeout_s = name, timeout_s
        own, other = socket.socketpair()
        shared = os.memfd_create("localpipe")
        try:
            os.ftruncate(shared, Progress.SIZE)
            self._progress = Progress(shared)
            handles = (other.fileno(), shared)
            self._process = subprocess.Popen(
                start_command(_MODULE), env=loader_environment(handles), pass_fds=handles
            )
        finally:
            os.close(shared)
            other.close()
        self._wire, self._arrays = Wire(own), ArrayReader()

    def send(self, request: Content) -> None:
        """Send a request. A process that has ended is found when its answer is waited for."""
        with contextlib.suppress(OSError):
            self._wire.send({"name": self._name, **request})

    def receive(self) -> Answer:
        """Wait for the answer to the oldest request, and return its content and its arrays."""
        while True:
            try:
                content, file = self._wire.receive(min(_TICK_S, self._timeout_s))
                break
            except TimeoutError:
                self._check_time()
            except EOFError:
                raise RunError(self._describe_death()) from None
        if "error" in content:
            raise RunError(content["error"])
        return content, self._arrays.read(content, file)

    def kill(self) -> None:
        """Kill the process, and wait for its end."""
        self._wire.close()
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)

    def _check_time(self) -> None:
        """Raise RunError if the process is at the same item for too long."""
        progress = self._progress.read()
        if progress is None or progress[2] < self._timeout_s:
            return
        raise RunError(
            f"data: {self._describe_place()} has not ended after data.timeout_s "
            f"{self._timeout_s:g}; raise data.timeout_s, or correct the data set"
        )

    def _describe_place(self) -> str:
        """Return what the process reads now."""
        progress = self._progress.read()
        if progress is None:
            return "a loader process"
        place, index, _ = progress
        if place == "call":
            return f"the call of {self._name}"
        return f"reading item {index} of {place}"

    def _describe_death(self) -> str:
        place = self._describe_place()
        try:
            status = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            status = 0
        reason = f"ended with status {status}"
        if status < 0:
            reason = f"was killed by {signal.Signals(-status).name}"
        return (
            f"data: {place}: the loader process {reason}; see that memory suffices, and run the "
            "same command again"
        )

"""Processes under the emulation, forked from one that has imported torch and not touched CUDA.

Importing torch takes seconds, and a fork takes none. A process that has called CUDA cannot fork
another one that does. So the server forks every process, also on behalf of those that it forked:

    tests ── request ──▶ server ── fork ──▶ keeper ── fork ──▶ the process
                                              ◀── its status ──┘

A request is one connection. It stays open: the process is killed when whoever asked for it is gone.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from localpipe.environment import PARENT, die_with_parent

ADDRESS = "EMULATED_GPU_SERVER"  # in the environment of every process that the server forks
_START_S = 240.0
_TICK_S = 0.02
_CRASH_STATUS = 70
_PRELOADED = (
    "localpipe.cli.bench",
    "localpipe.cli.command_line",
    "localpipe.cli.doctor",
    "localpipe.cli.train",
    "localpipe.data.synthetic",
    "localpipe.methods.dgl",
    "localpipe.methods.infopro",
    "localpipe.networks.user_network",
    "localpipe.runs.train",
    "localpipe.runs.train_worker",
    "tests.emulated_gpu.cases",
    "tests.sample_networks",
    "torch.utils.tensorboard",
)


@dataclass(frozen=True)
class Request:
    """What a process is to do: call a function and exit with its result.

    function: `module:name`. environment: all of it. folder: the working directory. output: the file
    to whose end standard output and error go.
    """

    function: str
    arguments: Sequence[Any]
    environment: Mapping[str, str]
    folder: str
    output: str


class ForkedProcess:
    """A process of the server. It has what `localpipe` uses of subprocess.Popen."""

    def __init__(self, address: str, request: Request) -> None:
        self.returncode: int | None = None
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(address)
        self._replies = self._connection.makefile("r")
        self._connection.sendall(json.dumps(asdict(request)).encode() + b"\n")
        self.pid = int(self._replies.readline())

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal, or None while the process runs."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.returncode = int(self._replies.readline() or -signal.SIGKILL)
            self._replies.close()
            self._connection.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit status. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
            time.sleep(_TICK_S)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process and what is in its session."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        self.wait()


class Server:
    """A server, in a process of its own under the emulation. `close` ends it."""

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        self.address = str(folder / "server")
        self._environment = {**environment, ADDRESS: self.address}
        command = [sys.executable, "-m", "tests.emulated_gpu.fork_server", self.address]
        self._process = subprocess.Popen(command, env=self._environment)
        deadline = time.monotonic() + _START_S
        while not os.path.exists(self.address):
            assert self._process.poll() is None, "the server has ended"
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(_TICK_S)

    def start(
        self,
        function: str,
        arguments: Sequence[Any],
        output: Path,
        variables: Mapping[str, str] | None = None,
    ) -> ForkedProcess:
        """Start a process that calls a function. variables: of its environment, added to all."""
        environment = {**self._environment, **(variables or {})}
        request = Request(function, arguments, environment, os.getcwd(), str(output))
        return ForkedProcess(self.address, request)

    def cpu_s(self) -> float:
        """Return the seconds of CPU time that all processes which have ended took."""
        path = cpu_file(self.address)
        if not path.exists():
            return 0.0
        return sum(float(line) for line in path.read_text().splitlines())

    def close(self) -> None:
        """End the server. The processes that it forked end with whoever asked for them."""
        self._process.kill()
        self._process.wait()


def cpu_file(address: str) -> Path:
    """Return the file of the CPU times of a server's processes, in seconds, one in a line."""
    return Path(f"{address}.cpu")


# -- the server's own process -------------------------------------------------------------------


def serve(address: str) -> None:
    """Fork a process for every request, until whoever started the server ends."""
    die_with_parent()
    for module in _PRELOADED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # else a collection would copy every page of every forked process
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    listener = socket.socket(socket.AF_UNIX)
    # The name appears when connections are accepted.
    listener.bind(f"{address}.new")
    listener.listen(64)
    os.rename(f"{address}.new", address)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _keep(connection)
        connection.close()


def _keep(connection: socket.socket) -> None:
    """Fork the process of a request, report its end, or kill it when nobody is connected."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request = Request(**json.loads(connection.makefile("r").readline()))
    keeper = os.getpid()
    pid = os.fork()
    if pid == 0:
        _run(request, connection, keeper)
    process = os.pidfd_open(pid)
    readable, _, _ = select.select([connection.fileno(), process], [], [])
    if process not in readable:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    _, wait_status, usage = os.wait4(pid, 0)
    status = os.waitstatus_to_exitcode(wait_status)
    with open(cpu_file(os.environ[ADDRESS]), "a") as file:
        file.write(f"{usage.ru_utime + usage.ru_stime}\n")
    with contextlib.suppress(OSError):
        connection.sendall(f"{status}\n".encode())
    os._exit(0)


def _run(request: Request, connection: socket.socket, keeper: int) -> None:
    """Become the process of a request, and end."""
    os.setsid()
    connection.sendall(f"{os.getpid()}\n".encode())
    connection.close()
    os.environ.clear()
    os.environ.update(request.environment)
    # localpipe's workers look whether the process that started them still lives.
    os.environ[PARENT] = str(keeper)
    os.chdir(request.folder)
    output = os.open(request.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    status = _CRASH_STATUS
    try:
        module, _, name = request.function.partition(":")
        status = int(getattr(importlib.import_module(module), name)(*request.arguments))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1])

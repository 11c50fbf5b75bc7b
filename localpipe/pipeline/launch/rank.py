"""One rank: a worker process in a session of its own, started, and killed with all it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from localpipe.environment import (
    link_environment,
    spare_environment,
    start_command,
    worker_environment,
)

_KILL_S = 5.0  # a process that hangs in the kernel cannot be killed at all


@dataclass(frozen=True)
class RankNetwork:
    """The network that a rank of a benchmark runs in, so that its edges go over a link of its own.

    prefix: the words before its command, which enter a network namespace, or none. interface: the
    network interface that gloo listens on. Edges then go over TCP, never over shared memory.
    """

    prefix: tuple[str, ...]
    interface: str


def start_rank(
    module: str,
    rank: int,
    world: int,
    folder: Path,
    stderr: IO[bytes] | None = None,
    network: RankNetwork | None = None,
) -> subprocess.Popen[bytes]:
    """Start one rank of a job and return its process, whose `poll()` returns the exit status.

    The process calls `main()` of `module`, and dies with this process. world: the number of ranks.
    folder: the private folder of the job. Without `stderr` the rank shares this process's standard
    error. network: None for the launcher's own. Raises OSError if no process can be started. A
    wrong `module` fails in the process.
    """
    command, variables = start_command(module), worker_environment(rank, world, folder)
    if network is not None:
        command = [*network.prefix, *command]
        variables.update(link_environment(network.interface))
    # In a session of its own, so that the terminal's Ctrl-C reaches the launcher alone.
    return subprocess.Popen(
        command,
        env=variables,
        stderr=stderr,
        start_new_session=True,
    )


def start_spare(module: str, world: int, folder: Path) -> subprocess.Popen[bytes]:
    """Start a process that calls `warm_up()` of `module` and then waits for its rank. Return it.

    Arguments and errors are those of `start_rank`. `assign_rank` makes it one.
    """
    return subprocess.Popen(
        start_command(module),
        env=spare_environment(world, folder),
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def assign_rank(spare: subprocess.Popen[bytes], rank: int) -> bool:
    """Let a spare process go on as a rank; return False if it has ended."""
    assert spare.stdin is not None
    with contextlib.suppress(OSError):
        spare.stdin.write(f"{rank}\n".encode())
        spare.stdin.close()
    return spare.poll() is None


def kill_ranks(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill the ranks that still run, with the processes that they started, and reap them.

    It waits up to 5 s for each, and gives up on one that does not end. Never raises for ranks that
    have ended, so a second call is harmless.
    """
    for process in ranks:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    for process in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_S)

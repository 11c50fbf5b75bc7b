"""How this process was started, its cores and its environment variables. Imports nothing that is slow."""

from __future__ import annotations

import ctypes
import os
import signal

PRIVATE_DIR = "LOCALPIPE_PRIVATE_DIR"
PARENT = "LOCALPIPE_PARENT"
_PR_SET_PDEATHSIG = 1


def under_torchrun() -> bool:
    """Return whether torchrun, or anything that sets the same variables, started this process."""
    return PRIVATE_DIR not in os.environ and "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_worker() -> bool:
    """Return whether localpipe's own launcher started this process."""
    return PRIVATE_DIR in os.environ


def local_workers() -> int | None:
    """Return how many of torchrun's workers are on this machine, None where it does not say."""
    count = os.environ.get("LOCAL_WORLD_SIZE") if under_torchrun() else None
    return None if count is None else int(count)


def workers_here(workers: int) -> int:
    """Return how many of a run's workers are on this machine."""
    local = local_workers()
    return workers if local is None else local


def die_with_parent() -> None:
    """Let the kernel kill this process when its launcher dies; torchrun leaves workers running when it is killed."""
    parent = int(os.environ.get(PARENT, os.getppid()))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel knew
        os._exit(1)


def available_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) or os.cpu_count() or 1

"""Environment variables, and the cores, the limits and the parent of this process.

Environment variables are read and set in this module only. It imports neither torch nor anything
else that is slow, because workers import it first.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable
from pathlib import Path

PRIVATE_DIR = "LOCALPIPE_PRIVATE_DIR"
PARENT = "LOCALPIPE_PARENT"
SHARED_GPU = "NCCL_MULTI_RANK_GPU_ENABLE"
_PR_SET_PDEATHSIG = 1


def under_torchrun() -> bool:
    """Return whether torchrun, or anything that sets the same variables, started this process.

    RANK and WORLD_SIZE count. In a worker of localpipe's own launcher it is False.
    """
    return not is_worker() and "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_worker() -> bool:
    """Return whether localpipe's own launcher started this process."""
    return PRIVATE_DIR in os.environ


def local_workers() -> int | None:
    """Return how many of torchrun's workers are on this machine; None if it does not say.

    It is None without torchrun too. Raises ValueError if LOCAL_WORLD_SIZE is no number.
    """
    if not under_torchrun() or "LOCAL_WORLD_SIZE" not in os.environ:
        return None
    return int(os.environ["LOCAL_WORLD_SIZE"])


def workers_here(workers: int) -> int:
    """Return how many of a run's workers are on this machine.

    workers: the result where torchrun does not say. Raises ValueError if LOCAL_WORLD_SIZE is no
    number.
    """
    local = local_workers()
    if local is None:
        return workers
    return local


def launched_rank() -> int:
    """Return the rank that a launcher gave to this process, 0 without a launcher.

    Raises ValueError if RANK is no number.
    """
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of workers that the launcher states to each of them.

    Raises KeyError without a launcher, and ValueError if WORLD_SIZE is no number.
    """
    return int(os.environ["WORLD_SIZE"])


def local_rank(default: int) -> int:
    """Return this worker's number on its machine, or `default` if no launcher says.

    Raises ValueError if LOCAL_RANK is no number.
    """
    return int(os.environ.get("LOCAL_RANK", default))


def private_folder() -> Path | None:
    """Return the folder that localpipe's launcher shares with its workers; None under torchrun.

    It is None without any launcher too. The folder may be gone.
    """
    folder = os.environ.get(PRIVATE_DIR)
    if folder is None:
        return None
    return Path(folder)


def worker_environment(rank: int, world: int, folder: Path) -> dict[str, str]:
    """Return a copy of this process's environment with the variables of one worker that it starts.

    world: the number of workers. folder: the private folder of the launcher and its workers. The
    local rank is the rank. This process becomes the worker's parent in `die_with_parent`.
    """
    return {
        **os.environ,
        PRIVATE_DIR: str(folder),
        PARENT: str(os.getpid()),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
    }


def set_default(name: str, value: str) -> None:
    """Set an environment variable of this process, unless it is set already, even to ""."""
    os.environ.setdefault(name, value)


def die_with_parent() -> None:
    """Let the kernel kill this process when its launcher dies. Linux only.

    A torchrun that is killed leaves its workers running. The parent is the launcher that
    `worker_environment` names, else the present parent. If it has died already, the process ends
    with status 1.
    """
    parent = int(os.environ.get(PARENT, os.getppid()))
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The launcher may have died before the signal was set.
    if os.getppid() != parent:
        os._exit(1)


def read_variables(names: Iterable[str]) -> dict[str, str]:
    """Return those environment variables of `names` that are set, in the order of `names`."""
    return {name: os.environ[name] for name in names if name in os.environ}


def gloo_interface() -> str | None:
    """Return the network interface that the user chose for gloo, or None if none is set.

    It is GLOO_SOCKET_IFNAME as it is, which may be "".
    """
    return os.environ.get("GLOO_SOCKET_IFNAME")


def set_gloo_interface(name: str) -> None:
    """Let gloo use one network interface in this process, whatever the user chose."""
    os.environ["GLOO_SOCKET_IFNAME"] = name


def master_address() -> str:
    """Return the address of the machine that holds torchrun's store.

    Raises KeyError if MASTER_ADDR is not set.
    """
    return os.environ["MASTER_ADDR"]


def may_use_nccl2() -> bool:
    """Return whether torch's newer NCCL back end may be used: False if the user forbids it.

    TORCH_DIST_USE_NCCL2=0 forbids it.
    """
    return os.environ.get("TORCH_DIST_USE_NCCL2") != "0"


def can_share_gpu() -> bool:
    """Return whether the user lets several ranks of NCCL use the same GPU.

    NCCL_MULTI_RANK_GPU_ENABLE=1 lets them, and no other value does.
    """
    return os.environ.get(SHARED_GPU) == "1"


def available_cores() -> int:
    """Return how many cores this process may use, at least 1.

    It counts the process's affinity, not the limits of a control group.
    """
    return len(os.sched_getaffinity(0)) or os.cpu_count() or 1


def cgroup_value(name: str) -> float | None:
    """Return a value of this process's control group (version 2), or None if it has no such limit.

    name: a file of the group. `cpu.max` is in cores, `memory.max` and `memory.current` are in
    bytes. Limits of groups above it do not count. Never raises for a file that is missing or holds
    `max`.
    """
    try:
        line = Path("/proc/self/cgroup").read_text(encoding="ascii")
        group = line.rsplit(":", 1)[1].strip().lstrip("/")
        text = Path("/sys/fs/cgroup", group, name).read_text(encoding="ascii")
        numbers = [int(number) for number in text.split()]
    except (OSError, ValueError, IndexError):  # no such file, or the limit is `max`
        return None
    if not numbers:
        return None
    # `cpu.max` holds microseconds of computing and of the period.
    if len(numbers) == 2:
        return numbers[0] / numbers[1]
    return float(numbers[0])

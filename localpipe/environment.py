"""Environment variables, and the cores, the limits and the parent of this process.

Environment variables are read and set in this module only. It imports neither torch nor anything
else that is slow, because workers import it first.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

PRIVATE_DIR = "LOCALPIPE_PRIVATE_DIR"
PARENT = "LOCALPIPE_PARENT"
LOADER = "LOCALPIPE_LOADER"
LINK = "LOCALPIPE_LINK"
SPARE = "LOCALPIPE_SPARE"
COMPARE_REPLAY = "LOCALPIPE_COMPARE_REPLAY"
SHARED_GPU = "NCCL_MULTI_RANK_GPU_ENABLE"
_PR_SET_PDEATHSIG = 1
_NCCL_DEFAULTS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # a failed or lost operation does not end the process
    "TORCH_NCCL_ENABLE_MONITORING": "0",  # nor does a watchdog of torch that is held up
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",  # an error of the device is raised in the main thread
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_LOG_CPP_STACK_ON_UNCLEAN_SHUTDOWN": "0",
}
_CGROUP_MOUNT = Path("/sys/fs/cgroup")
_CGROUP_MEMBERSHIP = Path("/proc/self/cgroup")
# The limit and the use, in version 2 and in version 1, whose limit is huge where there is none.
_MEMORY_FILES = (
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)
_NO_MEMORY_LIMIT = 1 << 60


def under_torchrun() -> bool:
    """Return whether torchrun, or anything that sets the same variables, started this process.

    RANK and WORLD_SIZE count. In a worker of localpipe's own launcher it is False.
    """
    return not is_worker() and "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_worker() -> bool:
    """Return whether localpipe itself started this process, as a worker or to load data."""
    return PRIVATE_DIR in os.environ or LOADER in os.environ


def launcher_problem() -> str | None:
    """Return in one line what is wrong with the variables that torchrun sets, None for nothing.

    Call it where `under_torchrun` is True. A shell of a job, or the system that started it, may
    have left RANK and WORLD_SIZE in the environment.
    """
    here = "RANK and WORLD_SIZE are set, as torchrun sets them"
    advice = "unset RANK and WORLD_SIZE to start the workers here, or start with torchrun"
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        return f"{here}, without {' and '.join(missing)}; {advice}"
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        value = os.environ.get(name, "0")
        if not value.isdecimal():
            return f"{here}, but {name} is {value!r}, expected a number; {advice}"
    if int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        found = f"RANK={os.environ['RANK']} and WORLD_SIZE={os.environ['WORLD_SIZE']}"
        return f"{found} are set, expected a RANK below WORLD_SIZE; {advice}"
    return None


def foreign_launcher() -> str | None:
    """Return a note on RANK and WORLD_SIZE if something else than torchrun has set them, or None.

    Call it where `under_torchrun` is True and `launcher_problem` is None.
    """
    if torchrun_id():
        return None
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    found = ", ".join(f"{name}={os.environ[name]}" for name in names)
    return (
        f"note: {found} are set, so this process joins the workers there; "
        "unset RANK and WORLD_SIZE to start the workers here"
    )


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


def torchrun_id() -> str:
    """Return the name that torchrun gives to its job, the same on all nodes; "" without torchrun.

    It is `--rdzv-id`. Restarted workers keep it.
    """
    return os.environ.get("TORCHELASTIC_RUN_ID", "")


def store_outlives_workers() -> bool:
    """Return whether torchrun's agents hold the store, and not the worker of rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


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


def spare_environment(world: int, folder: Path) -> dict[str, str]:
    """Return the variables of a process that gets its rank later, in `wait_for_rank`."""
    return {**worker_environment(-1, world, folder), SPARE: "1"}


def is_spare() -> bool:
    """Return whether this process has no rank until `wait_for_rank`."""
    return SPARE in os.environ


def wait_for_rank() -> None:
    """Wait, as a spare process, for the rank that the launcher writes to the standard input.

    The process ends if the launcher has ended.
    """
    rank = sys.stdin.readline().strip()
    if not rank:
        os._exit(0)
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = rank


def compares_replay() -> bool:
    """Return whether messages that are computed again are compared with what was sent, in tests."""
    return os.environ.get(COMPARE_REPLAY) == "1"


def link_environment(interface: str) -> dict[str, str]:
    """Return the variables of a worker whose edges go over TCP, though all are on one machine.

    interface: the network interface that gloo listens on. A benchmark shapes its links.
    """
    return {LINK: "1", "GLOO_SOCKET_IFNAME": interface}


def uses_link() -> bool:
    """Return whether this worker's edges go over TCP, as `link_environment` says."""
    return LINK in os.environ


def child_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return a copy of this process's environment for a process that it starts and that is no rank.

    variables: set in the copy. This process becomes the parent in `die_with_parent`.
    """
    return {**os.environ, **variables, PARENT: str(os.getpid())}


def start_command(module: str) -> list[str]:
    """Return the command of a process that calls `main()` of a module, and dies with its parent.

    The modules of a script that trains, or of an installation of its own, are found there too.
    """
    script = Path(__file__).resolve().with_name("pipeline") / "launch" / "start.py"
    # An empty entry is the working directory, which user code is looked for in anyhow.
    folders = [folder for folder in sys.path if folder]
    return [sys.executable, str(script), module, *folders]


def loader_environment(handles: Sequence[int]) -> dict[str, str]:
    """Return a copy of this process's environment for a loader process that it starts.

    handles: the numbers of the open files that the process inherits. It has one thread, and sets of
    texts have the same order in all loader processes.
    """
    return {
        **os.environ,
        PARENT: str(os.getpid()),
        LOADER: ",".join(str(handle) for handle in handles),
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
    }


def loader_handles() -> list[int]:
    """Return the numbers of the open files that `loader_environment` was called with.

    Raises KeyError in a process that is no loader process.
    """
    return [int(handle) for handle in os.environ[LOADER].split(",")]


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


def leave_nccl_to_watchdogs() -> None:
    """Let localpipe's watchdogs alone end a process whose NCCL calls fail or hang.

    torch's watchdogs would end it first, with a page of addresses in place of the cause. What the
    user has set stays. Call it before the first group over NCCL is made.
    """
    for name, value in _NCCL_DEFAULTS.items():
        set_default(name, value)


def can_share_gpu() -> bool:
    """Return whether the user lets several ranks of NCCL use the same GPU.

    NCCL_MULTI_RANK_GPU_ENABLE=1 lets them, and no other value does.
    """
    return os.environ.get(SHARED_GPU) == "1"


def add_import_folder(folder: str) -> None:
    """Let modules of a folder be imported, after those of the standard library.

    So a file of a user that is named like a standard module, as random.py, hides it from nobody.
    Installed packages come after the folder. A folder that is in sys.path stays where it is.
    """
    if folder in sys.path:
        return
    place = len(sys.path)
    for index, entry in enumerate(sys.path):
        if os.path.basename(entry) in ("site-packages", "dist-packages"):
            place = index
            break
    sys.path.insert(place, folder)


def is_dumb_terminal() -> bool:
    """Return whether TERM names a terminal that can move no cursor."""
    return os.environ.get("TERM", "").lower() in ("dumb", "unknown")


def draw_without_display() -> None:
    """Let matplotlib draw into files in this process, whatever MPLBACKEND says.

    A notebook sets it to a back end that another Python may lack. Call it before matplotlib is
    imported, and in a process of our own alone.
    """
    os.environ["MPLBACKEND"] = "agg"


@contextlib.contextmanager
def interrupts_end_imports() -> Iterator[None]:
    """Within the context, let Ctrl-C end the process at once while a module is being imported.

    The status is 130. Elsewhere it raises KeyboardInterrupt as usual. An import may lose a
    KeyboardInterrupt, or end with a traceback of its own. A signal that was ignored stays ignored,
    and another handler stays too. Outside of the main thread it does nothing.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Handle Ctrl-C: end the process if the frame lies inside an import."""
    outer = frame
    while outer is not None:
        if outer.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(128 + number)
        outer = outer.f_back
    raise KeyboardInterrupt


def is_ignored(number: int) -> bool:
    """Return whether this process ignores a signal, as nohup and a shell's `&` make it do."""
    return signal.getsignal(number) is signal.SIG_IGN


def cache_folder() -> Path | None:
    """Return localpipe's folder in the user's cache folder, or None for a user without a home.

    It need not exist. XDG_CACHE_HOME is the cache folder, ~/.cache where it is no absolute path.
    """
    top = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(top):
        top = os.path.expanduser("~/.cache")
    if not os.path.isabs(top):
        return None
    return Path(top) / "localpipe"


# -- cores and memory, and the limits of the container ------------------------------------------


def available_cores() -> int:
    """Return how many cores this process may use at once, at least 1.

    It is the smaller of the process's affinity and of `cpu_quota`, rounded down.
    """
    cores = affinity_cores()
    quota = cpu_quota()
    if quota is None:
        return cores
    return max(1, min(cores, int(quota)))


def affinity_cores() -> int:
    """Return how many cores this process may be scheduled on, at least 1, without any quota."""
    return len(os.sched_getaffinity(0)) or os.cpu_count() or 1


def cpu_quota(mount: Path = _CGROUP_MOUNT, membership: Path = _CGROUP_MEMBERSHIP) -> float | None:
    """Return the cores whose time this process's control groups allow it, None without a limit.

    It is the smallest quota of its group and of all groups above, in version 1 (`cpu.cfs_quota_us`)
    and version 2 (`cpu.max`). docker --cpus sets one. mount: where the groups are mounted.
    membership: the file that names this process's groups. Never raises for a file that is missing
    or holds something else.
    """
    quotas = []
    for folder in _group_folders("cpu", mount, membership):
        # Microseconds of computing in a period, and of the period. A quota of -1 is none.
        first = _read_numbers(folder / "cpu.cfs_quota_us")
        second = _read_numbers(folder / "cpu.cfs_period_us")
        for numbers in (_read_numbers(folder / "cpu.max"), first + second):
            if len(numbers) == 2 and min(numbers) > 0:
                quotas.append(numbers[0] / numbers[1])
    return min(quotas, default=None)


def free_group_memory(
    mount: Path = _CGROUP_MOUNT, membership: Path = _CGROUP_MEMBERSHIP
) -> int | None:
    """Return the bytes that the memory limits of this process's control groups leave.

    The arguments are those of `cpu_quota`, and so are the groups that count. None without a limit.
    """
    free = []
    for folder in _group_folders("memory", mount, membership):
        for limit, used in _MEMORY_FILES:
            limits, uses = _read_numbers(folder / limit), _read_numbers(folder / used)
            if limits and uses and limits[0] < _NO_MEMORY_LIMIT:
                free.append(max(0, limits[0] - uses[0]))
    return min(free, default=None)


def _group_folders(controller: str, mount: Path, membership: Path) -> Iterator[Path]:
    """Yield the folders of this process's control groups and of all groups above them.

    A container may see the names that its groups have on the host, where no folder is. The top of
    the mount is its own group then, and is yielded in any case.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        # Version 2 has one line, `0::/path`. It may be mounted beside version 1.
        tops = [mount, mount / "unified"]
        if number != "0":
            if controller not in controllers.split(","):
                continue
            tops = [mount / controllers, mount / controller]
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for top in tops:
            for depth in range(len(parts) + 1):
                yield top.joinpath(*parts[:depth])


def _read_numbers(path: Path) -> list[int]:
    """Return the whole numbers of a file, [] without a file, for `max`, or for anything else."""
    try:
        return [int(word) for word in path.read_text(encoding="ascii").split()]
    except (OSError, ValueError):
        return []

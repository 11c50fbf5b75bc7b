"""Is this machine ready? Each check is one line, ok, warning or error, with what to do.

Two processes exchange messages over an edge as training has it, so the figures are those that a pipeline will see.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import ipaddress
import json
import os
import platform
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

import localpipe
from localpipe.doctor.check import Check, Status
from localpipe.doctor.ping import _MIB, _gloo_ping, _nccl_ping
from localpipe.environment import available_cores
from localpipe.errors import UserError
from localpipe.files import SCHEMA
from localpipe.runs.lock import acquire_lock

OLDEST_TORCH = (2, 11)


def doctor(quick: bool, as_json: bool, directory: Path) -> int:
    """Print what this machine has; return 1 where something is in the way, else 0."""
    if not directory.is_dir():
        raise UserError(
            f"doctor: {directory} is no directory; give the one that run directories will be in"
        )
    checks = tuple(examine(quick, directory))
    worst = max((check.status for check in checks), key=("ok", "warning", "error").index)
    if as_json:
        told = {
            "schema": SCHEMA,
            "localpipe": localpipe.__version__,
            "status": worst,
            "checks": checks,
        }
        print(json.dumps(told, default=asdict))
    else:
        _show(checks, worst)
    return int(worst == "error")


def examine(quick: bool, directory: Path) -> Iterable[Check]:
    """Make every check in turn; `quick` leaves out what takes seconds or disturbs a run beside it."""
    yield from (_tried(check) for check in (_versions, _torchvision, _cuda))
    if not quick:
        yield _tried(_gloo_ping)  # before CUDA is touched: its processes are forked
    devices = torch.cuda.device_count()
    if devices:
        yield from (_tried(check) for check in (_devices, _links, _nccl))
        if not quick:
            yield _tried(_nccl_ping)
    yield _tried(_cores)
    yield _tried(_threads)
    yield _tried(_memory)
    yield _shared_memory(shutil.disk_usage("/dev/shm").total, devices)
    yield _memlock(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], devices)
    yield _tried(_network)
    yield _tried(lambda: _disk(directory, 4 * _MIB if quick else 64 * _MIB))


def _tried(check: Callable[[], Check]) -> Check:
    """Make a check; what it raises is its finding."""
    try:
        return check()
    except Exception as error:
        name = getattr(check, "__name__", "").strip("_").replace("_", " ")
        line = (str(error) or repr(error)).splitlines()[0]
        return Check(
            "disk" if "lambda" in name else name, "error", line, "this should work on every machine"
        )


# -- software ---------------------------------------------------------------------------------------------------------


def _versions() -> Check:
    found = f"localpipe {localpipe.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    figures = {"torch": torch.__version__, "python": platform.python_version()}
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return Check(
            "versions",
            "error",
            found,
            f"pip install --upgrade 'torch>={oldest}' torchvision",
            figures,
        )
    return Check("versions", "ok", found, "", figures)


def _torchvision() -> Check:
    try:
        version = metadata.version("torchvision")
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError) as error:
        advice = "install the torchvision that belongs to this torch: pip install --upgrade torch torchvision"
        return Check("torchvision", "error", str(error).splitlines()[0], advice)
    return Check("torchvision", "ok", version, "", {"torchvision": version})


def _cuda() -> Check:
    """Compare the driver with the CUDA that torch was built for."""
    built, driver = torch.version.cuda, _driver()
    figures = {"built_for": built, "driver": driver, "devices": torch.cuda.device_count()}
    if figures["devices"]:
        return Check("CUDA", "ok", f"driver {driver}, torch built for CUDA {built}", "", figures)
    if driver is None:
        return Check("CUDA", "ok", "no NVIDIA driver; training runs on the CPU", "", figures)
    advice = (
        "install a torch built for CUDA"
        if built is None
        else "update the driver, or look at CUDA_VISIBLE_DEVICES"
    )
    found = f"driver {driver}, but torch (built for CUDA {built}) sees no device"
    return Check("CUDA", "warning", found, f"{advice}; in Docker, add --gpus all", figures)


def _driver() -> str | None:
    """Return the version of the kernel's NVIDIA driver, or None where there is none."""
    with contextlib.suppress(OSError):
        words = (
            Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0].split()
        )
        return next((word for word in words if word[0].isdigit() and "." in word), None)
    return None


def nccl_loaded() -> tuple[str, str | None]:
    """Return the version and the path of the NCCL that is loaded, which may not be the one that torch was built with."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").split()
    path = next((word for word in maps if "libnccl" in word), None)
    built = ".".join(map(str, torch.cuda.nccl.version()))
    return (built if path is None else _nccl_version(ctypes.CDLL(path))), path


def _nccl() -> Check:
    built = ".".join(map(str, torch.cuda.nccl.version()))
    loaded, path = nccl_loaded()
    figures = {"built_with": built, "loaded": loaded, "library": path}
    if older(loaded, built):
        advice = (
            f"an older NCCL is first on the library path ({path}); remove it from LD_LIBRARY_PATH"
        )
        return Check(
            "NCCL", "warning", f"{loaded} is loaded, torch was built with {built}", advice, figures
        )
    return Check("NCCL", "ok", loaded, "", figures)


def older(version: str, other: str) -> bool:
    """Return whether a version is older than another one, by its first two numbers."""
    first, second = ([int(part) for part in each.split(".")[:2]] for each in (version, other))
    return first < second


def _nccl_version(library: Any) -> str:
    number = ctypes.c_int()
    library.ncclGetVersion(ctypes.byref(number))
    thousands = 10000 if number.value >= 10000 else 1000
    return f"{number.value // thousands}.{number.value % thousands // 100}.{number.value % 100}"


# -- devices ----------------------------------------------------------------------------------------------------------


def _devices() -> Check:
    found = [
        torch.cuda.get_device_properties(device) for device in range(torch.cuda.device_count())
    ]
    told = [
        f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}"
        for p in found
    ]
    figures = [
        {"name": p.name, "memory_bytes": p.total_memory, "capability": [p.major, p.minor]}
        for p in found
    ]
    built = [arch for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
    lines = "; ".join(f"{told.count(line)} x {line}" for line in dict.fromkeys(told))
    newest = max((int(arch[3:].rstrip("af")) for arch in built), default=0)
    if any(p.major * 10 + p.minor > newest for p in found):
        return Check(
            "devices",
            "warning",
            lines,
            "this torch has no kernels for them; take a newer one",
            {"list": figures},
        )
    return Check("devices", "ok", lines, "", {"list": figures})


def _links() -> Check:
    """See which devices reach each other's memory; between the others, messages go through the host."""
    count = torch.cuda.device_count()
    pairs = [(a, b) for a in range(count) for b in range(a + 1, count)]
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    figures = {"pairs": len(pairs), "without_peer_access": apart}
    if not pairs:
        return Check("links", "ok", "one device", "", figures)
    if apart:
        told = ", ".join(f"{a}-{b}" for a, b in apart[:8]) + (", ..." if len(apart) > 8 else "")
        advice = (
            "keep neighbouring stages on devices that have it; `nvidia-smi topo -m` shows the links"
        )
        return Check("links", "warning", f"no peer access between devices {told}", advice, figures)
    return Check("links", "ok", f"peer access between all {count} devices", "", figures)


# -- the machine ------------------------------------------------------------------------------------------------------


def _cores() -> Check:
    allowed, quota = available_cores(), _cgroup_number("cpu.max")
    figures = {"cores": allowed, "quota": quota}
    if quota is not None and quota < allowed:
        advice = f"set run.threads so that workers x threads is at most {max(1, int(quota))}"
        return Check(
            "cores",
            "warning",
            f"{allowed}, but the container may use {quota:g} at a time",
            advice,
            figures,
        )
    return Check("cores", "ok", str(allowed), "", figures)


def _threads() -> Check:
    names = (
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OMP_PROC_BIND",
        "KMP_AFFINITY",
        "GOMP_CPU_AFFINITY",
    )
    given = {name: os.environ[name] for name in names if name in os.environ}
    told = ", ".join(f"{name}={value}" for name, value in given.items()) or "no variable set"
    found = f"torch takes {torch.get_num_threads()}; {told}"
    figures = {"torch": torch.get_num_threads(), "environment": given}
    bound = [
        name
        for name in names[2:]
        if given.get(name, "false").lower() not in ("false", "none", "disabled")
    ]
    if bound:
        advice = f"unset {' '.join(bound)}: it ties the threads of all workers to the same cores"
        return Check("threads", "warning", found, advice, figures)
    return Check("threads", "ok", f"{found}; a worker's own number is run.threads", "", figures)


def _memory() -> Check:
    free, limit = psutil.virtual_memory().available, _cgroup_number("memory.max")
    used = _cgroup_number("memory.current")
    if limit is not None and used is not None:
        free = min(free, int(limit - used))
    figures = {"free_bytes": free}
    if free < 2 << 30:
        advice = "every worker takes about 0.5 GiB before its first step; end something, or use fewer processes"
        return Check("memory", "warning", f"{free / 2**30:.1f} GiB free", advice, figures)
    return Check("memory", "ok", f"{free / 2**30:.1f} GiB free", "", figures)


def _cgroup_number(name: str) -> float | None:
    """Return a limit of this process's control group (version 2), cores or bytes; None where there is none."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        own = Path("/proc/self/cgroup").read_text(encoding="ascii").rsplit(":", 1)[1].strip()
        words = (
            (Path("/sys/fs/cgroup") / own.lstrip("/") / name).read_text(encoding="ascii").split()
        )
        return int(words[0]) / int(words[1]) if len(words) == 2 else float(int(words[0]))
    return None


def _shared_memory(total: int, devices: int) -> Check:
    found, figures = f"/dev/shm has {total / _MIB:.0f} MiB", {"total_bytes": total}
    if devices and total < 1 << 30:
        advice = "NCCL passes messages there; in Docker give --shm-size=1g (or --ipc=host)"
        return Check("shared memory", "warning", found, advice, figures)
    return Check("shared memory", "ok", found, "", figures)


def _memlock(limit: int, devices: int) -> Check:
    unlimited = limit == resource.RLIM_INFINITY
    found = "unlimited" if unlimited else f"{limit / _MIB:.0f} MiB"
    figures = {"limit_bytes": None if unlimited else limit}
    if devices and not unlimited:
        advice = "InfiniBand and GPUDirect pin memory: ulimit -l unlimited; in Docker give --ulimit memlock=-1"
        return Check("locked memory", "warning", found, advice, figures)
    return Check("locked memory", "ok", found, "", figures)


def _network() -> Check:
    """Look at what edges between machines will use. On one machine they use the loopback, whatever is found here."""
    addresses = {
        name: [
            entry.address for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)
        ]
        for name, entries in psutil.net_if_addrs().items()
    }
    asked = os.environ.get("GLOO_SOCKET_IFNAME")
    figures = {"interfaces": addresses, "GLOO_SOCKET_IFNAME": asked}
    outward = [
        name for name, own in addresses.items() if any(not _is_loopback(address) for address in own)
    ]
    found = f"interfaces {', '.join(outward) or 'none but the loopback'}"
    if asked is not None and asked not in addresses:
        advice = f"there is no interface {asked}; unset GLOO_SOCKET_IFNAME, or name one of {', '.join(addresses)}"
        return Check("network", "error", f"GLOO_SOCKET_IFNAME={asked}", advice, figures)
    return Check("network", "ok", found, "", figures)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _disk(directory: Path, nbytes: int) -> Check:
    """Write a file as a checkpoint is written, fsync included, and take a lock as a run does."""
    try:
        with tempfile.TemporaryDirectory(dir=directory, prefix=".localpipe-doctor-") as folder:
            block = memoryview(os.urandom(nbytes))
            began = time.perf_counter()
            with open(Path(folder, "block"), "wb") as file:
                file.write(block)
                file.flush()
                os.fsync(file.fileno())
            speed = nbytes / (time.perf_counter() - began)
            acquire_lock(Path(folder), 0).close()
    except (OSError, UserError) as error:
        advice = "run `localpipe doctor --dir DIR` for the directory that will hold run.dir"
        return Check("disk", "error", f"{directory.resolve()}: {error}", advice)
    free = shutil.disk_usage(directory).free
    found = (
        f"{directory.resolve()}: {speed / _MIB:.0f} MiB/s with fsync, {free / 2**30:.0f} GiB free"
    )
    figures = {"write_bytes_per_s": speed, "free_bytes": free}
    if free < 5 << 30:
        return Check(
            "disk",
            "warning",
            found,
            "checkpoints fill it; lower run.keep_checkpoints or clear it",
            figures,
        )
    if speed < 20 * _MIB:
        return Check(
            "disk",
            "warning",
            found,
            "raise run.checkpoint_every_s: stages write while they wait",
            figures,
        )
    return Check("disk", "ok", found, "", figures)


# -- the report -------------------------------------------------------------------------------------------------------


def _show(checks: Iterable[Check], worst: Status) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "warning": "yellow", "error": "bold red"}
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        told = Text(check.found)
        if check.advice:
            told.append(f"\n{check.advice}", style="italic")
        table.add_row(Text(check.status, style=colours[check.status]), check.name, told)
    Console().print(table)
    ends = {
        "ok": "ready",
        "warning": "ready; the warnings cost speed or may matter later",
        "error": "not ready",
    }
    print(ends[worst])

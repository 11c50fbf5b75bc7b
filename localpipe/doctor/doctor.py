"""The command `localpipe doctor`: checks whether this machine is ready to train.

Each check gives one line, ok, warning or error, with advice. Two processes exchange messages over
the channels of training, so their figures are those that a pipeline gets.
"""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

import localpipe
from localpipe.doctor.check import MIB, Check
from localpipe.doctor.cores import check_cores, check_threads
from localpipe.doctor.devices import check_cuda, check_devices, check_links
from localpipe.doctor.disk import check_disk
from localpipe.doctor.memory import check_locked_memory, check_memory, check_shared_memory
from localpipe.doctor.nccl import check_nccl
from localpipe.doctor.network import check_network
from localpipe.doctor.ping import ping_gloo, ping_nccl
from localpipe.doctor.report import print_report
from localpipe.doctor.versions import check_torchvision, check_versions
from localpipe.errors import UserError, first_line
from localpipe.files import SCHEMA
from localpipe.pipeline.workers.device import emulated_key, gpu_name


def doctor(quick: bool, as_json: bool, directory: Path) -> int:
    """Print the result of every check, and return 1 if one is an error, else 0.

    quick: see `check_machine`. as_json: one line with `schema`, `localpipe`, `status` (the worst
    one) and `checks`, instead of a table. directory: the one that run directories will be in.
    Raises UserError if there is none. A check that fails raises nothing.
    """
    if not directory.is_dir():
        raise UserError(
            f"doctor: {directory} is no directory; give the one that run directories will be in"
        )
    checks = list(check_machine(quick, directory))
    worst = max((check.status for check in checks), key=("ok", "warning", "error").index)
    if as_json:
        report = {
            "schema": SCHEMA,
            "localpipe": localpipe.__version__,
            "status": worst,
            **emulated_key(_find_gpu_name()),
            "checks": checks,
        }
        print(json.dumps(report, default=asdict))
    else:
        print_report(checks, worst)
    return int(worst == "error")


def check_machine(quick: bool, directory: Path) -> Iterator[Check]:
    """Yield the result of every check in turn. Each check is made when it is requested.

    `quick` leaves out the two pings, and writes 4 MiB instead of 64 MiB into `directory`. The
    checks of devices come only where torch sees one.
    """
    yield run_check("versions", check_versions)
    yield run_check("torchvision", check_torchvision)
    yield run_check("CUDA", check_cuda)

    # This ping forks its processes, so it comes before CUDA is initialised.
    if not quick:
        yield run_check("gloo ping", ping_gloo)

    devices = torch.cuda.device_count()
    if devices:
        yield run_check("devices", check_devices)
        yield run_check("links", check_links)
        yield run_check("NCCL", check_nccl)
        if not quick:
            yield run_check("NCCL ping", ping_nccl)

    yield run_check("cores", check_cores)
    yield run_check("threads", check_threads)
    yield run_check("memory", check_memory)
    yield run_check("shared memory", check_shared_memory, _count_shared_bytes(), devices)
    locked_bytes, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    yield run_check("locked memory", check_locked_memory, locked_bytes, devices)
    yield run_check("network", check_network)
    block_bytes = 64 * MIB
    if quick:
        block_bytes = 4 * MIB
    yield run_check("disk", check_disk, directory, block_bytes)


def _find_gpu_name() -> str | None:
    if not torch.cuda.device_count():
        return None
    return gpu_name("cuda")


def _count_shared_bytes() -> int:
    """Return the size of /dev/shm, 0 without one."""
    try:
        return shutil.disk_usage("/dev/shm").total
    except OSError:
        return 0


def run_check(name: str, check: Callable[..., Check], *arguments: object) -> Check:
    """Return the result of `check(*arguments)`.

    If it raises an exception, the result has the status `error`, this name, and the first line of
    the exception. `name` is not used otherwise.
    """
    try:
        return check(*arguments)
    except Exception as error:
        advice = "this should work on every machine"
        return Check(name, "error", first_line(error), advice)

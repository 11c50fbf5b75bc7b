"""Checks of free memory, shared memory (/dev/shm) and locked memory (ulimit -l)."""

from __future__ import annotations

import resource

import psutil

from localpipe.doctor.check import GIB, MIB, Check
from localpipe.environment import free_group_memory


def check_memory() -> Check:
    """Check that the machine and the container have memory for a few workers.

    Free memory is the smaller of what the machine has available and what the container's limit
    leaves. A warning below 2 GiB, never an error. figures: `free_bytes`.
    """
    free_bytes = psutil.virtual_memory().available
    left_bytes = free_group_memory()
    if left_bytes is not None:
        free_bytes = min(free_bytes, left_bytes)
    text = f"{free_bytes / GIB:.1f} GiB free"
    figures = {"free_bytes": free_bytes}
    if free_bytes < 2 * GIB:
        advice = (
            "every worker takes about 0.5 GiB before its first step; "
            "end something, or use fewer processes"
        )
        return Check("memory", "warning", text, advice, figures)
    return Check("memory", "ok", text, "", figures)


def check_shared_memory(total_bytes: int, devices: int) -> Check:
    """Check that /dev/shm, of `total_bytes`, is large enough for NCCL.

    devices: their number. A warning below 1 GiB with devices. Without devices any size is ok.
    figures: `total_bytes`.
    """
    text = f"/dev/shm has {total_bytes / MIB:.0f} MiB"
    if not total_bytes:
        text = "there is no /dev/shm, or it holds nothing; gloo carries the edges"
    figures = {"total_bytes": total_bytes}
    if devices and total_bytes < GIB:
        advice = "NCCL passes messages there; in Docker give --shm-size=1g (or --ipc=host)"
        return Check("shared memory", "warning", text, advice, figures)
    return Check("shared memory", "ok", text, "", figures)


def check_locked_memory(limit_bytes: int, devices: int) -> Check:
    """Check that memory can be pinned without a limit.

    limit_bytes: as RLIMIT_MEMLOCK has it. devices: their number. A warning for any limit with
    devices. Without devices every limit is ok. figures: `limit_bytes`, None for unlimited.
    """
    if limit_bytes == resource.RLIM_INFINITY:
        return Check("locked memory", "ok", "unlimited", "", {"limit_bytes": None})
    text = f"{limit_bytes / MIB:.0f} MiB"
    figures = {"limit_bytes": limit_bytes}
    if devices:
        advice = (
            "InfiniBand and GPUDirect pin memory: ulimit -l unlimited; "
            "in Docker give --ulimit memlock=-1"
        )
        return Check("locked memory", "warning", text, advice, figures)
    return Check("locked memory", "ok", text, "", figures)

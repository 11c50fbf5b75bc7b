"""The check of the file system that run directories will be in."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

from localpipe.doctor.check import GIB, MIB, Check
from localpipe.errors import UserError
from localpipe.files import write_whole
from localpipe.runs.lock import acquire_lock


def check_disk(directory: Path, nbytes: int) -> Check:
    """Write a file of `nbytes` as a checkpoint is written, and take the lock of a run directory.

    directory: it must exist. What is written is removed. An error if writing or locking fails. A
    warning below 5 GiB free or 20 MiB/s. nbytes: above 0. figures: `write_bytes_per_s` and
    `free_bytes`, empty after an error.
    """
    try:
        speed = _measure_write(directory, nbytes)
    except (OSError, UserError) as error:
        advice = "run `localpipe doctor --dir DIR` for the directory that will hold run.dir"
        return Check("disk", "error", f"{directory.resolve()}: {error}", advice)

    free_bytes = shutil.disk_usage(directory).free
    rate, free = f"{speed / MIB:.0f} MiB/s with fsync", f"{free_bytes / GIB:.0f} GiB free"
    text = f"{directory.resolve()}: {rate}, {free}"
    figures = {"write_bytes_per_s": speed, "free_bytes": free_bytes}
    if free_bytes < 5 * GIB:
        advice = "checkpoints fill it; lower run.keep_checkpoints or clear it"
        return Check("disk", "warning", text, advice, figures)
    if speed < 20 * MIB:
        advice = "raise run.checkpoint_every_s: stages write while they wait"
        return Check("disk", "warning", text, advice, figures)
    return Check("disk", "ok", text, "", figures)


def _measure_write(directory: Path, nbytes: int) -> float:
    """Return the bytes a second of a write with fsync; raise an error if there is no lock."""
    block = memoryview(os.urandom(nbytes))
    with tempfile.TemporaryDirectory(dir=directory, prefix=".localpipe-doctor-") as folder:
        start = time.perf_counter()
        write_whole(Path(folder, "block"), block)
        duration = time.perf_counter() - start
        acquire_lock(Path(folder), 0).close()
    return nbytes / duration

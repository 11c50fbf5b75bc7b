"""The lock of a run directory, held by every process of a run and given back by the kernel when the last one ends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

import psutil

from localpipe.errors import RunError, UserError

WAIT_S = 30.0
_SEEN_S = 10.0  # until what one machine wrote is surely seen by another on a shared file system


def acquire_lock(run_dir: Path, wait_s: float = WAIT_S) -> IO[str]:
    """Take a run directory for a new run; after `wait_s`, raise UserError naming the process that holds it."""
    path = run_dir / "lock"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held until the process ends
    except OSError as error:
        raise UserError(
            f"run: cannot use run.dir {run_dir}: {error.strerror}; choose another run.dir"
        ) from None
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UserError(
                    f"run: {run_dir} is in use by {_holder(path)}; wait for it, stop it, or choose another run.dir"
                ) from None
            time.sleep(0.2)
        except OSError as error:
            raise UserError(
                f"run: the file system of {run_dir} keeps no locks: {error.strerror}; mount it with them (Lustre: flock), "
                "or choose another run.dir"
            ) from None
    file.truncate(0)
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}))
    file.flush()
    os.fsync(file.fileno())  # other machines read it
    _share_or_refuse(file, run_dir, path)
    return file


def _share_or_refuse(file: IO[str], run_dir: Path, path: Path) -> None:
    """Let the workers hold the lock too. The kernel lets go for a moment, in which another run may have come first."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"run: {run_dir} is in use by {_holder(path)}; choose another run.dir"
        ) from None


def read_holder(run_dir: Path) -> str:
    """Return what the process that took the lock wrote into it."""
    return (run_dir / "lock").read_text(encoding="utf-8")


def hold_shared(run_dir: Path, expected: str | None = None) -> IO[str]:
    """Hold the lock of a run that has begun, as one of its workers; `expected` is what the lock tells on rank 0.

    Raises RunError where this machine sees another directory, or none.
    """
    deadline = time.monotonic() + _SEEN_S
    while True:
        with contextlib.suppress(FileNotFoundError):
            file = open(run_dir / "lock", encoding="utf-8")  # noqa: SIM115 - held until the process ends
            fcntl.flock(file, fcntl.LOCK_SH)
            if expected is None or file.read() == expected:
                return file
            file.close()
        if time.monotonic() > deadline:
            raise RunError(
                f"run: {run_dir.resolve()} on {socket.gethostname()} is not the run directory of rank 0; "
                "give a run.dir on a file system that all nodes share"
            )
        time.sleep(0.2)


def _holder(path: Path) -> str:
    """Name a process that holds the lock: the kernel's table first, since the launcher may be gone before its workers."""
    stat = path.stat()
    try:
        table = Path("/proc/locks").read_text(encoding="ascii").splitlines()
        held = [line.split() for line in table if "->" not in line]
        device = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"
        pids = [int(words[4]) for words in held if words[1] == "FLOCK" and words[5] == device]
        names = {
            pid: psutil.Process(pid).name() for pid in pids if pid > 0 and psutil.pid_exists(pid)
        }
        if names:
            return ", ".join(f"process {pid} ({name})" for pid, name in sorted(names.items()))
    except (OSError, psutil.Error, IndexError, ValueError):
        pass
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return f"process {told['pid']} on {told['host']}"
    except (OSError, ValueError, KeyError):
        return "another process"

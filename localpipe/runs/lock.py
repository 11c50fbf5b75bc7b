"""The lock of a run directory. Every process of a run holds it, so it ends with the last one."""

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

from localpipe.errors import UserError
from localpipe.files import advise_on_write

LOCK_FILE = "lock"
WAIT_S = 30.0
_TICK_S = 0.2
# After this time a file that one machine wrote is visible to another on a shared file system.
_VISIBLE_S = 10.0


def acquire_lock(run_dir: Path, wait_s: float = WAIT_S) -> IO[str]:
    """Take a run directory for a new run, and return the open file that holds the lock.

    Makes the directory. The lock ends when this file and those of `share_lock` are closed. Raises
    UserError, naming the holder, if the lock is not free within `wait_s` seconds. This process may
    be the holder. Raises UserError too if the directory cannot be used or keeps no locks, and
    OSError if the disk is full.
    """
    path = run_dir / LOCK_FILE
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - open until the process ends
    except OSError as error:
        raise UserError(
            f"run: cannot use run.dir {run_dir}: {error.strerror}; "
            f"{advise_on_write(error, 'run.dir')}"
        ) from None
    _wait_for_lock(file, path, wait_s)

    # Other processes and machines read who took it.
    file.truncate(0)
    file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}))
    file.flush()
    os.fsync(file.fileno())

    # The workers share the lock. The kernel frees it for a moment when it becomes a shared one,
    # and another run may take it then.
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"run: {run_dir} is in use by {_describe_holder(path)}; choose another run.dir"
        ) from None
    return file


def _wait_for_lock(file: IO[str], path: Path, wait_s: float) -> None:
    """Lock a file exclusively; raise UserError after `wait_s`, or without support for locks."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise UserError(
                    f"run: {path.parent} is in use by {_describe_holder(path)}; "
                    "wait for it, stop it, or choose another run.dir"
                ) from None
            time.sleep(_TICK_S)
        except OSError as error:
            raise UserError(
                f"run: the file system of {path.parent} keeps no locks: {error.strerror}; "
                "mount it with them (Lustre: flock), or choose another run.dir"
            ) from None


def read_lock(run_dir: Path) -> str:
    """Return what the process that took the lock wrote into it: JSON with pid, host and time.

    Raises OSError if there is no lock file. It does not say whether the lock is still held.
    """
    return (run_dir / LOCK_FILE).read_text(encoding="utf-8")


def share_lock(run_dir: Path, expected: str | None = None) -> IO[str]:
    """Share the lock of a run that has begun, as one of its workers, and return the open file.

    The share ends when the file is closed. expected: the content of the lock on rank 0, or None for
    any content. Waits while another process has the lock alone. Raises UserError if there is no
    such lock file within 10 s, as on a machine that sees another directory.
    """
    deadline = time.monotonic() + _VISIBLE_S
    while True:
        with contextlib.suppress(FileNotFoundError):
            file = open(run_dir / LOCK_FILE, encoding="utf-8")  # noqa: SIM115 - as above
            fcntl.flock(file, fcntl.LOCK_SH)
            if expected is None or file.read() == expected:
                return file
            file.close()
        if time.monotonic() > deadline:
            raise UserError(
                f"run: {run_dir.resolve()} on {socket.gethostname()} is not the run directory of "
                "rank 0; give a run.dir on a file system that all nodes share"
            )
        time.sleep(_TICK_S)


def _describe_holder(path: Path) -> str:
    """Name the processes that hold a lock.

    The kernel's table comes first, because the launcher may have ended before its workers.
    """
    try:
        names = {pid: psutil.Process(pid).name() for pid in _read_holders(path)}
    except (OSError, psutil.Error, IndexError, ValueError):
        names = {}
    if names:
        return ", ".join(f"process {pid} ({name})" for pid, name in sorted(names.items()))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return f"process {content['pid']} on {content['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _read_holders(path: Path) -> list[int]:
    """Return the living processes that hold a lock, by the kernel's table."""
    stat = path.stat()
    device = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"
    pids = []
    for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
        if "->" in line:  # a process that waits for the lock
            continue
        words = line.split()
        if words[1] != "FLOCK" or words[5] != device:
            continue
        pid = int(words[4])
        if pid > 0 and psutil.pid_exists(pid):
            pids.append(pid)
    return pids

"""The lock of a run directory, held across processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from localpipe.errors import UserError
from localpipe.runs.lock import _describe_holder, acquire_lock
from tests import ROOT

PATIENCE_S = 60  # for what must happen
GRACE_S = 0.5  # for what must not
HOLDER = (
    "import sys; from pathlib import Path; from localpipe.runs import lock; "
    "held = lock.{}(Path(sys.argv[1])); print(1)"
)


@contextmanager
def holder(run_dir: Path, how: str = "acquire_lock") -> Iterator[subprocess.Popen[str]]:
    """Run a process that holds the lock until its standard input ends."""
    command = [
        sys.executable,
        "-c",
        f"{HOLDER.format(how)}; sys.stdout.flush(); sys.stdin.read()",
        str(run_dir),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        guard = threading.Timer(
            PATIENCE_S, process.kill
        )  # one that never gets the lock says nothing
        guard.start()
        try:
            assert process.stdout is not None and process.stdout.readline() == "1\n"
            guard.cancel()
            yield process
        finally:
            process.kill()


def end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait(PATIENCE_S)


def test_second_run_is_refused_with_the_process_that_holds_the_lock(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        with pytest.raises(UserError) as caught:
            acquire_lock(tmp_path, wait_s=0.1)
        text = str(caught.value)
        assert text.startswith(f"run: {tmp_path} is in use by process {process.pid} ")
        assert "choose another run.dir" in text and "\n" not in text


def test_second_run_waits_for_the_first_to_end(tmp_path: Path) -> None:
    taken = threading.Event()

    def wait() -> None:
        with acquire_lock(tmp_path, wait_s=PATIENCE_S):
            taken.set()

    with holder(tmp_path) as process:
        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        time.sleep(GRACE_S)
        assert not taken.is_set() and waiting.is_alive()
        end(process)
        assert taken.wait(PATIENCE_S)
        waiting.join(PATIENCE_S)


def test_lock_of_a_run_that_was_killed_is_free(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE_S)
        acquire_lock(tmp_path, wait_s=0).close()


def test_lock_that_is_closed_is_free_within_the_same_process(tmp_path: Path) -> None:
    acquire_lock(tmp_path, wait_s=0).close()
    held = acquire_lock(tmp_path, wait_s=0)
    with pytest.raises(UserError, match="is in use by"):
        acquire_lock(tmp_path, wait_s=0)
    held.close()


def test_run_is_in_use_as_long_as_any_of_its_workers_lives(tmp_path: Path) -> None:
    with (
        holder(tmp_path) as launcher,
        holder(tmp_path, "share_lock") as first,
        holder(tmp_path, "share_lock") as second,
    ):
        for ended in (launcher, first):
            end(ended)
            with pytest.raises(UserError, match="is in use by"):
                acquire_lock(tmp_path, wait_s=0)
        end(second)
        acquire_lock(tmp_path, wait_s=0).close()


def test_holder_that_the_kernel_does_not_tell_is_read_from_the_lock(tmp_path: Path) -> None:
    acquire_lock(tmp_path, wait_s=0).close()
    assert _describe_holder(tmp_path / "lock") == f"process {os.getpid()} on {socket.gethostname()}"
    (tmp_path / "lock").write_text("")
    assert _describe_holder(tmp_path / "lock") == "another process"


def test_lock_makes_the_run_directory(tmp_path: Path) -> None:
    with acquire_lock(tmp_path / "runs" / "new", wait_s=0):
        assert (tmp_path / "runs" / "new" / "lock").exists()


def test_run_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match="run: cannot use run.dir .*file: .*; choose another run.dir"
    ):
        acquire_lock(tmp_path / "file", wait_s=0)

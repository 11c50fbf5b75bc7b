"""One rank: what it gets from its launcher, and that nothing of it outlives its end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from localpipe.config.load import to_dict
from localpipe.pipeline.launch import launcher
from localpipe.pipeline.launch.job import Job
from localpipe.pipeline.launch.launcher import Workers
from localpipe.pipeline.launch.rank import kill_ranks, start_rank
from tests.harness import settings

ENOUGH_S = 60.0  # for what must happen
WORKER = """
import json, os, subprocess, sys, time

def main():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCALPIPE_PRIVATE_DIR", "LOCALPIPE_PARENT")
    values = [os.environ[name] for name in names]
    folder = os.environ["LOCALPIPE_PRIVATE_DIR"]
    with open(os.path.join(folder, "part"), "w") as file:
        json.dump([*values, child.pid], file)
    os.rename(os.path.join(folder, "part"), os.path.join(folder, "started"))
    time.sleep(600)
"""
FAILS = """
import sys

def main():
    print("no more", file=sys.stderr)
    return 3
"""


def write_module(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a module that the processes started here find."""
    (folder / f"{name}.py").write_text(text)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)


def wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + ENOUGH_S
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_rank_has_its_environment_and_session_and_is_killed_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_module(tmp_path, "sleeping_worker", WORKER, monkeypatch)
    process = start_rank("sleeping_worker", 1, 3, tmp_path)
    try:
        deadline = time.monotonic() + ENOUGH_S
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        words = (tmp_path / "started").read_text().strip("[]").replace('"', "").split(", ")
        *values, child = words
        assert values == ["1", "1", "3", str(tmp_path), str(os.getpid())]
        assert os.getsid(process.pid) == process.pid  # the terminal's Ctrl-C does not reach it
    finally:
        kill_ranks([process])
    assert process.poll() == -signal.SIGKILL
    assert wait_until_gone(int(child))


def test_a_rank_that_fails_has_its_status_and_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_module(tmp_path, "failing_worker", FAILS, monkeypatch)
    with open(tmp_path / "stderr", "wb") as stderr:
        process = start_rank("failing_worker", 0, 1, tmp_path, stderr)
    assert process.wait(ENOUGH_S) == 3
    kill_ranks([process])  # it has ended: nothing is killed
    assert process.poll() == 3 and (tmp_path / "stderr").read_text() == "no more\n"


@pytest.fixture
def handlers() -> Iterator[list[object]]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before: list[object] = [signal.getsignal(number) for number in numbers]
    yield before
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.usefixtures("handlers")
def test_a_signal_during_the_start_ends_it_at_once_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    started: list[subprocess.Popen[bytes]] = []

    def start_and_signal(
        module: str, rank: int, world: int, folder: Path
    ) -> subprocess.Popen[bytes]:
        process = start_rank(module, rank, world, folder)
        started.append(process)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(launcher, "start_rank", start_and_signal)
    config = settings(tmp_path / "run", pipeline={"processes": 2})
    job = Job(to_dict(config), to_dict(config), 0, 0.0, time.time())
    with pytest.raises(KeyboardInterrupt):
        Workers(config, job, "localpipe.runs.train_worker")
    (process,) = started
    assert process.poll() == -signal.SIGKILL
    assert list(tmp_path.glob("localpipe-launch-*")) == []

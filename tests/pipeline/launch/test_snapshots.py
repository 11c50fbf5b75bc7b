"""Snapshots of a worker: when they are written, and what is noted of the one that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from localpipe.config.resolved import Resolved
from localpipe.environment import PRIVATE_DIR
from localpipe.errors import RunError
from localpipe.pipeline.launch import snapshots
from localpipe.pipeline.launch.snapshots import SnapshotKeeper, WorkerSnapshot, read_snapshot
from localpipe.pipeline.workers.loop import Worker
from localpipe.pipeline.workers.mesh import Mesh
from localpipe.pipeline.workers.persistent_edges import PersistentEdges
from tests.harness import settings
from tests.pipeline.workers.test_going_on import start

INTERVAL = 4


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Resolved:
    monkeypatch.setenv(PRIVATE_DIR, str(tmp_path))
    return settings(
        tmp_path / "run",
        pipeline={"stages": 2, "processes": 1, "replay": 2 * INTERVAL},
        optim={"epochs": 1},
        run={"recover": "stage"},
    )


def begin(config: Resolved, folder: Path, past: WorkerSnapshot | None) -> Worker:
    """Return a worker of all stages, which goes on after a snapshot."""
    mesh = Mesh(0, 1, dist.HashStore(), local=True)
    handled = 0 if past is None else past.handled
    edges = PersistentEdges(mesh, config, torch.device("cpu"), folder, handled)
    runners = start(config, handled)
    timer = runners[0].context.timer
    if past is not None:
        past.restore(runners, timer)
    return Worker(runners, timer, SnapshotKeeper(mesh, config, runners, edges, past))


def note(folder: Path, key: str) -> dict[str, Any] | None:
    path = folder / f"note_{key}_0"
    return json.loads(path.read_text()) if path.exists() else None


def test_the_first_snapshot_comes_before_the_first_message(
    tmp_path: Path, config: Resolved
) -> None:
    begin(config, tmp_path, None)
    past = read_snapshot(tmp_path, 0)
    assert past is not None and (past.handled, past.step) == (0, 0)


def list_snapshots(config: Resolved, tmp_path: Path) -> list[int]:
    """Run a worker; return what the newest snapshot covers after every message."""
    written: list[int] = []
    worker = begin(config, tmp_path, None)

    def count(is_last: bool) -> None:
        assert isinstance(keeper, SnapshotKeeper)
        keeper.count_message(is_last)
        past = read_snapshot(tmp_path, 0)
        assert past is not None
        written.append(past.handled)

    keeper = worker.counter
    assert isinstance(keeper, SnapshotKeeper)
    worker.counter = type("Counter", (), {"count_message": staticmethod(count)})()
    worker.run()
    return written


def test_a_snapshot_follows_every_half_of_the_replay(tmp_path: Path, config: Resolved) -> None:
    written = list_snapshots(config, tmp_path)
    assert written[: 2 * INTERVAL] == [0] * (INTERVAL - 1) + [INTERVAL] * INTERVAL + [2 * INTERVAL]

    # There is none after the last message, from which nobody could go on.
    total = len(written)
    pipeline = config.pipeline.model_copy(update={"replay": 2 * total})
    config = config.model_copy(update={"pipeline": pipeline})
    assert list_snapshots(config, tmp_path) == [0] * total


@pytest.mark.parametrize("lost", [None, INTERVAL, INTERVAL + 3, "all"])
def test_a_worker_that_goes_on_notes_when_it_has_caught_up(
    tmp_path: Path, config: Resolved, monkeypatch: pytest.MonkeyPatch, lost: Any
) -> None:
    """Also where its predecessor had handled the last message, with Flag.STOP."""
    first = begin(config, tmp_path, None)
    for _ in range(INTERVAL):
        for runner in first.runners:
            runner.turn()
        assert first.counter is not None
        first.counter.count_message(is_last=False)
    past = read_snapshot(tmp_path, 0)
    assert past is not None and past.handled == INTERVAL
    (tmp_path / "note_caught_up_0").unlink()

    # Six steps, two evaluations of one message each and the stop, or so.
    messages = INTERVAL if lost is None else lost
    if lost == "all":
        counted = begin(config, tmp_path, past)
        messages = INTERVAL
        more = True
        while more:
            messages += 1
            for runner in counted.runners:
                more = runner.turn()
        (tmp_path / "note_caught_up_0").unlink()
    monkeypatch.setattr(PersistentEdges, "lost", messages)
    second = begin(config, tmp_path, past)
    assert note(tmp_path, "ready") is not None
    assert (note(tmp_path, "caught_up") is not None) == (messages == INTERVAL)
    second.run()
    caught_up = note(tmp_path, "caught_up")
    assert caught_up is not None
    assert caught_up["steps"] == min(messages - INTERVAL, 6 - INTERVAL)
    assert caught_up["step"] == INTERVAL + caught_up["steps"]


def test_a_snapshot_without_room_ends_the_run_with_its_bytes(
    tmp_path: Path, config: Resolved, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshots, "write_whole", fail)
    with pytest.raises(RunError, match=r"a snapshot of \d+ bytes into shared memory: No space"):
        begin(config, tmp_path, None)

"""Workers that torchrun starts again go on. tests/torture/restarts.py does it at random moments."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from localpipe.errors import RunError
from localpipe.pipeline.workers.mesh import Mesh
from localpipe.runs import train_worker
from tests.torture.kills import Started, checkpoints, differences
from tests.torture.restarts import Agents

# 24 steps, a checkpoint after every one
SHORT: dict[str, Any] = {"optim__epochs": 3, "run__checkpoint_every_s": 0}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("restarts") / "undisturbed"
    with Started(run_dir, **SHORT) as started:
        assert started.wait() == 0, started.err
    return run_dir


@pytest.mark.parametrize(("launcher", "victim"), [("one", 1), ("c10d", 3)])
def test_torchrun_starts_killed_workers_again_and_the_run_ends_undisturbed(
    undisturbed: Path, tmp_path: Path, launcher: str, victim: int
) -> None:
    run_dir = tmp_path / "run"
    with Agents(run_dir, launcher, restarts=1, **SHORT) as started:
        assert started.until(lambda: len(checkpoints(run_dir)) > 0), started.said
        started.workers()[victim].kill()
        statuses = started.wait(180)
        assert not any(statuses), started.said
        assert "resuming" in started.said
    assert differences(run_dir, undisturbed) == []


def test_a_worker_of_another_node_does_not_end_before_the_summary_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train_worker, "_SUMMARY_S", 0.2)
    mesh = Mesh(1, 2, dist.HashStore(), local=False)
    with pytest.raises(RunError, match="run: rank 0 has not written the summary within 0.2 s"):
        train_worker._wait_for_summary(mesh)
    mesh.store.set(train_worker._SUMMARY_KEY, "1")
    train_worker._wait_for_summary(mesh)


def test_rank_0_ends_after_the_workers_of_other_nodes() -> None:
    store = dist.HashStore()
    mesh = Mesh(0, 3, store, local=False)
    ended: list[bool] = []

    def wait() -> None:
        train_worker._wait_for_others(mesh)
        ended.append(True)

    waiting = threading.Thread(target=wait)
    waiting.start()
    train_worker._mark_end(Mesh(1, 3, store, local=False))
    waiting.join(0.3)
    assert not ended
    train_worker._mark_end(Mesh(2, 3, store, local=False))
    waiting.join(10)
    assert ended

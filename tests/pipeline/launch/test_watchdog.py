"""What the watchdog says of a worker whose main thread does not come on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from localpipe.environment import PRIVATE_DIR, leave_nccl_to_watchdogs, read_variables
from localpipe.pipeline.launch import watchdog
from localpipe.pipeline.launch.watchdog import Watchdog
from localpipe.pipeline.workers.mesh import Mesh
from localpipe.pipeline.workers.phase import PhaseTimer


class Ended(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def causes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Let the end of a process be an exception. Return what watchdogs report before it."""

    def end(status: int) -> None:
        raise Ended

    monkeypatch.setenv(PRIVATE_DIR, str(tmp_path))
    monkeypatch.setattr("os._exit", end)
    return []


def make_watchdog(timer: PhaseTimer, causes: list[str]) -> Watchdog:
    return Watchdog(Mesh(0, 1, dist.HashStore(), local=True), timer, 60.0, causes.append)


def test_a_connection_that_does_not_come_about_ends_the_run(
    causes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = PhaseTimer(stage=1)
    watched = make_watchdog(timer, causes)
    with timer.mark_connect("stage 0 (rank 0)"):
        watched._tick()  # just begun
        monkeypatch.setattr(watchdog, "CONNECT_S", 0.0)
        with pytest.raises(Ended):
            watched._tick()
    assert causes == [
        "stage 1, replica 0, step 0: not connected to stage 0 (rank 0) within 0 s, though both "
        "ends are there; run localpipe doctor, or again with NCCL_DEBUG=WARN"
    ]


def test_a_long_start_has_no_limit(causes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    timer = PhaseTimer()
    watched = make_watchdog(timer, causes)
    monkeypatch.setattr(watchdog, "CONNECT_S", 0.0)
    with timer.mark_connect("stage 1 (rank 1)"):
        pass
    watched._tick()
    assert timer.phase == "start" and causes == []


def test_torch_does_not_end_a_process_whose_nccl_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING")
    monkeypatch.setenv(names[0], "3")  # what the user has set
    monkeypatch.delenv(names[1], raising=False)
    leave_nccl_to_watchdogs()
    assert read_variables(names) == {names[0]: "3", names[1]: "0"}

"""Training on emulated GPUs: the theorem, eager and captured, without a race."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.emulated_gpu.machine import Machine, Settings, Training

_CHECKED = Settings(races=1)
_DELAYED = Settings(races=1, delay_us=200, seed=3)


@pytest.fixture(scope="module")
def alone(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Return a run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    return machine.train(folder / "run", "pipeline.processes=1", settings=_CHECKED)


def test_one_process_trains_without_a_race(alone: Training) -> None:
    assert alone.digest
    assert alone.races == []


@pytest.mark.parametrize(("processes", "depth"), [(2, 1), (4, 2)])
def test_more_processes_have_the_digest_of_one(
    machine: Machine, alone: Training, tmp_path: Path, processes: int, depth: int
) -> None:
    words = [f"pipeline.processes={processes}", f"pipeline.depth={depth}"]
    many = machine.train(tmp_path / "run", *words, settings=_DELAYED)
    assert many.digest == alone.digest
    assert many.races == []

"""Training on emulated GPUs: one digest for any number of processes, and no race."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.emulated_gpu.machine import LIMIT_S, Machine, Settings, Training

_CHECKED = Settings(races=1)
_CAPTURED = "run.capture=graphs"
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


def test_captured_steps_have_one_digest_in_one_and_four_processes(
    machine: Machine, tmp_path: Path
) -> None:
    alone = machine.train(tmp_path / "1", "pipeline.processes=1", _CAPTURED, settings=_CHECKED)
    words = ["pipeline.processes=4", "pipeline.depth=2", _CAPTURED]
    many = machine.train(tmp_path / "4", *words, settings=_DELAYED)
    assert many.digest == alone.digest
    assert alone.races == many.races == []


@pytest.mark.parametrize("wire_dtype", ["int8", "int4"])
def test_codes_have_one_digest_in_one_and_two_processes(
    machine: Machine, tmp_path: Path, wire_dtype: str
) -> None:
    """Decoding is part of the captured step, encoding follows it."""
    words = [f"pipeline.wire_dtype={wire_dtype}", _CAPTURED]
    alone = machine.train(tmp_path / "1", "pipeline.processes=1", *words, settings=_CHECKED)
    many = machine.train(tmp_path / "2", "pipeline.processes=2", *words, settings=_DELAYED)
    assert many.digest and many.digest == alone.digest
    assert alone.races == many.races == []


@pytest.mark.parametrize("capture", ["none", "graphs"])
def test_parameters_come_back_with_one_digest_and_without_a_race(
    machine: Machine, tmp_path: Path, capture: str
) -> None:
    """They are copied to the host on a stream of their own, while the next steps are computed."""
    feedback = "method={objective: dgl, feedback: {mode: block, every: 2, lag: 3}}"
    words = [feedback, f"run.capture={capture}", "optim.epochs=2"]
    alone = machine.train(tmp_path / "1", *words, "pipeline.processes=1", settings=_CHECKED)
    places = ["pipeline.processes=4", "pipeline.depth=2"]
    many = machine.train(tmp_path / "4", *words, *places, settings=_DELAYED)
    assert many.digest == alone.digest
    assert alone.races == many.races == []


def test_uneven_replicas_have_one_digest_at_any_depth(machine: Machine, tmp_path: Path) -> None:
    words = [
        "pipeline.stages=3",
        "pipeline.replicas=[1,2,1]",
        "pipeline.batch_norm=sync",
        "pipeline.processes=4",
    ]
    one = machine.train(tmp_path / "1", *words, "pipeline.depth=1", settings=_CHECKED)
    three = machine.train(tmp_path / "3", *words, "pipeline.depth=3", settings=_DELAYED)
    assert one.digest == three.digest
    assert one.races == three.races == []


def test_replicas_of_whole_pipelines_report_no_race(machine: Machine, tmp_path: Path) -> None:
    words = ["pipeline.stages=2", "pipeline.replicas=2", "pipeline.processes=2"]
    result = machine.train(tmp_path / "run", *words, settings=_CHECKED)
    assert result.digest and result.races == []


def test_a_killed_run_resumes_to_the_digest_of_an_undisturbed_one(
    machine: Machine, tmp_path: Path
) -> None:
    words = ["pipeline.processes=2", "run.checkpoint_every_s=0"]
    undisturbed = machine.train(tmp_path / "undisturbed", *words)

    run_dir = tmp_path / "killed"
    command = machine.train_command(run_dir, *words)
    # Its operations are slow, so that it is killed before its end.
    process, output = machine.begin("run_command", *command, settings=Settings(delay_us=1000))
    deadline = time.monotonic() + LIMIT_S
    while not list(run_dir.glob("checkpoints/step_*/manifest.json")):
        assert process.poll() is None and time.monotonic() < deadline, output.read_text()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(LIMIT_S)
    assert not (run_dir / "summary.json").exists()

    resumed = machine.train(run_dir, *words, settings=_CHECKED)
    assert resumed.digest == undisturbed.digest
    assert resumed.races == []

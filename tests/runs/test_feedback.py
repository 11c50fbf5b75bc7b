"""Runs with parameters on their way back: stopped, killed, gone on with, evaluated, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import localpipe
from localpipe.config.keys import Config
from localpipe.config.load import as_resolved, update
from localpipe.results.evaluate import evaluate
from localpipe.results.export import export
from localpipe.runs.checkpoint import newest_checkpoint
from localpipe.runs.directory import RunDirectory
from tests.harness import kill_after_a_checkpoint, settings, train

FEEDBACKS: dict[str, dict[str, Any]] = {
    "block": {"mode": "block", "every": 2, "lag": 5},
    "readout": {"mode": "readout", "every": 1, "lag": 3},
}


def configured(run_dir: Path, mode: str, **keys: Any) -> Config:
    """Return a run of 24 steps."""
    method = {"objective": {"name": "greedy"}, "feedback": FEEDBACKS[mode]}
    config = settings(run_dir, method=method, optim={"epochs": 4, "lr": 0.05})
    return update(config, keys)


def digest(config: Config) -> str:
    text = (Path(config.run.dir) / "summary.json").read_text(encoding="utf-8")
    return str(json.loads(text)["weights_sha256"])


def train_whole(folder: Path, mode: str) -> str:
    """Return the digest of a run that nothing has stopped."""
    whole = configured(folder / "whole", mode)
    train(whole)
    return digest(whole)


@pytest.mark.parametrize(
    ("mode", "before", "after"),
    [("block", 1, 2), ("block", 4, 1), ("readout", 2, 4)],
)
def test_a_run_goes_on_at_any_number_of_processes(
    tmp_path: Path, mode: str, before: int, after: int
) -> None:
    stopped = configured(tmp_path / "stopped", mode)
    train(update(stopped, {"optim.max_steps": 11}), before)
    checkpoint = newest_checkpoint(tmp_path / "stopped")
    assert checkpoint is not None and checkpoint.step == 11
    # Those of (11 - lag, 11], multiples of `every`.
    expected = {"block": [8, 10], "readout": [9, 10, 11]}[mode]
    assert sorted(checkpoint.load_stage(3)["feedback"]) == expected
    assert "feedback" not in checkpoint.load_stage(0)
    train(stopped, after)
    assert digest(stopped) == train_whole(tmp_path, mode)


@pytest.mark.parametrize("mode", FEEDBACKS)
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path: Path, mode: str) -> None:
    killed = configured(tmp_path / "killed", mode, **{"run.checkpoint_every_s": 0.0})
    kill_after_a_checkpoint(killed, tmp_path / "work")
    train(killed, 2)
    assert digest(killed) == train_whole(tmp_path, mode)


@pytest.mark.parametrize("mode", FEEDBACKS)
def test_what_a_run_leaves_is_evaluated_and_exported(tmp_path: Path, mode: str) -> None:
    config = configured(tmp_path / "run", mode)
    train(config, 2)
    run_dir = Path(config.run.dir)
    resolved = as_resolved(RunDirectory(run_dir).config(None))
    records = evaluate(run_dir, RunDirectory(run_dir).config(None)).stages
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    # An evaluation after the last step uses the copies of that step.
    assert [record["accuracy"] for record in records] == summary["test_accuracy_per_stage"]
    export(run_dir, resolved, tmp_path / "exit.pt", 1)
    network = localpipe.load(tmp_path / "exit.pt", trust=True)
    assert network(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
    names = {"block": "exit.average.", "readout": "exit.readout."}
    assert any(name.startswith(names[mode]) for name in network.state_dict())
    export(run_dir, resolved, tmp_path / "whole.pt", None)
    assert not any(
        "aux" in name for name in localpipe.load(tmp_path / "whole.pt", trust=True).state_dict()
    )


def test_without_feedback_a_checkpoint_is_as_before(tmp_path: Path) -> None:
    config = settings(tmp_path / "run", optim={"epochs": 1})
    train(config)
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    for stage in range(4):
        assert set(checkpoint.load_stage(stage)) == {
            "weights", "optimizer", "scaler", "ema", "meter", "probe", "step",
        }  # fmt: skip

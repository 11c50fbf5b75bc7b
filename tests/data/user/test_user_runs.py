"""Whole runs on a user's Dataset: the theorem, a resume, and the commands that read a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from localpipe.results.evaluate import load_stages
from localpipe.runs.directory import RunDirectory
from tests.data.user.sets import Stripes
from tests.harness import differences, kill_after_a_checkpoint, run, settings, train

STRIPES = "tests.data.user.sets:stripes"
# Dropout in stage 0 of two.
BASE: dict[str, dict[str, Any]] = {
    "pipeline": {"stages": 2},
    "data": {"name": STRIPES, "augment": "auto", "image_size": "auto"},
}


def config(run_dir: Path, **keys: Any) -> Any:
    sections = {section: dict(values) for section, values in BASE.items()}
    for key, value in keys.items():
        section, _, name = key.partition("__")
        sections.setdefault(section, {})[name] = value
    return settings(run_dir, **sections)


@pytest.fixture(scope="module")
def sequential(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Return the states after a run in one process with one loader process."""
    return run(config(tmp_path_factory.mktemp("runs") / "one"))


@pytest.mark.parametrize(("processes", "depth", "workers"), [(2, 1, 2), (2, 8, 3), (1, 2, 2)])
def test_any_processes_depth_and_loader_processes_give_the_same_bits(
    tmp_path: Path, sequential: dict[int, Any], processes: int, depth: int, workers: int
) -> None:
    pipeline = {"pipeline__processes": processes, "pipeline__depth": depth}
    states = run(config(tmp_path / "run", **pipeline, data__workers=workers))
    assert differences(states, sequential) == []


def test_the_augmentation_takes_part_in_the_result(
    tmp_path: Path, sequential: dict[int, Any]
) -> None:
    """Equality of runs that draw nothing would prove nothing."""
    fixed = run(config(tmp_path / "run", data__name="tests.data.user.test_user_runs:fixed"))
    assert differences(fixed, sequential) != []


def fixed() -> tuple[Stripes, Stripes]:
    """Return the stripes without augmentation."""
    return Stripes(90), Stripes(30)


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, sequential: dict[int, Any]) -> None:
    given = config(tmp_path / "run", data__workers=2, run__checkpoint_every_s=0)
    kill_after_a_checkpoint(given, tmp_path / "store")
    assert train(given) == 0
    directory = RunDirectory(tmp_path / "run")
    for stage in load_stages(directory.read().config, directory.require_checkpoint()):
        weights = sequential[stage.plan.stage]["weights"]
        assert differences(dict(stage.weights()), dict(weights)) == []

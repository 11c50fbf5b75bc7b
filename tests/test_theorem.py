"""The theorem the project stands on: any number of processes, any depth, one result, to the bit."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.harness import differences, run, settings

METHODS = {
    "greedy": {"objective": {"name": "greedy"}},
    "dgl": {"objective": {"name": "dgl", "head": "mlp"}},
    "dgl-1c2f": {"objective": {"name": "dgl", "head": "1c2f"}},
}


@functools.cache
def sequential(stages: int, method: str) -> dict[int, dict[str, Any]]:
    """Return the states after a run of all stages in one process."""
    with tempfile.TemporaryDirectory() as folder:
        pipeline = {"stages": stages, "processes": 1}
        return run(settings(Path(folder, "run"), pipeline=pipeline, method=METHODS[method]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("depth", [1, 2, 8])
@pytest.mark.parametrize(("stages", "processes"), [(2, 2), (3, 2), (4, 2), (4, 4)])
def test_any_processes_and_depth_give_the_bits_of_one_process(
    tmp_path: Path, stages: int, processes: int, depth: int, method: str
) -> None:
    pipeline = {"stages": stages, "processes": processes, "depth": depth}
    states = run(settings(tmp_path / "run", pipeline=pipeline, method=METHODS[method]))
    assert differences(states, sequential(stages, method)) == []


def test_another_seed_gives_other_bits(tmp_path: Path) -> None:
    states = run(settings(tmp_path / "run", method=METHODS["dgl"], run={"seed": 1}))
    assert differences(states, sequential(4, "dgl")) != []


def test_every_stage_has_learned_something(tmp_path: Path) -> None:
    """Equality of pipelines that do nothing would prove nothing."""
    untrained = run(settings(tmp_path / "run", method=METHODS["dgl"], optim={"lr": 0.0}))
    for stage, state in sequential(4, "dgl").items():
        assert differences(state["weights"], untrained[stage]["weights"]), f"stage {stage}"

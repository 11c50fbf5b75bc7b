"""The theorem the project stands on: any number of processes, any depth, one result, to the bit."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.harness import differences, run, settings
from tests.sample_networks import Forked, small

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


# Networks with frozen blocks, and what is trained of them.
FROZEN: dict[str, tuple[Callable[[int], nn.Module], dict[str, Any], set[str]]] = {
    "small": (small, {"freeze": ["0", "1", "3"]}, {"2", "4", "5"}),
    "Forked": (
        Forked,
        {"freeze": ["stem", "early", "late"], "crossing": 2},
        {"middle", "join", "last", "head"},
    ),
}


def fine_tuned(folder: Path, name: str, processes: int, depth: int) -> dict[int, dict[str, Any]]:
    """Return the states after a run from a file of weights of seven classes."""
    build, keys, _ = FROZEN[name]
    torch.manual_seed(0)
    weights = folder / "weights.pt"
    torch.save(build(7).state_dict(), weights)
    model = {"name": f"tests.sample_networks:{name}", "weights": str(weights), **keys}
    pipeline = {"stages": 4, "processes": processes, "depth": depth}
    method = {"objective": {"name": "dgl"}, "context": {"mode": "R1"}}
    return run(settings(folder / "run", model=model, pipeline=pipeline, method=method))


@functools.cache
def fine_tuned_alone(name: str) -> dict[int, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return fine_tuned(Path(folder), name, 1, 2)


@pytest.mark.parametrize(("processes", "depth"), [(2, 1), (4, 2)])
@pytest.mark.parametrize("name", FROZEN)
def test_weights_and_frozen_blocks_give_the_bits_of_one_process(
    tmp_path: Path, name: str, processes: int, depth: int
) -> None:
    states = fine_tuned(tmp_path, name, processes, depth)
    assert differences(states, fine_tuned_alone(name)) == []
    given = torch.load(tmp_path / "weights.pt")
    weights: dict[str, Tensor] = {}
    for state in states.values():
        weights.update(state["weights"])
    moved = {key for key in given if not torch.equal(weights[key], given[key])}
    assert {key.partition(".")[0] for key in moved} == FROZEN[name][2]

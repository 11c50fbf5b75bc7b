"""The theorem for networks with layouts, orders in memory and several tensors at a cut."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.hand_made import NAMES, run, settings
from tests.harness import differences

METHODS: dict[str, dict[str, Any]] = {
    "greedy": {"objective": {"name": "greedy"}},
    "auglocal": {"objective": {"name": "auglocal", "aux_depth": 2}},
}


def states(
    folder: Path, name: str, method: str, processes: int, depth: int, checkpointing: str
) -> dict[int, dict[str, Any]]:
    """Return the states after a run of four stages."""
    return run(
        settings(
            folder / "run",
            name,
            method=METHODS[method],
            pipeline={"stages": 4, "processes": processes, "depth": depth},
            run={"checkpointing": checkpointing},
        )
    )


@functools.cache
def sequential(name: str, method: str) -> dict[int, dict[str, Any]]:
    """Return the states after a run of all stages in one process."""
    with tempfile.TemporaryDirectory() as folder:
        return states(Path(folder), name, method, 1, 1, "none")


@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize(("processes", "depth"), [(1, 2), (2, 1), (4, 2)])
@pytest.mark.parametrize("name", NAMES)
def test_any_processes_depth_and_recomputation_give_one_result(
    tmp_path: Path, name: str, processes: int, depth: int, checkpointing: str
) -> None:
    got = states(tmp_path, name, "greedy", processes, depth, checkpointing)
    assert differences(got, sequential(name, "greedy")) == []

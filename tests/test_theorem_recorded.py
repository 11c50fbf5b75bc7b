"""The theorem for networks with layouts, orders in memory and several tensors at a cut."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from localpipe.config.resolved import Resolved
from tests.hand_made import NAMES, digests, settings

pytestmark = pytest.mark.usefixtures("hand_made")

METHODS: dict[str, dict[str, Any]] = {
    "dgl": {"objective": {"name": "dgl"}},
    "auglocal": {"objective": {"name": "auglocal", "aux_depth": 2}},
    "contsup": {"objective": {"name": "greedy"}, "context": {"mode": "R1E"}},
    "sgr": {"objective": {"name": "greedy"}, "reconcile": {"distance": "cosine"}},
}
# A context needs maps.
CASES = [case for case in product(NAMES, METHODS) if case != ("hand_sequence", "contsup")]


def job(
    folder: Path, name: str, method: str, processes: int = 1, depth: int = 1, **run: Any
) -> Resolved:
    """Return the configuration of four stages of a network."""
    return settings(
        folder,
        name,
        method=METHODS[method],
        pipeline={"stages": 4, "processes": processes, "depth": depth},
        run=run,
    )


@pytest.fixture(scope="module")
def sequential(hand_made: None, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the digest of every case, with all stages in one process."""
    folder = tmp_path_factory.mktemp("sequential")
    jobs = [job(folder / "run", name, method) for name, method in CASES]
    return digests(jobs, 1, folder / "digests")


@pytest.mark.parametrize(
    ("processes", "depth", "checkpointing"),
    [(1, 2, "block"), (2, 1, "none"), (4, 2, "none")],
)
def test_any_processes_depth_and_recomputation_give_one_digest(
    tmp_path: Path, sequential: list[str], processes: int, depth: int, checkpointing: str
) -> None:
    jobs, expected = [], []
    for case, digest in zip(CASES, sequential, strict=True):
        # A double backward pass holds what recomputation would compute again.
        if checkpointing == "none" or case[1] != "sgr":
            jobs.append(job(tmp_path, *case, processes, depth, checkpointing=checkpointing))
            expected.append(digest)
    assert digests(jobs, processes, tmp_path / "digests") == expected


def test_the_cases_differ(sequential: list[str]) -> None:
    assert len(set(sequential)) == len(CASES)


def test_replicas_in_as_many_and_in_fewer_processes_give_one_digest(tmp_path: Path) -> None:
    """The batch norm of the skips is synchronised, and rows of every order are joined."""
    results = []
    for processes in (2, 4):
        jobs = []
        for name in NAMES:
            pipeline = {
                "stages": 2, "replicas": 2, "processes": processes, "batch_norm": "sync",
            }  # fmt: skip
            folder = tmp_path / str(processes)
            jobs.append(settings(folder, name, method=METHODS["dgl"], pipeline=pipeline))
        results.append(digests(jobs, processes, tmp_path / f"digests{processes}"))
    assert results[0] == results[1]


def test_stages_of_other_numbers_of_replicas_train(tmp_path: Path) -> None:
    jobs = []
    for name in NAMES:
        pipeline = {"stages": 3, "replicas": [1, 2, 1], "processes": 4, "batch_norm": "sync"}
        jobs.append(settings(tmp_path, name, method=METHODS["dgl"], pipeline=pipeline))
    assert len(set(digests(jobs, 4, tmp_path / "digests"))) == len(NAMES)

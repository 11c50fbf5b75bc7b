"""The theorem for masks and numbers: one result at any processes, any depth, after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from localpipe import config as configs
from localpipe import data
from localpipe.config.keys import Config
from localpipe.config.resolved import Resolved
from localpipe.plan.resolve_here import resolve_here
from localpipe.runs.directory import RunDirectory
from tests.harness import digests, kill_after_a_checkpoint, train

METHODS: dict[str, dict[str, Any]] = {
    "dgl": {"objective": {"name": "dgl"}},
    "infopro": {
        "objective": {"name": "infopro", "image_weight": [1, 1], "task_weight": [1, 1]},
        "context": {"mode": "R1"},
    },
    "auglocal": {"objective": {"name": "auglocal", "aux_depth": 2}, "context": {"mode": "E"}},
    "sgr": {"objective": {"name": "greedy"}, "reconcile": {"distance": "cosine"}},
}
# Dropout and batch normalisation in either network, and tensors that cross beside the main one.
NETWORKS = {"shapes": "UNet", "areas": "Forked"}
CASES = [(name, method) for name in NETWORKS for method in METHODS]


def given(folder: Path, name: str, method: str, **sections: dict[str, Any]) -> Config:
    """Return the configuration of four stages on images of shapes, some of them ignored in part."""
    base: dict[str, dict[str, Any]] = {
        "model": {
            "name": f"tests.sample_networks:{NETWORKS[name]}", "crossing": 4, "args": {"width": 4},
        },
        "method": METHODS[method],
        "pipeline": {"stages": 4, "processes": 1},
        "data": {"name": name, "samples": 36, "image_size": 16, "batch_size": 8},
        "task": {"average": "valid", "loss": "huber"},
        "optim": {"lr": 0.05, "epochs": 2, "schedule": "cosine_step"},
        "run": {"dir": str(folder), "threads": 1, "device": "cpu"},
    }  # fmt: skip
    for section, keys in sections.items():
        base[section] = {**base[section], **keys}
    return configs.parse(base, "test")


def resolved(folder: Path, name: str, method: str, **pipeline: int) -> Resolved:
    config = given(folder, name, method, pipeline=pipeline)
    return resolve_here(config, data.load(config.data, 0))


@pytest.fixture(scope="module")
def sequential(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the digest of every case, with all stages in one process."""
    folder = tmp_path_factory.mktemp("sequential")
    jobs = [resolved(folder / "run", *case) for case in CASES]
    return digests(jobs, 1, folder / "digests")


@pytest.mark.parametrize(("processes", "depth"), [(1, 8), (2, 1), (4, 4)])
def test_any_processes_and_depth_give_one_digest(
    tmp_path: Path, sequential: list[str], processes: int, depth: int
) -> None:
    jobs = [resolved(tmp_path / "run", *case, processes=processes, depth=depth) for case in CASES]
    assert digests(jobs, processes, tmp_path / "digests") == sequential


def test_the_cases_differ(sequential: list[str]) -> None:
    assert len(set(sequential)) == len(CASES)


@pytest.mark.parametrize("name", NETWORKS)
def test_replicas_in_as_many_and_in_fewer_processes_give_one_digest(
    tmp_path: Path, name: str
) -> None:
    results = []
    for processes in (2, 4):
        folder = tmp_path / str(processes)
        job = resolved(folder, name, "dgl", stages=2, replicas=2, processes=processes)
        results.append(digests([job], processes, tmp_path / f"digests{processes}"))
    assert results[0] == results[1]


@pytest.mark.parametrize(("name", "method"), [("shapes", "sgr"), ("areas", "infopro")])
def test_a_killed_run_goes_on_to_the_same_digest(tmp_path: Path, name: str, method: str) -> None:
    keys = {"checkpoint_every_s": 0, "probe": "linear"}
    summaries = []
    for part in ("whole", "killed"):
        config = given(tmp_path / part, name, method, run={"dir": str(tmp_path / part), **keys})
        if part == "killed":
            kill_after_a_checkpoint(config, tmp_path / "store")
        train(config)
        summary = RunDirectory(config.run.dir).summary()
        assert summary is not None
        summaries.append(summary)
    whole, killed = summaries
    assert killed["weights_sha256"] == whole["weights_sha256"]
    for key in ("metric", "metric_per_stage", "probe_metric_per_stage", "best_metric"):
        assert killed[key] == whole[key], key

"""The theorem for next-token prediction: one result at any processes, any depth, after a kill."""

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
    "greedy": {"objective": {"name": "greedy"}},
    "dgl": {"objective": {"name": "dgl"}, "context": {"mode": "R2E"}},
    "auglocal": {"objective": {"name": "auglocal", "aux_depth": 2}, "context": {"mode": "E"}},
    "sgr": {"objective": {"name": "dgl"}, "reconcile": {"distance": "cosine"}},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of lines that differ."""
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text(
        "".join(f"{number * number} is the square of {number}\n" for number in range(60))
    )
    return path


def given(folder: Path, text: Path, method: str, **sections: dict[str, Any]) -> Config:
    """Return the configuration of four stages on the text."""
    base: dict[str, dict[str, Any]] = {
        "model": {"name": "gpt", "args": {"depth": 4, "width": 8, "heads": 2}},
        "method": METHODS[method],
        "pipeline": {"stages": 4, "processes": 1, "cuts": [1, 2, 3]},
        "data": {"name": "bytes", "root": str(text), "length": 16, "batch_size": 16},
        "optim": {"name": "adamw", "lr": 0.01, "epochs": 2, "schedule": "cosine_step"},
        "run": {"dir": str(folder), "threads": 1, "device": "cpu"},
    }
    for section, keys in sections.items():
        base[section] = {**base[section], **keys}
    return configs.parse(base, "test")


def resolved(folder: Path, text: Path, method: str, **pipeline: int) -> Resolved:
    config = given(folder, text, method, pipeline=pipeline)
    return resolve_here(config, data.load(config.data, 0))


@pytest.fixture(scope="module")
def sequential(text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the digest of every method, with all stages in one process."""
    folder = tmp_path_factory.mktemp("sequential")
    jobs = [resolved(folder / method, text, method) for method in METHODS]
    return digests(jobs, 1, folder / "digests")


@pytest.mark.parametrize(("processes", "depth"), [(1, 4), (2, 1), (4, 4)])
def test_any_processes_and_depth_give_one_digest(
    tmp_path: Path, text: Path, sequential: list[str], processes: int, depth: int
) -> None:
    jobs = []
    for method in METHODS:
        folder = tmp_path / method
        jobs.append(resolved(folder, text, method, processes=processes, depth=depth))
    assert digests(jobs, processes, tmp_path / "digests") == sequential


def test_the_methods_differ(sequential: list[str]) -> None:
    assert len(set(sequential)) == len(METHODS)


def test_replicas_in_as_many_and_in_fewer_processes_give_one_digest(
    tmp_path: Path, text: Path
) -> None:
    results = []
    for processes in (2, 4):
        folder = tmp_path / str(processes)
        jobs = [resolved(folder / "run", text, "auglocal", processes=processes, replicas=2)]
        results.append(digests(jobs, processes, folder / "digests"))
    assert results[0] == results[1]


def test_a_killed_run_goes_on_to_the_same_digest(tmp_path: Path, text: Path) -> None:
    found = []
    for name in ("killed", "whole"):
        run = {"checkpoint_every_s": 0}
        config = given(tmp_path / name, text, "dgl", run=run)
        if name == "killed":
            kill_after_a_checkpoint(config, tmp_path / "store")
        assert train(config) == 0
        found.append(RunDirectory(tmp_path / name).summary())
    killed, whole = found
    assert killed is not None and whole is not None
    assert killed["weights_sha256"] == whole["weights_sha256"]
    assert killed["task"] == "next_token" and killed["metric"] == whole["metric"]
    assert killed["metric"]["name"] == "bits_per_byte" and killed["metric"]["better"] == "lower"
    assert killed["test_accuracy_per_stage"] == whole["test_accuracy_per_stage"]


@pytest.mark.parametrize("values", [{"image_size": 8}, {"mean": [0.5], "std": [0.5]}])
def test_keys_of_images_say_nothing_and_a_run_on_text_goes_on(
    tmp_path: Path, text: Path, values: dict[str, Any]
) -> None:
    config = given(tmp_path, text, "dgl", data=values, optim={"epochs": 1})
    assert train(config) == 0
    assert train(config) == 0

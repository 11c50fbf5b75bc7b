"""The theorem with parameters that come back late: any processes and depth, one result, to the bit.

With a short lag stages wait for parameters, with a long one they do not.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.harness import digests, settings

BLOCK = {"objective": {"name": "dgl"}}
READOUT = {"objective": {"name": "greedy"}}
FEEDBACKS: dict[str, dict[str, Any]] = {
    "block, every step, the shortest lag": {
        **BLOCK,
        "feedback": {"mode": "block", "every": 1, "lag": 1},
    },
    "block, a lag between two": {**BLOCK, "feedback": {"mode": "block", "every": 2, "lag": 3}},
    "block, lag auto": {
        **BLOCK,
        "feedback": {"mode": "block", "every": 4, "combine": "scaled"},
    },
    "readout, the shortest lag": {
        **READOUT,
        "feedback": {"mode": "readout", "every": 1, "lag": 1},
    },
    "readout, two steps": {**READOUT, "feedback": {"mode": "readout", "every": 2, "lag": 4}},
}
# Two epochs of 16 steps, so that every lag is shorter than the run.
SECTIONS: dict[str, dict[str, Any]] = {
    "data": {"samples": 64, "batch_size": 8},
    "optim": {"epochs": 2, "lr": 0.05},
}


def train(folder: Path, processes: int, depth: int) -> list[str]:
    """Return the digest of every configuration of FEEDBACKS, trained in the same processes."""
    pipeline = {"stages": 4, "processes": processes, "depth": depth}
    jobs = []
    for index, method in enumerate(FEEDBACKS.values()):
        jobs.append(settings(folder / str(index), method=method, pipeline=pipeline, **SECTIONS))
    return digests(jobs, processes, folder / "work")


@functools.cache
def alone() -> list[str]:
    """Return the digests after runs of all stages in one process."""
    with tempfile.TemporaryDirectory() as folder:
        return train(Path(folder), 1, 2)


@pytest.mark.parametrize(("processes", "depth"), [(2, 1), (2, 8), (4, 1), (4, 2), (4, 8)])
def test_any_processes_and_depth_give_the_bits_of_one_process(
    tmp_path: Path, processes: int, depth: int
) -> None:
    assert train(tmp_path, processes, depth) == alone()


def test_another_lag_gives_other_bits() -> None:
    """The configurations differ in nothing but what comes back, and when."""
    assert len(set(alone())) == len(FEEDBACKS)


# Keys that give another result than a lag of 2 every step.
OTHERS: dict[str, dict[str, Any]] = {
    "block": {"lag": 2},
    "another lag": {"lag": 3},
    "fewer snapshots": {"lag": 2, "every": 2},
    "a lag beyond the run": {"lag": 1000},
    "another momentum": {"lag": 2, "momentum": 0.5},
    "a scaled sum": {"lag": 2, "combine": "scaled"},
    "readout": {"mode": "readout", "lag": 2},
    "readout, another lag": {"mode": "readout", "lag": 3},
    "none": {"mode": "none"},
}


def test_every_key_of_feedback_shapes_the_result(tmp_path: Path) -> None:
    jobs = []
    for name, keys in OTHERS.items():
        feedback = {"mode": "block", "every": 1, **keys}
        method = {"objective": {"name": "dgl"}, "feedback": feedback}
        jobs.append(settings(tmp_path / name, method=method, **SECTIONS))
    found = digests(jobs, 1, tmp_path / "work")
    assert len(set(found)) == len(jobs)


ACCUMULATED = {"objective": {"name": "dgl"}, "feedback": {"mode": "block", "every": 1, "lag": 2}}
COMBINED: dict[str, dict[str, Any]] = {
    "alone": {"method": ACCUMULATED},
    "accumulate": {"method": ACCUMULATED, "optim": {"accumulate": 2}},
    "reconcile, context": {
        "method": {
            **ACCUMULATED,
            "context": {"mode": "R1E"},
            "reconcile": {"distance": "cosine"},
        }
    },
    "ema, adamw": {
        "method": {
            "objective": {"name": "dgl", "head": "1c2f"},
            "feedback": {"mode": "readout", "every": 2, "lag": 3},
        },
        "optim": {"ema": 0.9, "name": "adamw"},
    },
    "bf16": {"method": ACCUMULATED, "run": {"precision": "bf16"}},
}
PIPELINES = {"bf16": {"wire_dtype": "bf16"}}


@pytest.mark.parametrize("replicas", [1, 2])
def test_other_axes_and_replicas_keep_the_bits(tmp_path: Path, replicas: int) -> None:
    found = []
    for index, processes in enumerate((replicas, 2 * replicas, 4 * replicas)):
        jobs = []
        for name, sections in COMBINED.items():
            pipeline = {"replicas": replicas, "processes": processes, "depth": 2 * index + 1}
            sections = {"pipeline": {**pipeline, **PIPELINES.get(name, {})}, **sections}
            sections["data"] = {"samples": 96, "batch_size": 16}
            sections["optim"] = {"epochs": 2, "lr": 0.02, **sections.get("optim", {})}
            jobs.append(settings(tmp_path / f"{index}-{name}", **sections))
        found.append(digests(jobs, processes, tmp_path / f"work{index}"))
    assert found[0] == found[1] == found[2]


def test_stages_with_other_numbers_of_replicas_hear_one_of_them(tmp_path: Path) -> None:
    """Replica r of a stage hears replica r mod R of the R of the later one."""
    found = []
    for index, depth in enumerate((1, 8)):
        keys = {"stages": 3, "replicas": [2, 1, 4], "processes": 7, "depth": depth}
        for mode in ("block", "readout"):
            feedback = {"mode": mode, "every": 1, "lag": 2}
            method = {"objective": {"name": "dgl"}, "feedback": feedback}
            sections = {"data": {"samples": 96, "batch_size": 16}, "optim": {"epochs": 2}}
            job = settings(tmp_path / f"{mode}{index}", pipeline=keys, method=method, **sections)
            found += digests([job], 7, tmp_path / f"work-{mode}{index}")
    assert found[:2] == found[2:] and found[0] != found[1]

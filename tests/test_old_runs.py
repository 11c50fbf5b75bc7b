"""What an earlier version left in tests/recorded/runs is read, resumed and used by this one.

Commit 8dac677 wrote it, from the root of a checkout and on one core:

    localpipe train SMALL method=contsup method.reconcile=cosine data.train_subset=320
        run.checkpoint_every_s=0 run.dir=runs/stopped           # stopped by SIGTERM behind step 16
    localpipe train SMALL pipeline.stages=2 run.probe=linear run.dir=runs/finished
    localpipe export runs/finished -o exported/net.pt --trust   # and exported/net.safetensors
    localpipe plan SMALL --measure --profile profile.json
    localpipe plan SMALL pipeline.cuts=time --profile profile.json --freeze frozen.yaml

SMALL is tests/recorded/runs/small.yaml. logits.json holds what exported/net.pt gave for `images()`.
Locks and TensorBoard's files are left out. The tests use nothing but the command line and the names
of `localpipe` itself, so that they outlive any move inside the package.
"""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import localpipe
from localpipe.config.resume import ADDED_KEYS

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "tests" / "recorded" / "runs"
SMALL = str(RUNS / "small.yaml")
STOPPED = ["method=contsup", "method.reconcile=cosine", "data.train_subset=320"]
FINISHED = ["pipeline.stages=2", "run.probe=linear"]
# An accuracy is one of 360 images; the arithmetic of another processor may turn a few of them.
CLOSE = 0.01


class Command:
    """The command line, in this process; it stands in the root, where the recorded names lead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        monkeypatch.chdir(ROOT)

    def __call__(self, *words: object) -> str:
        """Run `python -m localpipe` with these words; return what it printed."""
        self._capsys.readouterr()
        self._monkeypatch.setattr(sys, "argv", ["localpipe", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("localpipe", run_name="__main__")
        captured = self._capsys.readouterr()
        assert not ended.value.code, captured.err
        return captured.out


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line in this process."""
    return Command(monkeypatch, capsys)


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A copy of the run that was stopped behind step 16 of 30, in the middle of an epoch."""
    return shutil.copytree(RUNS / "stopped", tmp_path / "stopped")


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A copy of the run that ended."""
    return shutil.copytree(RUNS / "finished", tmp_path / "finished")


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def images() -> Tensor:
    """Return two images (2, 3, 32, 32) of counted bytes."""
    return (torch.arange(2 * 3 * 32 * 32) % 251).to(torch.uint8).view(2, 3, 32, 32)


def weights(file: Path) -> dict[str, Tensor]:
    """Return the tensors of an export, read without localpipe."""
    if file.suffix == ".safetensors":
        return load_file(file)
    loaded: dict[str, Tensor] = torch.load(file, weights_only=True)
    return loaded


# -- the stopped run


def test_one_and_two_processes_resume_to_the_same_end(stopped: Path, command: Command) -> None:
    two = shutil.copytree(stopped, stopped.parent / "two")
    for folder, processes in ((stopped, 1), (two, 2)):
        free = [f"pipeline.processes={processes}", f"run.dir={folder}"]
        output = command("train", SMALL, *STOPPED, *free)
        assert f"resuming {folder} after step 16 of 30" in output
    one, other = read(stopped / "summary.json"), read(two / "summary.json")
    assert (one["steps"], one["processes"], other["processes"]) == (30, 1, 2)
    assert one["weights_sha256"] == other["weights_sha256"]
    assert one["test_accuracy_per_stage"] == other["test_accuracy_per_stage"]
    lines = (stopped / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    before = (RUNS / "stopped" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines[1 : len(before)] == before[1:]  # the first line is the session's own
    evaluated = [(r["step"], r["stage"]) for r in map(json.loads, lines) if r["kind"] == "eval"]
    assert sorted(evaluated) == [(step, stage) for step in (20, 30) for stage in range(3)]


# -- the finished run


def test_the_same_command_changes_nothing(finished: Path, command: Command) -> None:
    output = command("train", SMALL, *FINISHED, f"run.dir={finished}")
    assert read(finished / "summary.json")["weights_sha256"] in output
    for file in ("summary.json", "config.yaml", "metrics.jsonl"):
        assert (finished / file).read_bytes() == (RUNS / "finished" / file).read_bytes()


def test_it_evaluates_to_the_recorded_accuracies(finished: Path, command: Command) -> None:
    stages = json.loads(command("eval", finished, "--json", "--trust"))["stages"]
    recorded = read(finished / "summary.json")["test_accuracy_per_stage"]
    assert [stage["accuracy"] for stage in stages] == pytest.approx(recorded, abs=CLOSE)


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_it_exports_what_it_exported(finished: Path, command: Command, name: str) -> None:
    target = finished.parent / name
    printed = command("export", finished, "-o", target, "--trust")
    assert printed.split() == [str(target), str(target.with_suffix(".md"))]
    new, old = weights(target), weights(RUNS / "exported" / name)
    assert list(new) == list(old)
    assert all(torch.equal(new[key], old[key]) for key in old)


def test_the_model_card_says_what_it_said(finished: Path, command: Command) -> None:
    command("export", finished, "-o", finished.parent / "net.pt", "--trust")
    new, old = finished.parent / "net.md", RUNS / "exported" / "net.md"
    assert new.read_text(encoding="utf-8") == old.read_text(encoding="utf-8")


def test_it_is_compared_with_the_stopped(stopped: Path, finished: Path, command: Command) -> None:
    found = json.loads(command("compare", stopped, finished, "--json"))
    (row,) = found["groups"]
    recorded = read(finished / "summary.json")
    assert (row["runs"], row["seeds"], row["n"]) == ([str(finished)], [0], 1)
    assert row["test_accuracy_last"]["mean"] == recorded["test_accuracy"]
    assert row["test_accuracy_best"]["mean"] == recorded["best_test_accuracy"]
    assert found["unfinished"] == [{"run": str(stopped), "step": 16, "steps": 30}]


# -- the export


@pytest.mark.parametrize("name", ["exported/net.pt", "exported/net.safetensors", "finished"])
def test_the_network_is_loaded_and_predicts_what_it_predicted(command: Command, name: str) -> None:
    logits = localpipe.load(RUNS / name, trust=True)(images())
    recorded = torch.tensor(read(RUNS / "exported" / "logits.json"))
    torch.testing.assert_close(logits, recorded, rtol=1e-3, atol=1e-3)


# -- the profile and the frozen plan


def test_the_profile_predicts_what_it_predicted(command: Command) -> None:
    words = ["plan", SMALL, "pipeline.cuts=time", "--profile", RUNS / "profile.json", "--json"]
    predicted = json.loads(command(*words))["predicted"]
    assert predicted["cuts"] == [0, 1]
    assert predicted["samples_per_s"] == pytest.approx(5227.992764434793)
    assert predicted["others"]["equal"]["samples_per_s"] == pytest.approx(5022.429069609868)


def test_the_frozen_plan_is_the_same_frozen_again(tmp_path: Path, command: Command) -> None:
    again = tmp_path / "again.yaml"
    plan = json.loads(command("plan", RUNS / "frozen.yaml", "--json", "--freeze", again))
    assert [stage["blocks"] for stage in plan["stages"]] == [["0"], ["1"], ["2", "3", "4"]]
    old = yaml.safe_load((RUNS / "frozen.yaml").read_text(encoding="utf-8"))
    new = yaml.safe_load(again.read_text(encoding="utf-8"))
    # Keys of later versions are all that is more, with the border that crops of digits have.
    later = {**ADDED_KEYS, "data.padding": 2, "data.padding_mode": "zero"}
    for key, value in later.items():
        section, name = key.split(".")
        assert new[section].pop(name) == value
    assert {section: keys for section, keys in new.items() if keys} == old

"""Runs beside each other: what is one row, what is not, and what stands beside every accuracy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from localpipe import config as configs
from localpipe.cli.command_line import main
from localpipe.config.load import to_yaml
from localpipe.runs.records import append_record, begin_records
from tests.harness import settings


def a_run(
    run_dir: Path,
    accuracy: float | None,
    seed: int = 0,
    steps: int = 12,
    **sections: dict[str, Any],
) -> str:
    """Leave what a run leaves; one without an accuracy has not ended."""
    run = {"seed": seed, **sections.pop("run", {})}
    config = settings(run_dir, run=run, **sections)
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    begin_records(run_dir / "metrics.jsonl", {"steps": steps}, 0, lambda step: False)
    append_record(run_dir / "metrics.jsonl", {"kind": "train", "step": 4, "stage": 0})
    if accuracy is not None:
        summary = {
            "test_accuracy": accuracy,
            "best_test_accuracy": accuracy + 0.1,
            "best_epoch": 1,
            "steps": steps,
        }
        summary.update(train_macs_per_sample=5_000_000, wall_s=60.0)
        (run_dir / "summary.json").write_text(json.dumps(summary))
    return str(run_dir)


def compared(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main(["compare", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_runs_that_differ_only_in_seed_and_free_keys_are_one_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        a_run(tmp_path / "a", 0.80, seed=0),
        a_run(tmp_path / "b", 0.82, seed=1, pipeline={"depth": 4}),
        a_run(tmp_path / "c", 0.87, seed=2, pipeline={"processes": 2}, run={"trace": True}),
    ]
    (row,) = compared(capsys, *runs)["groups"]
    assert (row["n"], row["seeds"], row["runs"]) == (3, [0, 1, 2], runs)
    last = row["test_accuracy_last"]
    assert last["mean"] == pytest.approx(0.83) and last["deviation"] == pytest.approx(0.0360555)
    assert (
        row["test_accuracy_best"]["mean"] == pytest.approx(0.93)
        and row["test_accuracy_best"]["chosen_on"] == "test"
    )
    assert (row["train_macs_per_sample"], row["wall_s"]["mean"], row["processes"]) == (
        5_000_000,
        60.0,
        [1, 1, 2],
    )


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"optim": {"lr": 0.2}}, "optim.lr=0.2"),
        ({"method": {"context": {"mode": "E"}}}, "method.context.mode=E"),
        ({"steps": 6}, "steps=6"),
    ],
    ids=["learning rate", "method", "stopped early by max_steps"],
)
def test_whatever_shapes_the_result_makes_a_row_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: dict[str, Any], named: str
) -> None:
    found = compared(
        capsys, a_run(tmp_path / "a", 0.8), a_run(tmp_path / "b", 0.9, seed=1, **other)
    )
    assert [row["n"] for row in found["groups"]] == [1, 1]
    assert found["groups"][1]["name"] == named
    assert found["groups"][0]["test_accuracy_last"]["deviation"] is None


def test_statistics_of_images_that_the_seed_chose_do_not_part_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"name": "digits", "train_subset": 100, "augment": "auto", "image_size": "auto"}
    runs = [a_run(tmp_path / str(seed), 0.8, seed=seed, data=data) for seed in (0, 1)]
    means = {str(configs.load(Path(run, "config.yaml")).data.mean) for run in runs}
    assert len(means) == 2 and len(compared(capsys, *runs)["groups"]) == 1


def test_the_best_epoch_is_told_as_chosen_on_held_out_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "a", 0.8, data={"validation": 8})
    assert compared(capsys, run)["groups"][0]["test_accuracy_best"]["chosen_on"] == "validation"
    assert main(["compare", run]) == 0
    assert "best on validation" in capsys.readouterr().out


def test_a_run_that_has_not_ended_is_listed_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [a_run(tmp_path / "a", 0.8), a_run(tmp_path / "b", None, seed=1)]
    found = compared(capsys, *runs)
    assert (
        found["unfinished"] == [{"run": runs[1], "step": 4, "steps": 12}]
        and found["groups"][0]["n"] == 1
    )
    assert main(["compare", runs[1]]) == 0
    assert capsys.readouterr().out == f"unfinished: {runs[1]}, step 4 of 12\n"


def test_the_table_has_mean_deviation_macs_and_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        a_run(tmp_path / str(seed), accuracy, seed=seed)
        for seed, accuracy in ((0, 0.80), (1, 0.82))
    ]
    assert main(["compare", *runs]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:5])) <= 80
    assert " ".join(lines[4].split()) == "1 2 0 1 81.00 +- 1.41 91.00 +- 1.41 5.0 12 60 +- 0 1"


def test_the_same_run_twice_counts_once_and_the_same_seed_twice_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "a", 0.8)
    assert compared(capsys, run, run + "/.")["groups"][0]["n"] == 1
    assert main(["compare", run, a_run(tmp_path / "b", 0.9)]) == 0
    assert "row 1 has a seed more than once" in capsys.readouterr().out


def test_a_directory_that_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", a_run(tmp_path / "a", 0.8), str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert (
        captured.out == ""
        and f"{tmp_path} is not a run directory: found 'a', expected config.yaml" in captured.err
        and captured.err.count("\n") == 1
    )
    assert main(["compare"]) == 2

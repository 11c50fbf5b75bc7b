"""What a run may take over, and what it may throw away: a run's own files, never a user's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localpipe.config.load import to_yaml, update
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.results.compare import compare_runs
from localpipe.results.report.page import write_report
from localpipe.runs.directory import RunDirectory
from localpipe.runs.prepare import prepare
from localpipe.runs.records import begin_records
from tests import ROOT
from tests.harness import settings, train


def again(run_dir: Path, overwrite: bool = True) -> Resolved:
    return update(settings(run_dir), {"run.resume": "never", "run.overwrite": overwrite})


def test_overwriting_throws_away_the_run_and_nothing_else(tmp_path: Path) -> None:
    train(update(settings(tmp_path), {"optim.max_steps": 2}))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "precious").mkdir()
    with pytest.raises(
        UserError, match="is not empty and run.resume is never; set run.overwrite=true"
    ):
        prepare(again(tmp_path, overwrite=False))
    assert (tmp_path / "summary.json").exists()
    prepared = prepare(again(tmp_path))
    prepared.lock.close()
    assert prepared.job.start_step == 0 and not any((tmp_path / "checkpoints").glob("step_*"))
    assert not (tmp_path / "summary.json").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "precious").is_dir()


@pytest.mark.parametrize("name", ["notes.txt", "config.yaml"])
def test_a_folder_that_holds_no_run_is_not_thrown_away(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}\n")
    error = f"is not a run directory: found '{name}', expected config.yaml and metrics.jsonl"
    with pytest.raises(UserError, match=f"{error}; choose another run.dir"):
        prepare(again(tmp_path))
    assert (tmp_path / name).read_text() == "{}\n"


def test_a_finished_run_says_nothing_of_steps_that_are_left(tmp_path: Path) -> None:
    config = update(settings(tmp_path), {"optim.max_steps": 2})
    train(config)
    prepared = prepare(update(config, {"run.resume": "auto"}))
    prepared.lock.close()
    assert prepared.summary is not None and not any(
        "learning rate" in note for note in prepared.notes
    )


def npz(path: Path, seed: int) -> str:
    drawn = np.random.default_rng(seed)
    split: dict[str, Any] = {
        f"x_{name}": drawn.integers(0, 256, (size, 8, 8, 3), np.uint8)
        for name, size in (("train", 64), ("test", 8))
    }
    np.savez(path, **split, y_train=np.arange(64) % 10, y_test=np.arange(8))
    return str(path)


def test_other_data_make_another_run(tmp_path: Path) -> None:
    """The path of the data is free, so that they may move; what lies there is not."""

    def on(root: str, name: str, seed: int = 0) -> Resolved:
        data = {
            "name": "npz",
            "root": root,
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "image_size": "auto",
        }
        return settings(tmp_path / name, data=data, optim={"max_steps": 2}, run={"seed": seed})

    first, moved, other = (
        npz(tmp_path / f"{name}.npz", seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    for root, name, seed in ((first, "1", 0), (moved, "2", 1), (other, "3", 2)):
        train(on(root, name, seed))
    assert train(on(moved, "1")) == 0
    with pytest.raises(
        UserError,
        match="npz in .* is not what the run in .*: other labels or images",
    ):
        prepare(on(other, "1"))
    found = compare_runs([tmp_path / name for name in "123"])
    assert [len(group.runs) for group in found.groups] == [2, 1]
    assert set(found.groups[0].differs) == {"data_sha256"}


# -- the reader of a run directory


def read_errors(run_dir: Path) -> set[str]:
    """Return the errors of every reader that needs a run, as one set."""
    directory = RunDirectory(run_dir)
    errors = set()
    for read in (directory.read, directory.config, directory.recorded_config):
        with pytest.raises(UserError) as caught:
            read()
        errors.add(str(caught.value))
    return errors


def test_every_reader_refuses_what_is_no_run_directory_with_one_sentence(tmp_path: Path) -> None:
    end = "expected config.yaml and metrics.jsonl; give the directory of a run"
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").touch()
    (tmp_path / "file").touch()
    contents = {"empty": "nothing", "gone": "nothing", "notes": "'notes.txt'", "file": "a file"}
    for name, content in contents.items():
        path = tmp_path / name
        assert read_errors(path) == {f"run: {path} is not a run directory: found {content}, {end}"}


def test_a_run_directory_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    assert RunDirectory(tmp_path).newest_checkpoint() is None
    with pytest.raises(UserError, match="holds no complete checkpoint yet; train it first"):
        RunDirectory(tmp_path).require_checkpoint()


def test_a_summary_of_another_number_of_steps_or_damaged_is_not_of_a_finished_run(
    tmp_path: Path,
) -> None:
    directory = RunDirectory(tmp_path)
    assert directory.summary() is None and directory.finished_summary(3) is None
    directory.summary_file.write_text('{"steps": 2}')
    assert directory.finished_summary(2) == {"steps": 2} and directory.finished_summary(3) is None
    directory.summary_file.write_text('{"steps":')
    assert directory.finished_summary(2) is None
    with pytest.raises(UserError, match="cannot read .*summary.json"):
        directory.summary()


@pytest.fixture
def run_of_gone_objective(tmp_path: Path) -> RunDirectory:
    """A run whose objective was a user's, in a file that is gone and was never imported here."""
    file = tmp_path / "gone.py"
    shutil.copy(ROOT / "examples" / "custom_objective.py", file)
    objective = {"name": f"{file}:Prototypes", "temperature": 1.0}
    recorded = to_yaml(settings(tmp_path / "run", method={"objective": objective}))
    elsewhere = recorded.replace(str(file), str(tmp_path / "elsewhere.py"))
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    directory.config_file.write_text(elsewhere)
    begin_records(directory.metrics_file, {"steps": 4}, 0, lambda step: False)
    return directory


def test_report_and_compare_need_no_code_of_a_run(run_of_gone_objective: RunDirectory) -> None:
    run = run_of_gone_objective.read()
    assert not run.config.has_objective
    assert run.config.method.objective["temperature"] == 1.0
    assert (run.stages, run.steps, run.last_step) == (4, 4, 0)
    assert compare_runs([run.folder]).unfinished == (run,)
    assert write_report(run.folder)[0].exists()


def test_a_run_with_code_of_its_own_is_read_when_the_code_is_named(
    run_of_gone_objective: RunDirectory,
) -> None:
    directory = run_of_gone_objective
    name = directory.read().config.method.objective["name"]
    with pytest.raises(UserError, match="names code of its own"):
        directory.recorded_config()
    with pytest.raises(UserError, match="objective: cannot import"):
        directory.recorded_config({name})
    with pytest.raises(UserError, match="objective: cannot import"):
        directory.config(overrides=[f"method.objective.name={name}"])

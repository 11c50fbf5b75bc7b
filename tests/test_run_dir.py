"""What a run may take over, and what it may throw away: a run's own files, never a user's."""

from __future__ import annotations

from pathlib import Path

import pytest

from localpipe import config as configs
from localpipe import job
from localpipe.errors import UserError
from localpipe.sections import Config
from tests.pipeline import settings, train


def again(run_dir: Path, overwrite: bool = True) -> Config:
    return configs.update(settings(run_dir), {"run.resume": "never", "run.overwrite": overwrite})


def test_overwriting_throws_away_the_run_and_nothing_else(tmp_path: Path) -> None:
    train(configs.update(settings(tmp_path), {"optim.max_steps": 2}))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "precious").mkdir()
    with pytest.raises(UserError, match="is not empty and run.resume is never; set run.overwrite=true"):
        job.prepare(again(tmp_path, overwrite=False))
    assert (tmp_path / "summary.json").exists()
    prepared = job.prepare(again(tmp_path))
    prepared.lock.close()
    assert prepared.job.start_step == 0 and not any((tmp_path / "checkpoints").glob("step_*"))
    assert not (tmp_path / "summary.json").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "precious").is_dir()


@pytest.mark.parametrize("name", ["notes.txt", "config.yaml"])
def test_a_folder_that_holds_no_run_is_not_thrown_away(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}\n")
    with pytest.raises(UserError, match=f"holds '{name}' and no run; choose another run.dir"):
        job.prepare(again(tmp_path))
    assert (tmp_path / name).read_text() == "{}\n"


def test_a_finished_run_says_nothing_of_steps_that_are_left(tmp_path: Path) -> None:
    config = configs.update(settings(tmp_path), {"optim.max_steps": 2})
    train(config)
    prepared = job.prepare(configs.update(config, {"run.resume": "auto"}))
    prepared.lock.close()
    assert prepared.summary is not None and not any("learning rate" in note for note in prepared.notes)

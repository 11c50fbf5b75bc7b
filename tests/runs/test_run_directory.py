"""What a run may take over, and what it may throw away: a run's own files, never a user's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from localpipe.config.load import update
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.results.compare import compare_runs
from localpipe.runs.prepare import prepare
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
    with pytest.raises(UserError, match=f"holds '{name}' and no run; choose another run.dir"):
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
    split = {
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
        UserError, match="npz holds other labels or images than the run in .* was started with"
    ):
        prepare(on(other, "1"))
    found = compare_runs([tmp_path / name for name in "123"])
    assert [len(group.runs) for group in found.groups] == [2, 1]
    assert set(found.groups[0].differs) == {"data_sha256"}

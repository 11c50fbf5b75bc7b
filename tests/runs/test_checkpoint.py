"""Checkpoints that are complete or absent, and what is said of damaged ones."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from localpipe.errors import RunError, UserError
from localpipe.runs.checkpoint import (
    FOLDER,
    MANIFEST,
    Checkpoint,
    Checkpoints,
    describe_kept,
    list_checkpoints,
    newest_checkpoint,
    stage_file,
)


def state(step: int, stage: int = 0) -> dict[str, Any]:
    """Return what a stage writes: tensors, plain numbers, nested dicts, None."""
    weights = {"conv.weight": torch.full((3, 4), float(step)), "bn.n": torch.tensor(stage)}
    momentum = {0: {"momentum_buffer": torch.ones(3, 4)}}
    return {
        "weights": weights,
        "optimizer": {"state": momentum, "lr": 0.1},
        "meter": {"loss": None},
        "step": step,
    }


def write(checkpoints: Checkpoints, step: int, stages: int = 2) -> None:
    for stage in range(stages):
        checkpoints.write_stage(step, stage, state(step, stage))


def committed(run_dir: Path, *steps: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(run_dir, 2, keep)
    for step in steps:
        write(checkpoints, step)
        checkpoints.commit(step, {"torch": "2"})
    return checkpoints


def steps(run_dir: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(run_dir / FOLDER)]


def newest_of(run_dir: Path) -> Checkpoint:
    found = newest_checkpoint(run_dir)
    assert found is not None
    return found


def refusal(run_dir: Path) -> str:
    """Return the one line with which the newest checkpoint, or its first stage, is refused."""
    with pytest.raises(UserError) as caught:
        newest_of(run_dir).load_stage(0)
    text = str(caught.value)
    assert text.startswith("checkpoint: ") and "\n" not in text and not text.endswith(".")
    return text


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step_{step:08d}"


# --- Complete or absent


def test_run_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    assert list_checkpoints(tmp_path / FOLDER) == []


def test_checkpoint_that_no_one_committed_is_absent(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.write_stage(10, 0, state(10))
    assert newest_checkpoint(tmp_path) is None
    checkpoints.write_stage(10, 1, state(10))
    assert newest_checkpoint(tmp_path) is None


def test_checkpoint_is_absent_up_to_the_rename_although_its_manifest_is_there(
    tmp_path: Path,
) -> None:
    checkpoints = committed(tmp_path, 10)
    write(checkpoints, 20)
    (partial,) = (tmp_path / FOLDER).glob(".step_*")
    (partial / MANIFEST).write_text(
        (folder(tmp_path, 10) / MANIFEST).read_text()
    )  # killed right before the rename
    assert newest_of(tmp_path).step == 10


def test_committed_checkpoint_has_every_stage_and_its_facts(tmp_path: Path) -> None:
    committed(tmp_path, 10)
    found = newest_of(tmp_path)
    assert found.step == 10 and found.path == folder(tmp_path, 10)
    assert {key: found.manifest[key] for key in ("schema", "stages", "torch")} == {
        "schema": 1,
        "stages": 2,
        "torch": "2",
    }
    for stage in (0, 1):
        loaded = found.load_stage(stage)
        assert torch.equal(loaded["weights"]["conv.weight"], state(10)["weights"]["conv.weight"])
        assert loaded["weights"]["bn.n"] == stage
        assert (
            loaded["optimizer"]["lr"] == 0.1
            and loaded["meter"] == {"loss": None}
            and loaded["step"] == 10
        )
        assert torch.equal(loaded["optimizer"]["state"][0]["momentum_buffer"], torch.ones(3, 4))


def test_commit_leaves_nothing_half_written(tmp_path: Path) -> None:
    committed(tmp_path, 10)
    assert os.listdir(tmp_path / FOLDER) == ["step_00000010"]
    assert sorted(os.listdir(folder(tmp_path, 10))) == [MANIFEST, "stage_0.pt", "stage_1.pt"]


def test_every_file_of_a_checkpoint_is_readable_with_weights_only(tmp_path: Path) -> None:
    committed(tmp_path, 10)
    for stage in (0, 1):
        loaded = torch.load(folder(tmp_path, 10) / stage_file(stage), weights_only=True)
        assert loaded["step"] == 10


def test_newest_is_the_greatest_step_and_not_the_latest_file(tmp_path: Path) -> None:
    committed(tmp_path, 9, 10, 1000, keep=9)
    os.utime(folder(tmp_path, 9))
    assert steps(tmp_path) == [9, 10, 1000] and newest_of(tmp_path).step == 1000


def test_older_checkpoints_go_when_enough_newer_ones_are_committed(tmp_path: Path) -> None:
    checkpoints = committed(tmp_path, 10, 20)
    assert steps(tmp_path) == [10, 20]
    write(checkpoints, 30)
    assert steps(tmp_path) == [10, 20]  # not before the new one counts
    checkpoints.commit(30, {})
    assert steps(tmp_path) == [20, 30]
    assert sorted(os.listdir(tmp_path / FOLDER)) == ["step_00000020", "step_00000030"]


def test_one_checkpoint_is_kept_where_one_is_asked_for(tmp_path: Path) -> None:
    committed(tmp_path, 10, 20, 30, keep=1)
    assert steps(tmp_path) == [30]


def test_step_that_is_committed_again_is_the_new_one(tmp_path: Path) -> None:
    checkpoints = committed(tmp_path, 10)
    for stage in (0, 1):
        checkpoints.write_stage(10, stage, {**state(10), "step": 11})
    checkpoints.commit(10, {})
    assert steps(tmp_path) == [10] and newest_of(tmp_path).load_stage(0)["step"] == 11


def test_stage_written_twice_counts_once_as_written_last(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    write(checkpoints, 10)
    checkpoints.write_stage(10, 0, {"step": 12})
    checkpoints.commit(10, {})
    assert newest_of(tmp_path).load_stage(0) == {"step": 12}


def test_sweep_removes_what_was_left_half_written_and_nothing_else(tmp_path: Path) -> None:
    checkpoints = committed(tmp_path, 10, 20)
    write(checkpoints, 30, stages=1)
    (tmp_path / FOLDER / ".step_00000005.old").mkdir()
    checkpoints.remove_partial()
    assert sorted(os.listdir(tmp_path / FOLDER)) == ["step_00000010", "step_00000020"]
    assert newest_of(tmp_path).load_stage(1)["step"] == 20


def test_sweep_of_a_run_without_checkpoints_does_nothing(tmp_path: Path) -> None:
    Checkpoints(tmp_path, 2).remove_partial()
    assert os.listdir(tmp_path) == []


# --- Damaged


def test_truncated_file_is_refused_with_both_sizes_and_what_to_do(tmp_path: Path) -> None:
    committed(tmp_path, 10, 20)
    file = folder(tmp_path, 20) / "stage_1.pt"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    text = refusal(tmp_path)
    assert f"{file} is {size - 1} bytes, expected {size} bytes" in text
    assert text.endswith(f"remove {folder(tmp_path, 20)} to go on from the checkpoint before it")


def test_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    committed(tmp_path, 10)
    (folder(tmp_path, 10) / "stage_1.pt").unlink()
    text = refusal(tmp_path)
    assert f"{folder(tmp_path, 10) / 'stage_1.pt'} is missing" in text and "; remove " in text


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"step": 10}',
        '{"files": [1], "step": 10}',
        '{"files": {}, "step": null}',
    ],
)
def test_damaged_manifest_is_refused_by_name(tmp_path: Path, content: str) -> None:
    committed(tmp_path, 10)
    (folder(tmp_path, 10) / MANIFEST).write_text(content)
    text = refusal(tmp_path)
    assert f"{folder(tmp_path, 10) / MANIFEST} is damaged; remove " in text


def test_manifest_that_is_no_text_is_refused(tmp_path: Path) -> None:
    committed(tmp_path, 10)
    (folder(tmp_path, 10) / MANIFEST).write_bytes(b"\xff\xfe")
    assert "is damaged" in refusal(tmp_path)


def overwrite(run_dir: Path, content: bytes) -> Path:
    """Replace the first stage's file by other content of the size that the manifest says."""
    file = folder(run_dir, 10) / "stage_0.pt"
    file.write_bytes(content)
    manifest = json.loads((folder(run_dir, 10) / MANIFEST).read_text())
    manifest["files"]["stage_0.pt"] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (folder(run_dir, 10) / MANIFEST).write_text(json.dumps(manifest))
    return file


@pytest.mark.parametrize(
    "content", [b"\0" * 5000, b"x" * 5000, b"PK\3\4" + b"\0" * 5000, b"(" * 5000, b""]
)
def test_file_of_the_right_size_that_is_no_checkpoint_is_refused(
    tmp_path: Path, content: bytes
) -> None:
    committed(tmp_path, 10)
    file = overwrite(tmp_path, content)
    text = refusal(tmp_path)
    assert f"{file} is not what was written" in text and f"; remove {folder(tmp_path, 10)} " in text


class Attack:
    """Unpickles into a call."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    committed(tmp_path, 10)
    marker = tmp_path / "ran"
    overwrite(tmp_path, pickle.dumps(Attack(marker), protocol=2))
    refusal(tmp_path)
    torch.save({"weights": Attack(marker)}, tmp_path / "evil.pt")
    overwrite(tmp_path, (tmp_path / "evil.pt").read_bytes())
    refusal(tmp_path)
    assert not marker.exists()


def test_refusal_of_a_damaged_file_does_not_advise_to_load_it_unsafely(tmp_path: Path) -> None:
    committed(tmp_path, 10)
    overwrite(tmp_path, b"x" * 5000)
    assert "weights_only" not in refusal(tmp_path)


def test_file_with_damaged_bytes_is_refused(tmp_path: Path) -> None:
    committed(tmp_path, 10)
    file = folder(tmp_path, 10) / "stage_0.pt"
    good, weight = file.read_bytes(), state(10)["weights"]["conv.weight"].numpy().tobytes()
    assert good.count(weight) == 1
    file.write_bytes(good.replace(weight, b"\xff" * len(weight)))
    assert "stage_0.pt" in refusal(tmp_path)


def test_the_advice_for_a_damaged_one_is_what_helps(tmp_path: Path) -> None:
    for step in (10, 20):
        committed(tmp_path, step)
    (folder(tmp_path, 20) / "stage_1.pt").write_bytes(b"")
    text = refusal(tmp_path)
    assert text.endswith(f"; remove {folder(tmp_path, 20)} to go on from the checkpoint before it")
    shutil.rmtree(folder(tmp_path, 20))
    assert newest_of(tmp_path).step == 10
    (folder(tmp_path, 10) / "stage_1.pt").write_bytes(b"")
    advice = f"; remove {folder(tmp_path, 10)} to begin anew, as there is no checkpoint before it"
    assert refusal(tmp_path).endswith(advice)
    shutil.rmtree(folder(tmp_path, 10))
    assert newest_checkpoint(tmp_path) is None


def test_what_cannot_be_read_is_not_to_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed(tmp_path, 10)
    checkpoint = newest_of(tmp_path)

    def deny(path: Path, *args: Any, **keywords: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    for read in ("read_bytes", "read_text"):
        monkeypatch.setattr(Path, read, deny)
    advice = "Permission denied; make it readable, and run the same command again"
    with pytest.raises(UserError, match=f"cannot read .*stage_0.pt: {advice}"):
        checkpoint.load_stage(0)
    with pytest.raises(UserError, match=f"cannot read .*manifest.json: {advice}"):
        newest_checkpoint(tmp_path)


# --- Unwritable


def test_a_run_that_fails_says_what_it_leaves(tmp_path: Path) -> None:
    assert describe_kept(tmp_path) == (
        "no checkpoint was complete yet, so the same command begins anew"
    )
    for step in (10, 20):
        committed(tmp_path, step)
    kept = "step_00000020 is untouched, and the same command goes on from it"
    assert describe_kept(tmp_path) == kept


def test_folder_that_cannot_be_made_ends_the_run_and_leaves_earlier_ones_readable(
    tmp_path: Path,
) -> None:
    checkpoints = committed(tmp_path, 10)
    (tmp_path / FOLDER / ".step_00000020.partial").write_text("in the way")
    with pytest.raises(
        RunError,
        match="checkpoint: cannot write .*stage_0.pt: .*; step_00000010 is untouched",
    ):
        checkpoints.write_stage(20, 0, state(20))
    assert newest_of(tmp_path).load_stage(0)["step"] == 10


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_full_disk_ends_the_run_and_leaves_earlier_ones_readable(tmp_path: Path) -> None:
    checkpoints = committed(tmp_path, 10)
    partial = tmp_path / FOLDER / ".step_00000020.partial"
    partial.mkdir()
    (partial / f".stage_0.pt.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(
        RunError, match="checkpoint: cannot write .*stage_0.pt: .*; step_00000010 is untouched"
    ) as caught:
        checkpoints.write_stage(20, 0, {"weights": torch.zeros(1 << 16)})
    assert "\n" not in str(caught.value)
    assert not (partial / "stage_0.pt").exists()
    assert newest_of(tmp_path).load_stage(0)["step"] == 10


def test_commit_that_fails_ends_the_run_and_leaves_earlier_ones_readable(tmp_path: Path) -> None:
    checkpoints = committed(tmp_path, 10)
    write(checkpoints, 20)
    (tmp_path / FOLDER / ".step_00000020.partial" / MANIFEST).mkdir()
    with pytest.raises(RunError, match="checkpoint: cannot commit .*step_00000020: .*untouched"):
        checkpoints.commit(20, {})
    assert steps(tmp_path) == [10] and newest_of(tmp_path).load_stage(1)["step"] == 10


# --- Repeated by a worker that goes on in place of a killed one


def test_stage_file_that_exists_is_not_written_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, repeats=True)
    write(checkpoints, 10)
    checkpoints.write_stage(10, 0, {"step": 12})
    checkpoints.commit(10, {})
    assert newest_of(tmp_path).load_stage(0)["step"] == 10
    for step in (10, 5):  # an older one may be gone already
        checkpoints.write_stage(step, 0, {"step": 12})
    assert os.listdir(tmp_path / FOLDER) == ["step_00000010"]


def test_committed_step_is_left_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, repeats=True)
    write(checkpoints, 10)
    checkpoints.commit(10, {"torch": "2"})
    checkpoints.commit(10, {"torch": "3"})
    assert newest_of(tmp_path).manifest["torch"] == "2"


class Killed(BaseException):
    """Stands for a kill at one moment."""


@pytest.mark.parametrize("calls", range(8))
def test_commit_goes_on_from_wherever_a_kill_left_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """The kill comes before one of the calls that change the disk."""
    checkpoints = Checkpoints(tmp_path, 2, keep=1, repeats=True)
    write(checkpoints, 10)
    checkpoints.commit(10, {})
    write(checkpoints, 20)
    left = calls

    def counted(call: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return call(*arguments, **options)

        return run

    with monkeypatch.context() as patched:
        for name in ("rename", "replace", "unlink"):
            patched.setattr(Path, name, counted(getattr(Path, name)))
        patched.setattr(shutil, "rmtree", counted(shutil.rmtree))
        try:
            checkpoints.commit(20, {})
        except Killed:
            assert steps(tmp_path) in ([10], [10, 20], [20])
        else:
            assert calls == 7, "one of the calls was not killed"

    for stage in (0, 1):  # the stages save again, then the last one commits again
        checkpoints.write_stage(20, stage, {"step": 21})
    checkpoints.commit(20, {})
    assert sorted(os.listdir(tmp_path / FOLDER)) == ["step_00000020"]
    found = newest_of(tmp_path)
    assert found.load_stage(0)["step"] == found.load_stage(1)["step"] == 20
    assert sorted(os.listdir(found.path)) == [MANIFEST, "stage_0.pt", "stage_1.pt"]

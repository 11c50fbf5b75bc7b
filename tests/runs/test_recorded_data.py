"""A run that is resumed on other data: refused by name, or accepted, and nothing is lost."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from localpipe import config as configs
from localpipe.config.keys import Config
from localpipe.errors import UserError
from localpipe.pipeline.workers.mesh import Mesh, open_file_store
from localpipe.pipeline.workers.phase import PhaseTimer
from localpipe.runs.directory import RunDirectory
from localpipe.runs.lock import acquire_lock
from localpipe.runs.prepare import Prepared, prepare
from localpipe.runs.recorded_data import RecordedData, read_listing
from localpipe.runs.train_worker import assemble
from tests.harness import train

TRAIN, TEST = 8, 4  # images of a class


def photos(root: Path, classes: str = "cat,dog,fox") -> Path:
    """Write PNGs of 8 x 8."""
    drawn = np.random.default_rng(0)
    for part, images in (("train", TRAIN), ("test", TEST)):
        for name in classes.split(","):
            (root / part / name).mkdir(parents=True)
            for i in range(images):
                pixels = drawn.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def npz(path: Path, seed: int = 0, **changes: Any) -> Path:
    """Write 24 images of 3 classes, and 6 for tests."""
    images = np.random.default_rng(seed).integers(0, 256, (24, 8, 8, 3), np.uint8)
    labels = np.arange(24) % 3
    content = {"x_train": images, "y_train": labels, "x_test": images[:6], "y_test": labels[:6]}
    np.savez(path, **{**content, **changes})
    return path


def given(run_dir: Path, root: Path, **keys: Any) -> Config:
    """Return what a user gives, with every `auto` of the data: 24 images are 3 steps an epoch."""
    sections: dict[str, Any] = {
        "model": {"name": "tests.sample_networks:small"},
        "pipeline": {"stages": 2, "processes": 1},
        "data": {
            "name": "npz" if root.suffix else "image_folder",
            "root": str(root),
            "batch_size": 8,
            "augment": "none",
        },
        "optim": {"lr": 0.05, "schedule": "constant", "epochs": 2, "max_steps": 4},
        "run": {"dir": str(run_dir), "device": "cpu", "threads": 1},
    }
    for key, value in keys.items():
        section, name = key.split("__")
        sections[section][name] = value
    return configs.parse(sections, "test")


ON: dict[str, Any] = {"optim__max_steps": None}  # what lets a run go on from step 4 to 6


def start(config: Config) -> Prepared:
    prepared = prepare(config)
    prepared.lock.close()
    return prepared


def refusal(config: Config) -> str:
    """Return the one line with which a run is refused."""
    with pytest.raises(UserError) as caught:
        prepare(config)
    text = str(caught.value)
    assert text.startswith(("data: ", "run: ", "config: ")) and "\n" not in text
    return text


def manifest(run_dir: Path) -> dict[str, Any]:
    checkpoint = RunDirectory(run_dir).newest_checkpoint()
    assert checkpoint is not None
    return dict(checkpoint.manifest)


def change_manifest(run_dir: Path, *removed: str, **values: Any) -> None:
    checkpoint = RunDirectory(run_dir).newest_checkpoint()
    assert checkpoint is not None
    kept = {key: value for key, value in checkpoint.manifest.items() if key not in removed}
    (checkpoint.path / "manifest.json").write_text(json.dumps({**kept, **values}))


def digest(run_dir: Path) -> str:
    summary = RunDirectory(run_dir).summary()
    assert summary is not None
    return str(summary["weights_sha256"])


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run on tmp_path/ph that stopped after step 4, in the second epoch."""
    train(given(tmp_path / "run", photos(tmp_path / "ph")))
    return tmp_path / "run"


# --- what is recorded


def test_a_run_records_what_its_data_are(run_dir: Path) -> None:
    found = manifest(run_dir)
    assert found["classes"] == ["cat", "dog", "fox"]
    assert (found["data_rules"], found["data_changed"]) == (2, [])
    listing = read_listing(RunDirectory(run_dir), found["data_sha256"])
    assert listing is not None and listing.count("\ttrain/cat/") == TRAIN
    (file,) = (run_dir / "files").iterdir()
    assert file.name == f"{found['data_sha256'][:16]}.txt.gz"
    content = file.read_bytes()
    file.unlink()
    start(given(run_dir, run_dir.parent / "ph", **ON))
    assert file.read_bytes() == content  # the same list has the same bytes


def test_arrays_have_no_list(tmp_path: Path) -> None:
    start(given(tmp_path / "run", npz(tmp_path / "a.npz")))
    assert not (tmp_path / "run" / "files").exists()


def test_a_manifest_of_an_earlier_version_says_nothing_of_classes() -> None:
    assert RecordedData.from_manifest({}) == RecordedData(1, None, None, ())


def test_a_run_that_starts_anew_keeps_no_list(run_dir: Path) -> None:
    (run_dir.parent / "ph" / "train" / "cat" / "0.png").unlink()
    again = {"run__resume": "never", "run__overwrite": True}
    prepared = start(given(run_dir, run_dir.parent / "ph", **again))
    (file,) = (run_dir / "files").iterdir()
    assert prepared.job.data_sha256.startswith(file.name.split(".")[0])


# --- the same data elsewhere


def test_data_that_have_moved_are_the_same(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "ph").rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to("moved")
    for root in (tmp_path / "moved", tmp_path / "link"):
        prepared = start(given(run_dir, root, **ON))
        assert prepared.job.start_step == 4 and prepared.job.data_changed == []


# --- other data


def test_other_data_are_refused_by_the_names_of_files(run_dir: Path, tmp_path: Path) -> None:
    cat = tmp_path / "ph" / "train" / "cat"
    (cat / "0.png").rename(cat / "new.png")
    with open(tmp_path / "ph" / "test" / "dog" / "1.png", "ab") as file:
        file.write(b"\0")
    assert refusal(given(run_dir, tmp_path / "ph", **ON)) == (
        f"data: image_folder in {tmp_path}/ph is not what the run in {run_dir} was trained on: "
        "1 file is gone (train/cat/0.png), 1 file is new (train/cat/new.png), "
        "1 file is of another size (test/dog/1.png); give it the same data, "
        "go on with these by data.changed=accept, or choose another run.dir"
    )


def test_a_refused_run_leaves_its_directory_free(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "ph" / "train" / "cat" / "0.png").unlink()
    with pytest.raises(UserError) as caught:
        prepare(given(run_dir, tmp_path / "ph", **ON))
    # A caller who keeps the error keeps the frames in which the lock was taken.
    acquire_lock(run_dir, 0.0).close()
    assert caught.value.__traceback__ is not None


def test_swapped_parts_are_refused(run_dir: Path, tmp_path: Path) -> None:
    root = tmp_path / "ph"
    for old, new in (("train", "t"), ("test", "train"), ("t", "test")):
        (root / old).rename(root / new)
    text = refusal(given(run_dir, root, **ON))
    assert f"{3 * (TRAIN - TEST)} files are gone" in text


@pytest.mark.parametrize("content", [None, b"", b"no gzip"])
def test_without_its_list_a_run_says_no_names(
    run_dir: Path, tmp_path: Path, content: bytes | None
) -> None:
    (file,) = (run_dir / "files").iterdir()
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    (tmp_path / "ph" / "train" / "cat" / "0.png").unlink()
    text = refusal(given(run_dir, tmp_path / "ph", **ON))
    assert "other image files (the run has no list of the ones before)" in text


def test_accepted_data_are_recorded_and_hold_for_later_resumes(
    run_dir: Path, tmp_path: Path
) -> None:
    root = tmp_path / "ph"
    first = manifest(run_dir)["data_sha256"]
    (root / "train" / "cat" / "0.png").unlink()

    # Until the next checkpoint every start must accept it, and none forgets the names.
    accepted = {**ON, "data__changed": "accept"}
    for _ in range(2):
        prepared = start(given(run_dir, root, **accepted))
        second = prepared.job.data_sha256
        change = {"step": 4, "from": first, "to": second}
        assert prepared.job.data_changed == [change]
        note = "note: data.changed=accept: from step 4 on with other data: 1 file is gone "
        assert f"{note}(train/cat/0.png)" in prepared.notes
        record = next(RunDirectory(run_dir).records())
        assert (record["kind"], record["data_changed"]) == ("start", [change])
        assert "1 file is gone (train/cat/0.png)" in refusal(given(run_dir, root, **ON))

    # The next checkpoint is of the new data.
    train(given(run_dir, root, **accepted))
    found = manifest(run_dir)
    assert (found["step"], found["data_sha256"]) == (6, second)
    assert found["data_changed"] == [change]
    longer = {**ON, "optim__epochs": 3}
    assert start(given(run_dir, root, **longer)).job.data_changed == [change]
    (root / "train" / "cat" / "1.png").unlink()
    assert "1 file is gone (train/cat/1.png)" in refusal(given(run_dir, root, **longer))
    last = start(given(run_dir, root, **longer, data__changed="accept")).job.data_changed
    assert [each["step"] for each in last] == [4, 6] and last[1]["from"] == second


def test_data_that_are_restored_leave_no_trace(run_dir: Path, tmp_path: Path) -> None:
    train(given(tmp_path / "whole", tmp_path / "ph", **ON))
    file = tmp_path / "ph" / "train" / "cat" / "0.png"
    file.rename(tmp_path / "kept")
    start(given(run_dir, tmp_path / "ph", **ON, data__changed="accept"))
    (tmp_path / "kept").rename(file)
    train(given(run_dir, tmp_path / "ph", **ON))
    assert digest(run_dir) == digest(tmp_path / "whole") and manifest(run_dir)["data_changed"] == []


def test_fewer_images_make_shorter_epochs_and_steps_count_on(run_dir: Path, tmp_path: Path) -> None:
    for name in ("cat", "dog", "fox"):
        for i in range(3):
            (tmp_path / "ph" / "train" / name / f"{i}.png").unlink()
    accepted = {**ON, "data__changed": "accept"}
    # 15 images are 2 steps an epoch, so two epochs are the 4 steps that were made.
    text = refusal(given(run_dir, tmp_path / "ph", **accepted, optim__epochs=1))
    assert "has already made 4 steps, more than the 2 asked for; raise optim.epochs" in text
    train(given(run_dir, tmp_path / "ph", **accepted, optim__epochs=4))
    assert manifest(run_dir)["step"] == 8
    evaluated = {r["step"] for r in RunDirectory(run_dir).records() if r["kind"] == "eval"}
    assert evaluated == {3, 4, 6, 8}  # that of step 3 ended an epoch of before
    summary = RunDirectory(run_dir).summary()
    assert summary is not None and summary["steps"] == 8


def test_arrays_that_are_accepted_keep_the_normalisation(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(given(run_dir, npz(tmp_path / "a.npz")))
    mean = RunDirectory(run_dir).recorded_config().data.mean
    npz(tmp_path / "a.npz", seed=1)
    assert "trained on: other labels or images; give" in refusal(given(run_dir, tmp_path / "a.npz"))
    accepted = {**ON, "data__changed": "accept"}
    prepared = start(given(run_dir, tmp_path / "a.npz", **accepted))
    assert prepared.config.data.mean == mean
    images = np.zeros((24, 9, 9, 3), np.uint8)
    npz(tmp_path / "a.npz", x_train=images, x_test=images[:6])
    text = refusal(given(run_dir, tmp_path / "a.npz", **accepted))
    assert "has images of shape (3, 9, 9), the run was made for (3, 8, 8)" in text
    npz(tmp_path / "a.npz", y_train=np.arange(24) % 4)
    text = refusal(given(run_dir, tmp_path / "a.npz", **accepted))
    assert "its largest label is 3, and the network has 3 outputs; give it the same" in text


# --- other classes


def test_a_renamed_class_is_refused_whatever_is_accepted(run_dir: Path, tmp_path: Path) -> None:
    root = tmp_path / "ph"
    for part in ("train", "test"):
        (root / part / "cat").rename(root / part / "puma")
    text = refusal(given(run_dir, root, **ON))
    assert text == refusal(given(run_dir, root, **ON, data__changed="accept"))
    assert f"{TRAIN + TEST} files are gone (train/cat/0.png, " in text
    advice = f"or begin another run.dir with its weights: run.init_from={run_dir}"
    assert text.endswith(
        f"1 class is gone (cat), 1 class is new (puma); give it the same data, {advice}"
    )
    # The advice can be followed.
    prepared = start(given(tmp_path / "next", root, run__init_from=str(run_dir)))
    (note,) = (note for note in prepared.notes if "tensors taken" in note)
    assert "  trained for other classes: 1 class is gone (cat), 1 class is new (puma)" in note


def test_a_new_class_is_refused_before_its_label_has_no_output(
    run_dir: Path, tmp_path: Path
) -> None:
    for part in ("train", "test"):
        shutil.copytree(tmp_path / "ph" / part / "cat", tmp_path / "ph" / part / "ape")
    text = refusal(given(run_dir, tmp_path / "ph", **ON, data__changed="accept"))
    assert "1 class is new (ape); give it the same data, or begin another run.dir" in text


def test_a_class_without_images_keeps_its_number(run_dir: Path, tmp_path: Path) -> None:
    for part in ("train", "test"):
        shutil.rmtree(tmp_path / "ph" / part / "cat")
    assert "cat/0.png" in refusal(given(run_dir, tmp_path / "ph", **ON))
    prepared = start(given(run_dir, tmp_path / "ph", **ON, data__changed="accept", optim__epochs=3))
    assert prepared.config.data.classes == ("cat", "dog", "fox")
    assert prepared.config.model.num_classes == 3


def test_names_that_a_user_gave_once_count_at_a_resume(tmp_path: Path) -> None:
    root, run_dir = photos(tmp_path / "ph"), tmp_path / "run"
    train(given(run_dir, root, data__classes=["owl", "fox", "dog", "cat"]))
    prepared = start(given(run_dir, root, **ON))
    assert prepared.config.data.classes == ("owl", "fox", "dog", "cat")
    assert prepared.job.start_step == 4 and prepared.job.data_changed == []


def test_no_names_of_the_users_are_the_datas_own_at_a_resume(tmp_path: Path) -> None:
    root, run_dir = photos(tmp_path / "ph"), tmp_path / "run"
    train(given(run_dir, root, data__classes=None))
    prepared = start(given(run_dir, root, **ON, data__classes=None))
    assert prepared.config.data.classes == ("cat", "dog", "fox")
    assert prepared.job.start_step == 4


def test_names_in_an_npz_file_count(tmp_path: Path) -> None:
    run_dir, file = tmp_path / "run", tmp_path / "a.npz"
    train(given(run_dir, npz(file, classes=np.array(["a", "b", "c"]))))
    assert start(given(run_dir, file, **ON)).job.start_step == 4
    npz(file, classes=np.array(["a", "b", "d"]))
    text = refusal(given(run_dir, file, **ON, data__changed="accept"))
    assert "1 class is gone (c), 1 class is new (d)" in text and "run.init_from=" in text


def test_other_classes_without_a_checkpoint_begin_anew(tmp_path: Path) -> None:
    root, run_dir = photos(tmp_path / "ph"), tmp_path / "run"
    start(given(run_dir, root))
    for part in ("train", "test"):
        (root / part / "cat").rename(root / part / "puma")
    text = refusal(given(run_dir, root))
    assert text.endswith(
        "it has no checkpoint, so begin it anew with run.resume=never run.overwrite=true"
    )
    prepared = start(given(run_dir, root, run__resume="never", run__overwrite=True))
    assert prepared.config.data.classes == ("dog", "fox", "puma")


# --- runs of earlier versions


OLD = ("data_rules", "classes", "data_changed")


def test_an_old_run_on_image_files_ends_and_its_weights_go_on(
    run_dir: Path, tmp_path: Path
) -> None:
    change_manifest(run_dir, *OLD, data_sha256="0" * 64)
    for changed in ("refuse", "accept"):
        text = refusal(given(run_dir, tmp_path / "ph", **ON, data__changed=changed))
        assert "an earlier version, which read transparent, turned and 16-bit image files" in text
        assert text.endswith(f"with its weights: run.init_from={run_dir}")
    start(given(tmp_path / "next", tmp_path / "ph", run__init_from=str(run_dir)))


def test_a_finished_old_run_on_image_files_prints_its_summary(
    run_dir: Path, tmp_path: Path
) -> None:
    train(given(run_dir, tmp_path / "ph", **ON))
    change_manifest(run_dir, *OLD, data_sha256="0" * 64)
    before = (run_dir / "config.yaml").read_bytes()
    prepared = start(given(run_dir, tmp_path / "ph", **ON))
    assert prepared.summary is not None and prepared.summary["steps"] == 6
    assert (run_dir / "config.yaml").read_bytes() == before
    text = refusal(given(run_dir, tmp_path / "ph", **ON, optim__epochs=3))
    assert text.endswith(f"run.init_from={run_dir}")


def test_an_old_run_on_arrays_goes_on(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(given(run_dir, npz(tmp_path / "a.npz")))
    change_manifest(run_dir, *OLD)
    assert start(given(run_dir, tmp_path / "a.npz", **ON)).job.start_step == 4


# --- more epochs


@pytest.mark.parametrize("max_steps", [None, 1, 4, 6])
def test_more_epochs_are_those_of_a_longer_run(tmp_path: Path, max_steps: int | None) -> None:
    file = npz(tmp_path / "a.npz")
    for name, epochs in (("short", 2), ("long", 3)):
        limit = max_steps if name == "short" else None
        train(given(tmp_path / name, file, optim__epochs=epochs, optim__max_steps=limit))
    train(given(tmp_path / "short", file, **ON, optim__epochs=3))
    assert digest(tmp_path / "short") == digest(tmp_path / "long")
    found = [RunDirectory(tmp_path / name) for name in ("short", "long")]
    summaries = [directory.summary() for directory in found]
    for key in ("epochs", "steps", "test_accuracy", "best_epoch", "loss_per_stage"):
        assert len({json.dumps(summary[key]) for summary in summaries if summary}) == 1, key
    evaluated = [
        [(r["step"], r["stage"], r["loss"]) for r in directory.records() if r["kind"] == "eval"]
        for directory in found
    ]
    assert sorted(evaluated[0]) == sorted(evaluated[1])
    assert found[0].recorded_config().optim.epochs == 3


def test_fewer_epochs_end_a_run_unless_it_has_made_more(tmp_path: Path) -> None:
    file, run_dir = npz(tmp_path / "a.npz"), tmp_path / "run"
    train(given(run_dir, file, optim__epochs=4, optim__max_steps=6))
    text = refusal(given(run_dir, file, **ON, optim__epochs=1))
    assert "has already made 6 steps, more than the 3 asked for; raise optim.epochs" in text
    assert start(given(run_dir, file, **ON, optim__epochs=2)).summary is not None
    assert "set optim.max_steps to at least 6" in refusal(given(run_dir, file, optim__max_steps=5))


# --- workers


def test_a_worker_that_reads_other_data_says_so(tmp_path: Path) -> None:
    prepared = start(given(tmp_path / "run", npz(tmp_path / "a.npz")))
    npz(tmp_path / "a.npz", seed=1)
    (tmp_path / "store").mkdir()
    mesh = Mesh(0, 1, open_file_store(tmp_path / "store"), local=True)
    with pytest.raises(UserError, match="data: rank 0 reads other data in .*a.npz than the run"):
        assemble(mesh, prepared.config, prepared.job, PhaseTimer())
    job = dataclasses.replace(prepared.job, data_sha256="")  # of a job that compares nothing
    assemble(mesh, prepared.config, job, PhaseTimer())

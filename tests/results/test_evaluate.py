"""Evaluation of a run: on its own images, on others matched by name, and image by image."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from localpipe.cli.command_line import main
from localpipe.config.load import to_yaml, update
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.results.evaluate import Evaluation, evaluate
from localpipe.results.export import load
from localpipe.results.predictions import Predictions
from localpipe.runs.records import read_records
from localpipe.tasks.metric import ACCURACY
from tests import harness

ODD = ("a,b", os.fsdecode(b"caf\xe9"), "line\nbreak", 'quo"te')
TEST_IMAGES = 5


def write_photos(root: Path, names: tuple[str, ...], parts: dict[str, int]) -> Path:
    """Write folders of images (8, 8) that differ in colour; return the root."""
    generator = np.random.default_rng(0)
    for part, count in parts.items():
        for index, name in enumerate(names):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 130, (8, 8, 3), np.uint8)
                pixels[..., index % 3] += np.uint8(60 + 30 * (index // 3))
                Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def train(folder: Path, root: Path, **sections: dict[str, Any]) -> Resolved:
    """Train the small network on a folder, with probes; return its configuration."""
    config = harness.settings(
        folder,
        data={"name": "image_folder", "root": str(root), "augment": "none"},
        pipeline={"stages": 2},
        optim={"lr": 0.1, "epochs": 3},
        run={"probe": "linear"},
        **sections,
    )
    harness.run(config)
    (folder / "config.yaml").write_text(to_yaml(config))
    return config


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of four classes with odd names."""
    return write_photos(tmp_path_factory.mktemp("photos"), ODD, {"train": 12, "test": TEST_IMAGES})


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Resolved:
    """A run on them. Its first stage has no exit, only a probe."""
    contrast = {"objective": {"name": "infopro", "task": "contrast"}}
    return train(tmp_path_factory.mktemp("runs") / "odd", photos, method=contrast)


@pytest.fixture(scope="module")
def own(config: Resolved) -> Evaluation:
    """The evaluation of the run on its own test images."""
    return evaluate(Path(config.run.dir), config)


def on(config: Resolved, root: Path, **values: Any) -> Evaluation:
    """Evaluate the run on another folder."""
    given = update(config, {"data.root": str(root), **values})
    return evaluate(Path(config.run.dir), given)


def predictions_of(evaluation: Evaluation) -> Predictions:
    assert isinstance(evaluation.predictions, Predictions), "a prediction is a class"
    return evaluation.predictions


def truth(evaluation: Evaluation) -> list[list[int]]:
    confusion = predictions_of(evaluation).confusion()
    assert confusion is not None
    return [list(map(int, row)) for row in confusion]


# -- the run's own images


def test_the_figures_are_those_of_the_run(config: Resolved, own: Evaluation) -> None:
    records = [
        record
        for record in read_records(Path(config.run.dir) / "metrics.jsonl")
        if record["kind"] == "eval" and record["epoch"] == 3
    ]
    keys = ("step", "epoch", "stage", "loss", "accuracy", "probe_accuracy", "samples")
    recorded = {record["stage"]: {key: record[key] for key in keys} for record in records}
    assert {r["stage"]: {key: r[key] for key in keys} for r in own.stages} == recorded
    assert own.stages[0]["accuracy"] is None and own.stages[0]["probe_accuracy"] is not None


def test_the_predictions_are_those_of_the_network(config: Resolved, own: Evaluation) -> None:
    images = [
        np.asarray(Image.open(Path(config.data.root) / file))
        for file in predictions_of(own).files or ()
    ]
    logits = load(config.run.dir, trust=True)(
        torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy())
    )
    assert torch.equal(torch.from_numpy(predictions_of(own).predicted), logits.argmax(1))
    expected = logits.softmax(1).max(1).values.detach()
    torch.testing.assert_close(torch.from_numpy(predictions_of(own).probability), expected)
    confusion = truth(own)
    assert [sum(row) for row in confusion] == [TEST_IMAGES] * 4
    right = sum(confusion[index][index] for index in range(4))
    assert right / (4 * TEST_IMAGES) == own.stages[-1]["accuracy"]


def test_every_image_is_a_row_whatever_the_names_are(
    own: Evaluation, photos: Path, tmp_path: Path
) -> None:
    path = tmp_path / "predictions.csv"
    predictions_of(own).write_csv(path)
    with open(path, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["path", "class", "prediction", "probability"]
    names = ["a,b", "caf\\udce9", "line\nbreak", 'quo"te']
    paths = [f"test/{name}/{number}.png" for name in names for number in range(TEST_IMAGES)]
    assert [row[:2] for row in rows] == [
        [path, names[index // TEST_IMAGES]] for index, path in enumerate(paths)
    ]
    assert {row[2] for row in rows} <= set(names)
    assert all(0.25 <= float(row[3]) <= 1 for row in rows)


def test_the_command_prints_classes_and_a_matrix(
    config: Resolved, own: Evaluation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "predictions.csv"
    words = ["eval", config.run.dir, "--trust", "--predictions", str(target)]
    assert main([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["classes"] == list(ODD) and shown["confusion"] == truth(own)
    assert shown["accuracy_per_class"] == predictions_of(own).accuracy_per_class()
    assert shown["stages"] == own.stages and target.exists()
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "probe accuracy" in printed and '3 quo"te' in printed and "line\\nbreak" in printed
    assert printed.splitlines()[-1].startswith("whole network: accuracy ")


def test_names_that_are_no_text_end_no_command(
    config: Resolved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(config.run.dir, run_dir)
    output = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(output, "utf-8"))
    assert main(["eval", str(run_dir), "--trust"]) == 0
    assert main(["report", str(run_dir)]) == 0
    assert main(["export", str(run_dir), "--trust", "-o", str(run_dir / "net.pt")]) == 0
    assert output.getvalue().decode().count("caf\\udce9") >= 3
    assert "caf\\udce9</title>" in (run_dir / "report.html").read_text(encoding="utf-8")


def test_a_class_is_listed_with_what_it_is_most_often_taken_for() -> None:
    predictions = Predictions(
        predicted=np.array([0, 2, 2, 1, 1]),
        probability=np.full(5, 0.5, np.float32),
        labels=np.array([0, 0, 0, 1, 1]),
        files=None,
        num_classes=4,
        names=("x", "y"),
    )
    assert truth(Evaluation([], ACCURACY, predictions, ())) == [
        [1, 0, 2, 0], [0, 2, 0, 0], [0] * 4, [0] * 4
    ]  # fmt: skip
    assert predictions.accuracy_per_class() == [1 / 3, 1, None, None]
    assert [predictions.name(index) for index in range(3)] == ["x", "y", "2"]


# -- other images, by name


def test_classes_are_matched_by_name(
    config: Resolved, own: Evaluation, photos: Path, tmp_path: Path
) -> None:
    """The same images without one class and without training images."""
    shutil.copytree(photos / "test", tmp_path / "test")
    shutil.rmtree(tmp_path / "test" / ODD[0])
    found = on(config, tmp_path)
    assert truth(found) == [[0] * 4, *truth(own)[1:]]
    assert f"note: {tmp_path}/test has no images of 1 of 4 classes (a,b)" in found.notes


def test_a_class_that_was_not_trained_is_refused(
    config: Resolved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photos(tmp_path, ("a,b", "wolf"), {"test": 1})
    assert main(["eval", config.run.dir, "--trust", f"data.root={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "test has a class 'wolf', which is not one of the 4 that are trained" in error
    assert "line\\nbreak" in error and error.count("\n") == 1


@pytest.mark.parametrize("part", ["val", "valid", "validation", "", "a,b"])
def test_the_images_lie_in_any_of_the_usual_places(
    config: Resolved, own: Evaluation, photos: Path, tmp_path: Path, part: str
) -> None:
    """Also in the root itself, and a class may have the name of a part."""
    root = tmp_path
    if part == "a,b":
        shutil.copytree(photos / "test", root / "only", dirs_exist_ok=True)
        root = root / "only"
    else:
        shutil.copytree(photos / "test", root / part, dirs_exist_ok=True)
    assert truth(on(config, root)) == truth(own)


@pytest.mark.parametrize("part", ["", "test"])
def test_images_without_labels_are_predicted(
    config: Resolved, own: Evaluation, photos: Path, tmp_path: Path, part: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "images" / part
    folder.mkdir(parents=True)
    for number in range(TEST_IMAGES):
        shutil.copy(photos / "test" / ODD[1] / f"{number}.png", folder)
    target = tmp_path / "predictions.csv"
    words = ["eval", config.run.dir, "--trust", f"data.root={tmp_path / 'images'}"]
    assert main([*words, "--predictions", str(target), "--json"]) == 0
    captured = capsys.readouterr()
    shown = json.loads(captured.out)
    assert [stage["accuracy"] for stage in shown["stages"]] == [None, None]
    assert shown["confusion"] is None and shown["accuracy_per_class"] is None
    assert shown["classes"] == list(ODD) and "have no labels" in captured.err
    rows = list(csv.DictReader(target.read_text(encoding="utf-8").splitlines()))
    assert [row["path"] for row in rows] == [
        os.path.join(part, f"{number}.png") for number in range(TEST_IMAGES)
    ]
    assert {row["class"] for row in rows} == {""}
    expected = predictions_of(own).predicted[TEST_IMAGES : 2 * TEST_IMAGES]
    found = evaluate(Path(config.run.dir), update(config, {"data.root": str(tmp_path / "images")}))
    assert list(predictions_of(found).predicted) == list(expected)
    assert main(words) == 0
    assert f"accuracy -, {TEST_IMAGES} samples without labels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folders", "reason"),
    [
        ([], "has no images; expected a folder of images per class, or images without"),
        (["train"], "is not a folder, and .* has no folder of a trained class"),
        (["wolf", "fox"], "is not a folder, and .* has no folder of a trained class"),
        (["test"], "test has no images; expected"),
        (None, "is not a folder; expected"),
    ],
)
def test_a_folder_without_test_images_is_refused(
    config: Resolved, tmp_path: Path, folders: list[str] | None, reason: str
) -> None:
    root = tmp_path / "root"
    if folders is not None:
        root.mkdir()
        for name in folders:
            (root / name).mkdir()
    with pytest.raises(UserError, match=reason):
        on(config, root)


def test_broken_images_are_listed_before_the_work(config: Resolved, tmp_path: Path) -> None:
    write_photos(tmp_path, ("a,b",), {"test": 3})
    (tmp_path / "test" / "a,b" / "1.png").write_text("no image")
    with pytest.raises(UserError, match="1 of 3 image files cannot be read"):
        on(config, tmp_path)


# -- runs of older versions, and images without names


def test_a_run_without_names_is_evaluated_by_position_with_a_note(
    config: Resolved, own: Evaluation, photos: Path, tmp_path: Path
) -> None:
    old = update(config, {"data.classes": None})
    found = evaluate(Path(config.run.dir), old)
    assert truth(found) == truth(own) and predictions_of(found).names == ODD
    assert "recorded no names of classes" in found.notes[-1]
    # Positions of fewer folders would be those of other classes.
    shutil.copytree(photos / "test", tmp_path / "test")
    shutil.rmtree(tmp_path / "test" / ODD[0])
    with pytest.raises(UserError, match="has 3 classes, but the run has 4 and recorded no names"):
        on(old, tmp_path)
    assert truth(on(old, tmp_path, **{"data.classes": list(ODD)}))[1:] == truth(own)[1:]


def write_arrays(path: Path, channels: int = 3, labels: bool = True) -> Path:
    generator = np.random.default_rng(0)
    arrays = {"x_test": generator.integers(0, 256, (6, 8, 8, channels), np.uint8)}
    if labels:
        arrays["y_test"] = np.array([0, 1, 2, 0, 1, 2])
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("labels", [True, False])
def test_arrays_need_no_training_images_and_no_labels(
    config: Resolved, tmp_path: Path, labels: bool
) -> None:
    path = write_arrays(tmp_path / "own.npz", labels=labels)
    found = on(config, path, **{"data.name": "npz"})
    assert found.stages[-1]["samples"] == 6 and predictions_of(found).names == ODD
    assert (found.stages[-1]["accuracy"] is None) is not labels
    note = "npz has no names of classes; its labels are taken by position"
    assert (f"note: {note}" in found.notes) is labels
    predictions_of(found).write_csv(tmp_path / "predictions.csv")
    with open(tmp_path / "predictions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["index"] for row in rows] == [str(index) for index in range(6)]
    assert rows[1]["class"] == ("caf\\udce9" if labels else "")


def test_images_of_another_shape_are_told(config: Resolved, tmp_path: Path) -> None:
    path = write_arrays(tmp_path / "gray.npz", channels=1)
    with pytest.raises(UserError, match="have 1 channels, but the run was trained on images of 3"):
        on(config, path, **{"data.name": "npz"})
    with pytest.raises(UserError, match="largest label of the test images is 9, but the run has 4"):
        on(config, tmp_path, **{"data.name": "synthetic", "data.image_size": 8})


def test_a_network_of_convolutions_takes_images_of_another_size(config: Resolved) -> None:
    found = evaluate(Path(config.run.dir), update(config, {"data.image_size": 12}))
    assert found.stages[-1]["samples"] == 4 * TEST_IMAGES


def test_weights_that_fit_one_size_alone_are_told(tmp_path: Path) -> None:
    config = harness.settings(
        tmp_path / "run",
        model={"name": "vit_tiny", "args": {"depth": 2, "width": 8, "heads": 2, "patch": 4}},
        pipeline={"stages": 2},
        optim={"epochs": 1},
    )
    harness.run(config)
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(UserError, match=r"fits \(3, 8, 8\) alone; give images of that shape"):
        evaluate(tmp_path / "run", update(config, {"data.image_size": 12}))


# -- mistakes


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["model.args={width: 4}"], "model.args is {'width': 4}, but the run in"),
        (["method.context=R1E"], "method.context.mode is 'R1E', but the run in"),
        (["method=dgl"], "method.objective.name is 'dgl', but the run in"),
        (["pipeline.stages=3"], "pipeline.stages is 3, but the run in"),
        (["optim.lr=1"], "optim.lr is 1.0, but the run in"),
        (["data.classes=[a, b]"], "data.classes is ['a', 'b'], but the run in"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "export"])
def test_an_override_that_contradicts_the_run_is_refused(
    config: Resolved,
    tmp_path: Path,
    command: str,
    words: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = ["-o", str(tmp_path / "net.pt")] if command == "export" else []
    assert main([command, config.run.dir, "--trust", *target, *words]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.endswith("; leave it out\n") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_override_that_says_what_is_recorded_is_accepted(config: Resolved) -> None:
    words = ["pipeline.stages=2", "optim.lr=auto", "run.precision=bf16", "data.batch_size=7"]
    words += ["method.objective.name=infopro", "model.name=tests.sample_networks:small"]
    assert main(["eval", config.run.dir, "--json", *words]) == 0


@pytest.mark.parametrize("name", ["none/p.csv", "/proc/p.csv", "folder"])
def test_a_file_that_cannot_be_written_is_told_before_the_work(
    config: Resolved,
    tmp_path: Path,
    name: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("localpipe.results.evaluate.load_evaluation", None)
    words = ["eval", config.run.dir, "--trust", "--predictions", str(tmp_path / name)]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("localpipe: eval: --predictions") and error.count("\n") == 1

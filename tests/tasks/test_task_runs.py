"""Whole runs of segmentation and regression: training, evaluation, exports and plans."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import localpipe
from localpipe import config as configs
from localpipe.cli.command_line import main
from localpipe.config.keys import Config
from localpipe.config.load import to_dict
from localpipe.data.shapes import load_shapes
from tests.harness import train

UNET = {"name": "tests.sample_networks:UNet", "crossing": 4, "args": {"width": 4}}
SMALL = {"name": "tests.sample_networks:small"}


def configured(folder: Path, name: str, model: Mapping[str, Any], **sections: Any) -> Config:
    """Return the configuration of a short run of three stages, or others."""
    base: dict[str, Any] = {
        "model": dict(model),
        "method": {"objective": {"name": "dgl"}},
        "data": {"name": name, "samples": 32, "image_size": 16, "batch_size": 8},
        "optim": {"epochs": 2, "lr": 0.05},
        "run": {"dir": str(folder), "threads": 1, "device": "cpu"},
    }
    base["pipeline"] = {"stages": 3}
    for section, keys in sections.items():
        base[section] = {**base.get(section, {}), **keys}
    return configs.parse(base, "test")


def train_to_summary(config: Config) -> dict[str, Any]:
    train(config)
    summary: dict[str, Any] = json.loads(Path(config.run.dir, "summary.json").read_text())
    return summary


def mean_iou_by_hand(config: Config) -> float:
    """Return the mean IoU of `by_red` on the test images, counted pixel by pixel."""
    test = load_shapes(config.data).test
    batch = test.read(np.arange(len(test)))
    reds = np.array([40.0, 220, 70, 80])
    predicted = np.abs(batch["image"][:, 0, ..., None] - reds).argmin(-1)
    valid = batch["target"] != 255
    ratios = []
    for label in range(4):
        is_label = (batch["target"] == label) & valid
        is_predicted = (predicted == label) & valid
        ratios.append((is_label & is_predicted).sum() / (is_label | is_predicted).sum())
    return float(np.mean(ratios))


def test_mean_iou_of_a_run_is_the_one_counted_by_hand(tmp_path: Path) -> None:
    config = configured(
        tmp_path / "run",
        "shapes",
        {"name": "tests.sample_networks:by_red"},
        pipeline={"stages": 1},
        optim={"lr": 0.0},
        data={"mean": [0, 0, 0], "std": [1, 1, 1]},
    )
    summary = train_to_summary(config)
    expected = mean_iou_by_hand(config)
    assert 0.2 < expected < 0.9
    assert summary["task"] == "segmentation"
    assert summary["metric"]["name"] == "mean_iou" and summary["metric"]["better"] == "higher"
    assert summary["metric"]["value"] == pytest.approx(expected, abs=1e-12)
    assert summary["metric_per_stage"] == [summary["test_mean_iou"]]


def test_a_unet_trains_on_masks_of_a_users_dataset(tmp_path: Path) -> None:
    config = configured(
        tmp_path / "run",
        "tests.data.user.sets:squares",
        UNET,
        data={"image_size": "auto", "batch_size": 16},
        optim={"epochs": 4},
    )
    summary = train_to_summary(config)
    assert summary["task"] == "segmentation" and summary["stages"] == 3
    assert all(value > 0.3 for value in summary["metric_per_stage"])


def check_predictions(folder: Path, file: Path, metric: dict[str, Any], are_numbers: bool) -> None:
    """Check the file of --predictions against the metric of the run, or that it is refused."""
    status = main(["eval", str(folder), "--trust", "--predictions", str(file)])
    assert (status == 0) is are_numbers and file.exists() is are_numbers
    if not are_numbers:
        return
    with file.open() as lines:
        header, *rows = csv.reader(lines)
    names = [f"{kind}_{output}" for kind in ("target", "prediction") for output in range(3)]
    assert header == ["index", *names] and [row[0] for row in rows] == list(map(str, range(8)))
    numbers = torch.tensor([[float(number) for number in row[1:]] for row in rows])
    distance = (numbers[:, :3] - numbers[:, 3:]).abs().mean()
    assert float(distance) == pytest.approx(metric["value"], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "model", "metric"), [("shapes", UNET, "mean_iou"), ("areas", SMALL, "mae")]
)
def test_a_run_is_evaluated_reported_compared_and_exported(
    tmp_path: Path, name: str, model: dict[str, Any], metric: str
) -> None:
    folder = tmp_path / "run"
    task = {"loss": "mae"} if name == "areas" else {}
    run = {"probe": "linear", "dir": str(folder)}
    summary = train_to_summary(configured(folder, name, model, task=task, run=run))
    assert summary["metric"]["name"] == metric and len(summary["metric_per_stage"]) == 3
    assert None not in summary["metric_per_stage"] + summary["probe_metric_per_stage"]

    target = tmp_path / "network.pt"
    for words in (
        ["eval", folder, "--trust"],
        ["report", folder],
        ["compare", folder],
        ["export", folder, "-o", target, "--trust"],
        ["export", folder, "-o", tmp_path / "exit.pt", "--exit", "0", "--trust"],
        ["export", folder, "-o", tmp_path / "network.pt2", "--trust"],
    ):
        assert main([str(word) for word in words]) == 0, words
    check_predictions(folder, tmp_path / "rows.csv", summary["metric"], name == "areas")
    network = localpipe.load(target, trust=True)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    outputs = network(images)
    assert outputs.shape == ((2, 4, 16, 16) if name == "shapes" else (2, 3))
    program = torch.export.load(tmp_path / "network.pt2").module()
    torch.testing.assert_close(program(images), outputs, atol=1e-5, rtol=1e-5)
    exit_outputs = localpipe.load(tmp_path / "exit.pt", trust=True)(images)
    assert exit_outputs.shape == outputs.shape


@pytest.mark.parametrize(("name", "model"), [("shapes", UNET), ("areas", SMALL)])
@pytest.mark.parametrize("cuts", ["equal", "memory"])
def test_a_plan_is_made(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, model: dict[str, Any], cuts: str
) -> None:
    path = tmp_path / "config.yaml"
    config = configured(tmp_path / "run", name, model, pipeline={"cuts": cuts})
    path.write_text(json.dumps(to_dict(config)))
    assert main(["plan", str(path), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    fields = {field["name"]: field for field in plan["stages"][0]["sends"]}
    if name == "shapes":
        assert (fields["target"]["shape"], fields["target"]["dtype"]) == ([16, 16], "uint8")
    else:
        assert (fields["target"]["shape"], fields["target"]["dtype"]) == ([3], "float32")


def test_a_shipped_network_is_refused_for_masks(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["model.name=resnet8", "data.name=shapes", f"run.dir={tmp_path / 'run'}"]
    assert main(["train", "demo", *words]) == 2
    error = capsys.readouterr().err
    assert "resnet8 gives outputs of shape (4,) a sample, but task segmentation takes" in error


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["data.name=areas", "model.num_classes=5"], r"float32 of shape \(3,\) .* float32 of .*5"),
        (["data.name=areas", "task.name=classification"], "task classification takes int64"),
        (["data.name=shapes", "task.name=regression"], r"uint8 of shape \(32, 32\)"),
        (["data.name=digits", "task.name=segmentation"], r"task segmentation takes uint8"),
        (["data.name=shapes", "task.ignore_index=null"], "a mask has a pixel of 255, .* is null"),
        (["data.name=shapes", "task.ignore_index=-1"], "a mask has a pixel of 255, .* is -1"),
        (["data.name=shapes", "model.num_classes=3"], "shapes needs 4 outputs"),
    ],
)
def test_targets_of_another_task_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], text: str
) -> None:
    assert main(["train", "demo", *words, f"run.dir={tmp_path / 'run'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("localpipe: data: ") and re.search(text, line)

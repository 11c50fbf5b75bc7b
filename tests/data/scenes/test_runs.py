"""Runs on Cityscapes: DeepLabV3 in two stages, and evaluations of a size of their own on edges."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models

import localpipe
from localpipe import config as configs
from localpipe import data
from localpipe.cli.command_line import main
from localpipe.config.keys import Config
from localpipe.plan.resolve_here import resolve_here
from tests.data.scenes.test_cityscapes import CLASSES, find_pairs
from tests.data.scenes.tree import write_tree
from tests.harness import train, train_here

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def configured(root: Path, run_dir: Path, model: dict[str, Any], **sections: Any) -> Config:
    base: dict[str, Any] = {
        "model": model,
        "method": {"objective": {"name": "infopro", "image_weight": [1.5, 1.5]}},
        "pipeline": {"stages": 2},
        "data": {"name": "cityscapes", "root": str(root), "batch_size": 2, "workers": 0},
        "optim": {"epochs": None, "max_steps": 10, "lr": 0.01, "schedule": "poly"},
        "run": {"dir": str(run_dir), "threads": 1, "device": "cpu", "evaluate_every": "10 steps"},
    }
    for section, keys in sections.items():
        base[section] = {**base[section], **keys}
    return configs.parse(base, "test")


class Recorder:
    """Keeps the records of evaluations, by stage."""

    def __init__(self) -> None:
        self.evaluations: dict[int, dict[str, Any]] = {}
        self.losses: list[float] = []

    def write(self, kind: str, **values: Any) -> None:
        if kind == "eval":
            self.evaluations[values["stage"]] = values
        elif kind == "train":
            self.losses.append(values["loss"])


def count_mean_iou(network: Callable[[torch.Tensor], Any], root: Path) -> float:
    """Return the mean IoU of torchvision's own network on the images of val, by hand."""
    labels = np.full(256, 255)
    labels[list(CLASSES)] = list(CLASSES.values())
    both, either = np.zeros(19), np.zeros(19)
    for image, mask in find_pairs(root, "val"):
        pixels = torch.from_numpy(np.array(Image.open(image))) / 255
        with torch.no_grad():
            outputs = network(((pixels - MEAN) / STD).permute(2, 0, 1)[None])
        if isinstance(outputs, dict):
            outputs = outputs["out"]
        predicted, classes = outputs[0].argmax(0).numpy(), labels[np.asarray(Image.open(mask))]
        for label in range(19):
            is_predicted = (predicted == label) & (classes != 255)
            both[label] += (is_predicted & (classes == label)).sum()
            either[label] += (is_predicted | (classes == label)).sum()
    return float(np.mean(both[either > 0] / either[either > 0]))


@pytest.mark.parametrize("name", ["deeplabv3_resnet50", "deeplabv3_resnet101"])
def test_deeplab_trains_ten_steps_and_its_mean_iou_is_the_one_counted_by_hand(
    tmp_path: Path, name: str
) -> None:
    root = write_tree(tmp_path / "tree", size=(40, 64))
    model = {"name": f"torchvision:{name}", "args": {"aux_loss": True}}
    sizes = {"image_size": [16, 32]}
    given = configured(root, tmp_path / "run", model, data=sizes, run={"log_every": 10})
    config = resolve_here(given, data.load(given.data, 0))
    assert config.evaluation_sample == (3, 40, 64) and config.evaluation_batch == 1
    recorder = Recorder()
    stages = train_here(config, recorder)

    # The weights that the two stages have, in the network of torchvision.
    network = models.get_model(
        name, weights=None, weights_backbone=None, num_classes=19, aux_loss=True
    )
    weights: dict[str, torch.Tensor] = {}
    for stage in stages:
        weights.update(stage.weights())
    own = {key: value for key, value in weights.items() if not key.startswith("aux.")}
    network.load_state_dict(own)
    assert int(network.backbone.bn1.num_batches_tracked) == 10
    assert len(recorder.losses) == 2 and np.isfinite(recorder.losses).all()
    record = recorder.evaluations[1]
    assert record["mean_iou"] > 0
    assert record["step"] == 10 and record["samples"] == 2
    assert record["mean_iou"] == pytest.approx(count_mean_iou(network.eval(), root), abs=1e-12)
    assert recorder.evaluations[0]["mean_iou"] is not None


@pytest.mark.parametrize("wire_dtype", ["fp32", "int8"])
def test_evaluations_of_another_size_do_not_depend_on_the_processes(
    tmp_path: Path, wire_dtype: str
) -> None:
    root = write_tree(tmp_path / "tree", train=6, val=3)
    found = []
    for processes in (1, 3):
        given = configured(
            root,
            tmp_path / str(processes),
            {"name": "tests.sample_networks:Guided"},
            method={"objective": {"name": "greedy"}},
            pipeline={"stages": 3, "wire_dtype": wire_dtype},
            data={"image_size": [32, 64], "validation": 2},
            optim={"max_steps": 3},
            run={"evaluate_every": "2 steps"},
        )
        train(given, processes)
        lines = (tmp_path / str(processes) / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        evaluations = [record for record in records if record["kind"] == "eval"]
        summary = json.loads((tmp_path / str(processes) / "summary.json").read_text())
        found.append((summary["weights_sha256"], sort_records(evaluations)))
    assert found[0] == found[1]
    # Two evaluations of validation and test images, at three stages, with a loss each.
    assert len(found[0][1]) == 12 and None not in [record["loss"] for record in found[0][1]]


def test_a_run_is_exported_for_whole_images(tmp_path: Path) -> None:
    root = write_tree(tmp_path / "tree")
    given = configured(
        root,
        tmp_path / "run",
        {"name": "tests.sample_networks:Guided"},
        method={"objective": {"name": "greedy"}},
        data={"image_size": [32, 64]},
        optim={"max_steps": 4, "lr": 0.3},
    )
    train(given)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for words, exit_stage in ((["network.pt"], 1), (["exit.pt", "--exit", "0"], 0)):
        file = tmp_path / words[0]
        assert main(["export", str(tmp_path / "run"), "-o", str(file), *words[1:], "--trust"]) == 0
        network = localpipe.load(file, trust=True)
        assert network.sample == (3, 80, 160)
        mean_iou = count_mean_iou(network, root)
        assert 0 < mean_iou == pytest.approx(summary["metric_per_stage"][exit_stage], abs=1e-12)


def sort_records(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return records without their times, in an order that does not depend on the workers."""
    figures = [
        {key: record[key] for key in ("step", "split", "stage", "loss", "mean_iou", "samples")}
        for record in records
    ]
    return sorted(figures, key=lambda record: json.dumps(record, sort_keys=True))

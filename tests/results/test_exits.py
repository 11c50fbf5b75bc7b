"""What `eval` says of a run's exits beside the metric: top-5 accuracy, and an ensemble."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import localpipe
from localpipe import data
from localpipe.cli.command_line import main
from localpipe.data.images import Split
from localpipe.errors import UserError
from localpipe.results.ensemble import ExitEnsemble, find_weight
from localpipe.runs.directory import RunDirectory
from localpipe.runs.records import read_records
from localpipe.tasks.classification import Classification


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of four stages with ten classes. The exit of stage 0 is not trained."""
    folder = tmp_path_factory.mktemp("exits") / "run"
    words = (
        "model.name=resnet8 pipeline.stages=4 pipeline.processes=1 data.name=digits "
        "data.train_subset=200 data.batch_size=50 optim.epochs=2 optim.lr=0.1 run.threads=1 "
        "method=infopro method.objective.task=softmax method.objective.image_weight=[5,1] "
        "method.objective.task_weight=[0,1]"
    )
    assert main(["train", "demo", *words.split(), f"run.dir={folder}"]) == 0
    return folder


def read_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """Return what `eval --json` prints."""
    capsys.readouterr()
    assert main(["eval", *words, "--json"]) == 0
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


def test_top5_accuracy_is_in_records_summary_evaluation_and_report(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    per_stage = summary["test_top5_accuracy_per_stage"]
    assert per_stage[-1] == summary["test_top5_accuracy"]
    assert per_stage[0] is None
    top1_per_stage = summary["test_accuracy_per_stage"]
    assert all(per_stage[k] > 0.5 and top1_per_stage[k] < per_stage[k] for k in (1, 2, 3))
    assert summary["best_test_top5_accuracy"] is not None

    last = [
        record["top5_accuracy"]
        for record in read_records(run_dir / "metrics.jsonl")
        if record["kind"] == "eval" and record["epoch"] == 2
    ]
    found = read_json(capsys, str(run_dir))
    assert [stage["top5_accuracy"] for stage in found["stages"]] == per_stage == last

    assert main(["eval", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert f"top5 accuracy {100 * per_stage[-1]:.2f} %" in printed
    assert "exit top5" in printed
    assert main(["report", str(run_dir)]) == 0
    page = (run_dir / "report.html").read_text()
    assert f"{100 * per_stage[1]:.1f} %" in page and "exit top5 accuracy" in page


@pytest.mark.parametrize("weights", ["mean", "2^k"])
def test_the_ensemble_averages_the_probabilities_of_the_exits(
    run_dir: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stages, images = find_exits(run_dir)
    total, averaged = 0.0, torch.zeros(len(images.target), 10, dtype=torch.float64)
    for stage, logits in stages.items():
        weight = {"mean": 1, "2^k": 2**stage}[weights]
        total += weight
        averaged += weight * logits.double().softmax(1)
    right = int((averaged.argmax(1) == images.target).sum())
    loss = float(F.nll_loss((averaged / total).log(), images.target))

    found = read_json(capsys, str(run_dir), "--ensemble", weights)["ensemble"]
    assert (found["weights"], found["stages"]) == (weights, [1, 2, 3])
    assert found["accuracy"] == right / len(images.target)
    assert found["loss"] == pytest.approx(loss, rel=1e-4)
    assert found["accuracy"] < found["top5_accuracy"] <= 1

    assert main(["eval", str(run_dir), "--ensemble", weights]) == 0
    line = f"ensemble of exits 1, 2, 3 ({weights}): accuracy {100 * found['accuracy']:.2f} %"
    assert line in capsys.readouterr().out


class Images(NamedTuple):
    image: Tensor
    target: Tensor


def find_exits(run_dir: Path) -> tuple[dict[int, Tensor], Images]:
    """Return the logits of every exit of the run on its test images, and the images."""
    config = RunDirectory(run_dir).config()
    dataset = data.load(config.data, 0)
    split = dataset.test
    assert isinstance(split, Split)
    pixels = split.images.read(np.arange(len(split))).transpose(0, 3, 1, 2).copy()
    images = Images(torch.from_numpy(pixels), torch.from_numpy(split.labels))
    logits = {}
    for stage in (1, 2, 3):
        file = run_dir / f"exit_{stage}.pt"
        if not file.exists():
            exit = [] if stage == 3 else ["--exit", str(stage)]
            assert main(["export", str(run_dir), "-o", str(file), *exit]) == 0
        network = localpipe.load(file)
        with torch.no_grad():
            logits[stage] = network(images.image)
    return logits, images


def test_an_ensemble_without_another_exit_is_refused(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages: list[Any] = []
    ensemble = ExitEnsemble(stages, "mean")
    with pytest.raises(UserError, match="^eval: --ensemble averages .* leave it out$"):
        ensemble.result(Classification(10), None)
    assert [find_weight("2^k", stage) for stage in range(4)] == [1, 2, 4, 8]
    assert main(["eval", str(run_dir), "--ensemble", "median"]) == 2
    assert "2^k" in capsys.readouterr().err

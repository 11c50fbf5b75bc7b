"""What `eval` says of a run's exits beside the metric: top-5 accuracy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from localpipe.cli.command_line import main
from localpipe.runs.records import read_records


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

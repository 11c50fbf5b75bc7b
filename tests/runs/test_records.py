"""Records are written once by each stage, also by a worker that computes steps again."""

from __future__ import annotations

from pathlib import Path

from localpipe.runs.records import Recorder, read_records


def test_a_worker_that_goes_on_writes_nothing_that_its_stages_have_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = Recorder(path, 0.0, 0.0)
    first.write("train", step=10, stage=1, loss=1.0)
    first.write("eval", step=10, stage=1, split="validation", loss=1.0)
    first.write("train", step=20, stage=0, loss=1.0)

    second = Recorder(path, 0.0, 0.0)
    second.skip_written([1])
    second.write("train", step=10, stage=1, loss=2.0)
    second.write("eval", step=10, stage=1, split="validation", loss=2.0)
    assert len(list(read_records(path))) == 3
    second.write("eval", step=10, stage=1, split="test", loss=2.0)
    second.write("train", step=20, stage=1, loss=2.0)
    second.write("checkpoint", step=10, stage=1)
    kinds = [(each["kind"], each["step"]) for each in read_records(path)]
    assert kinds[3:] == [("eval", 10), ("train", 20), ("checkpoint", 10)]

"""The memory of workers in a report, named by their ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from localpipe.results.report.figures import draw_memory, peak_memory_per_rank
from localpipe.runs.recorded_run import RecordedRun
from tests.harness import settings


def unfinished(replicas: list[int], folder: Path) -> RecordedRun:
    """Return a run whose first replicas have recorded memory, and no summary."""
    pipeline = {"stages": len(replicas), "replicas": replicas, "processes": sum(replicas)}
    config = settings(folder, pipeline=pipeline)

    def of(kind: str, stage: int) -> list[dict[str, Any]]:
        return [{"peak_memory_bytes": (stage + 1) * 2**20}]

    run = SimpleNamespace(summary=None, config=config, stages=len(replicas), of=of)
    return cast(RecordedRun, run)


def test_ranks_of_unequal_replicas_keep_their_numbers(tmp_path: Path) -> None:
    run = unfinished([2, 1, 1], tmp_path)
    assert peak_memory_per_rank(run) == {0: 2**20, 2: 2 * 2**20, 3: 3 * 2**20}
    figure = draw_memory(run)
    assert figure is not None
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["rank 0", "rank 2", "rank 3"]

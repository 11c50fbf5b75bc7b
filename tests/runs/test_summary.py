"""A summary: no bound that the run itself disproves, and the best epoch by its metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from localpipe.runs.summary import _describe_bound, _find_best, _speed_figures
from localpipe.tasks.metric import ACCURACY, Metric
from tests.harness import settings


def ends(steps: int, wall_s: float, compute_s: float = 1.0) -> list[dict[str, Any]]:
    pace = {"samples": 16 * steps, "wall_s": wall_s, "compute_s": compute_s}
    return [{"pace": pace, "has_cores": True}, {"pace": pace, "has_cores": True}]


@pytest.mark.parametrize(
    ("steps", "wall_s", "efficiency"),
    [(40, 2.5, 0.8), (40, 1.9, None), (3, 2.5, None), (3, 1.8, None)],
)
def test_a_run_that_is_too_short_has_a_speed_and_no_bound(
    steps: int, wall_s: float, efficiency: float | None, tmp_path: Path
) -> None:
    """The one worker computes both stages in 2 s."""
    config = settings(tmp_path, pipeline={"stages": 2})
    figures = _speed_figures(config, ends(steps, wall_s))
    assert figures["efficiency"] == efficiency
    assert (figures["bound_samples_per_s"] is None) == (efficiency is None)
    assert figures["train_samples_per_s"] == pytest.approx(16 * steps / wall_s, abs=0.01)
    said = _describe_bound(figures)
    assert ("too short to tell a bound" in said) == (efficiency is None)


def test_the_best_epoch_is_the_earliest_of_the_best_by_the_metrics_direction() -> None:
    records = [
        {"split": split, "step": step, "epoch": step, "mse": value, "accuracy": value}
        for split in ("validation", "test")
        for step, value in ((1, 0.5), (2, 0.25), (3, 0.25), (4, 0.75))
    ]
    assert _find_best(records, Metric("mse", "lower"))["epoch"] == 2
    best = _find_best(records, ACCURACY)
    assert (best["epoch"], best["split"]) == (4, "test")

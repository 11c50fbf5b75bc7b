"""Metrics: how values are compared, written and read back."""

from __future__ import annotations

import math

import pytest

from localpipe.tasks.metric import ACCURACY, Metric

BITS = Metric("bits_per_byte", "lower")


@pytest.mark.parametrize(("metric", "best"), [(ACCURACY, 0.75), (BITS, 0.25)])
def test_the_best_value_has_the_largest_key(metric: Metric, best: float) -> None:
    assert max([None, 0.5, math.nan, 0.25, 0.75], key=metric.sort_key) == best


def test_a_value_is_written_in_its_unit() -> None:
    assert (ACCURACY.format(0.125), ACCURACY.format(None)) == ("12.5 %", "-")
    assert (BITS.format(2.0), BITS.words) == ("2.0000", "bits per byte")


def test_a_record_gives_the_metric_back_and_an_older_one_accuracy() -> None:
    assert Metric.from_json({"metric": BITS.as_json()}) == BITS
    assert Metric.from_json({"test_accuracy": 0.5}) == ACCURACY

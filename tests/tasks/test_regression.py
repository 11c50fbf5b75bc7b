"""Regression: each distance, and its metric."""

from __future__ import annotations

import pytest
import torch

from localpipe.config.keys import TaskKeys
from localpipe.tasks.regression import Regression
from localpipe.tasks.task import measure_batch

OUTPUTS = torch.tensor([[0.0, 3.0], [1.0, 1.0]])
TARGET = torch.tensor([[0.0, 1.0], [1.5, 1.0]])


@pytest.mark.parametrize(
    ("loss", "expected"), [("mse", (2.0, 0.125)), ("mae", (1.0, 0.25)), ("huber", (0.75, 0.0625))]
)
def test_a_loss_is_the_mean_over_the_outputs_of_a_sample(
    loss: str, expected: tuple[float, ...]
) -> None:
    task = Regression(2, options=TaskKeys.model_validate({"loss": loss}))
    assert task.losses(OUTPUTS, TARGET).tolist() == list(expected)


@pytest.mark.parametrize("loss", ["mse", "mae", "huber"])
def test_the_metric_is_the_loss_and_lower_is_better(loss: str) -> None:
    task = Regression(2, options=TaskKeys.model_validate({"loss": loss}))
    assert (task.metric.name, task.metric.better, task.metric.is_fraction) == (loss, "lower", False)
    sums = measure_batch(task, OUTPUTS, TARGET)
    assert task.summarise(sums, 2) == {loss: float(task.losses(OUTPUTS, TARGET).mean())}


def test_the_targets_are_as_many_numbers_as_outputs() -> None:
    assert (Regression(3).target.shape, Regression(3).target.dtype) == ((3,), "float32")

"""The contract of tasks, checked for every task that comes with localpipe."""

from __future__ import annotations

import pytest
import torch

from localpipe.networks.chain import ChainClassification
from localpipe.tasks.classification import Classification
from localpipe.tasks.layout import Grid
from localpipe.tasks.task import Task

SAMPLES = 6
CLASSES = 4
TASKS: list[Task] = [
    Classification(CLASSES),
    Classification(CLASSES, Grid(2, 3, prefix=1)),
    ChainClassification(CLASSES),
]


def draw_batch(task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and targets of a batch."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(SAMPLES, task.num_classes, generator=generator, requires_grad=True)
    target = torch.arange(SAMPLES) % task.num_classes
    return logits, target


@pytest.mark.parametrize("task", TASKS)
def test_the_target_is_a_field_of_its_shape_and_dtype(task: Task) -> None:
    _, target = draw_batch(task)
    assert task.target.shape == target.shape[1:]
    assert task.target.dtype == str(target.dtype).removeprefix("torch.")


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_is_the_mean_over_the_samples(task: Task) -> None:
    logits, target = draw_batch(task)
    loss = task.loss(logits, target)
    losses = [task.loss(logits[i : i + 1], target[i : i + 1]) for i in range(SAMPLES)]
    assert loss.shape == () and loss.dtype == torch.float32 and loss.requires_grad
    assert torch.allclose(loss, torch.stack(losses).mean())


@pytest.mark.parametrize("task", TASKS)
def test_the_score_counts_the_right_samples(task: Task) -> None:
    logits, target = draw_batch(task)
    score = task.score(logits, target)
    scores = [int(task.score(logits[i : i + 1], target[i : i + 1])) for i in range(SAMPLES)]
    assert score.shape == () and score.dtype == torch.int64
    assert int(score) == sum(scores) and set(scores) <= {0, 1}


@pytest.mark.parametrize("shape", [(5, 3, 2), (7, 5), (5,)])
@pytest.mark.parametrize("task", TASKS[:2])
def test_pooled_features_have_the_width_that_is_announced(
    task: Task, shape: tuple[int, ...]
) -> None:
    assert task.pool(torch.randn(SAMPLES, *shape)).shape == (SAMPLES, task.features(shape))


def test_tokens_on_a_grid_pool_without_their_prefix() -> None:
    tokens = torch.randn(2, 7, 5)
    assert torch.equal(TASKS[0].pool(tokens), tokens.mean(1))
    assert torch.equal(TASKS[1].pool(tokens), tokens[:, 1:].mean(1))

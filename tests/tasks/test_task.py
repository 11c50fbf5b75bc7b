"""The contract of tasks, checked for every task that comes with localpipe."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from localpipe.config.keys import TaskKeys
from localpipe.errors import UserError
from localpipe.networks.chain import ChainClassification
from localpipe.tasks.classification import Classification
from localpipe.tasks.layout import Grid
from localpipe.tasks.regression import Regression
from localpipe.tasks.segmentation import Segmentation
from localpipe.tasks.task import Task, measure_batch

SAMPLES = 6
CLASSES = 4
TASKS: list[Task] = [
    Classification(CLASSES),
    Classification(CLASSES, Grid(2, 3, prefix=1)),
    Classification(CLASSES, options=TaskKeys(targets="probabilities", label_smoothing=0.1)),
    ChainClassification(CLASSES),
    Segmentation(CLASSES, sample=(3, 5, 4)),
    Segmentation(300, sample=(3, 5, 4), options=TaskKeys(average="valid", ignore_index=-1)),
    *[Regression(CLASSES, options=TaskKeys(loss=loss)) for loss in ("mse", "mae", "huber")],
]


def draw_batch(task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs and targets of a batch."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(SAMPLES, *task.output_shape, generator=generator, requires_grad=True)
    if isinstance(task, Classification) and not task.has_labels:
        drawn = torch.rand(SAMPLES, CLASSES, generator=generator)
        return outputs, drawn / drawn.sum(1, keepdim=True)
    if task.target.dtype == "float32":
        return outputs, torch.randn(SAMPLES, *task.target.shape, generator=generator)
    count = SAMPLES * math.prod(task.target.shape)
    target = torch.arange(count) % task.num_classes
    dtype = getattr(torch, task.target.dtype)
    return outputs, target.view(SAMPLES, *task.target.shape).to(dtype)


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
def test_the_sums_of_a_batch_are_those_of_its_samples(task: Task) -> None:
    logits, target = draw_batch(task)
    sums = measure_batch(task, logits, target)
    rows = [slice(i, i + 1) for i in range(SAMPLES)]
    parts = [measure_batch(task, logits[row], target[row]) for row in rows]
    for name, value in sums.items():
        assert value.dtype in (torch.int64, torch.float64)
        total = torch.stack([part[name] for part in parts]).sum(0)
        if value.dtype == torch.int64:
            assert torch.equal(value, total)
        else:
            assert torch.allclose(value, total, rtol=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_the_metric_is_among_the_figures(task: Task) -> None:
    with torch.no_grad():
        figures = task.summarise(measure_batch(task, *draw_batch(task)), SAMPLES)
    assert tuple(figures) == task.figures and task.metric.name in figures


def test_accuracy_counts_the_right_samples() -> None:
    logits, target = draw_batch(TASKS[0])
    right = int((logits.argmax(1) == target).sum())
    sums = measure_batch(TASKS[0], logits, target)
    assert 0 < right < SAMPLES and TASKS[0].summarise(sums, SAMPLES) == {
        "accuracy": right / SAMPLES
    }


def test_top5_accuracy_counts_targets_among_the_five_largest() -> None:
    task = Classification(7)
    logits = torch.arange(7.0).repeat(7, 1)  # class 6 is the largest, class 0 the smallest
    sums = measure_batch(task, logits, torch.arange(7))
    assert sums["among_first"].dtype == torch.int64 and int(sums["among_first"]) == 5
    assert task.summarise(sums, 7) == {"accuracy": 1 / 7, "top5_accuracy": 5 / 7}


def test_top5_accuracy_breaks_ties_by_the_lower_index() -> None:
    task = Classification(8)
    target = torch.arange(8)
    sums = task.measure(torch.zeros(8, 8), target)  # as of a network that has learned nothing
    assert int(sums["among_first"]) == 5
    random = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(64)
    among = (random.topk(5, dim=1).indices == classes[:, None]).any(1).sum()
    assert int(among) > 0 and Classification(100).measure(random, classes)["among_first"] == among


def test_top5_accuracy_is_there_for_more_than_five_classes_alone() -> None:
    assert Classification(5).figures == ("accuracy",)
    assert Classification(6).figures == ("accuracy", "top5_accuracy")
    probabilities = Classification(6, options=TaskKeys(targets="probabilities"))
    sums = probabilities.measure(torch.arange(6.0).repeat(2, 1), torch.eye(6)[[0, 1]])
    assert int(sums["among_first"]) == 1


def test_class_weights_and_smoothing_are_those_of_cross_entropy() -> None:
    keys = TaskKeys(name="classification", label_smoothing=0.1, class_weights=(0.5, 2.0, 0.0, 1.0))
    task = Classification(CLASSES, options=keys)
    logits, target = draw_batch(task)
    log_probabilities = logits.log_softmax(1)
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0])
    own = log_probabilities[torch.arange(SAMPLES), target] * weights[target]
    spread = (log_probabilities * weights).sum(1) / CLASSES
    assert torch.allclose(task.losses(logits, target), -(0.9 * own + 0.1 * spread))


def test_class_weights_are_one_a_class() -> None:
    with pytest.raises(UserError, match="class_weights has 2 numbers, but there are 4 classes"):
        Classification(CLASSES, options=TaskKeys(class_weights=(1.0, 1.0)))


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


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", ["none", (1.0, 2.0, 0.5, 3.0)])
def test_probabilities_of_one_class_give_what_its_index_gives(
    smoothing: float, weights: Literal["none"] | tuple[float, ...]
) -> None:
    keys = TaskKeys(label_smoothing=smoothing, class_weights=weights)
    hard = Classification(CLASSES, options=keys)
    soft = Classification(CLASSES, options=keys.model_copy(update={"targets": "probabilities"}))
    outputs, target = draw_batch(hard)
    one_hot = torch.nn.functional.one_hot(target, CLASSES).float()
    torch.testing.assert_close(soft.losses(outputs, one_hot), hard.losses(outputs, target))
    assert soft.measure(outputs, one_hot) == hard.measure(outputs, target)


def test_the_loss_of_probabilities_is_their_mean_of_the_losses_of_the_classes() -> None:
    soft = Classification(2, options=TaskKeys(targets="probabilities"))
    outputs = torch.tensor([[1.0, 3.0]])
    # The losses of the classes are log(1 + e^2) and log(1 + e^-2).
    expected = 0.25 * math.log1p(math.exp(2)) + 0.75 * math.log1p(math.exp(-2))
    assert float(soft.loss(outputs, torch.tensor([[0.25, 0.75]]))) == pytest.approx(expected)
    assert int(soft.measure(outputs, torch.tensor([[0.6, 0.4]]))["correct"]) == 0

"""Next-token prediction: its losses per sample, its exact sums and its metric."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from localpipe.config.keys import TaskKeys
from localpipe.errors import UserError
from localpipe.tasks.next_token import NextToken
from localpipe.tasks.task import measure_batch

SAMPLES, LENGTH, VOCABULARY = 5, 7, 11
ALL = NextToken(VOCABULARY, sample=(LENGTH,), options=TaskKeys(name="next_token"))
VALID = NextToken(
    VOCABULARY, sample=(LENGTH,), options=TaskKeys(name="next_token", average="valid")
)


def draw_batch() -> tuple[Tensor, Tensor]:
    """Return outputs and targets. The last sample has no token that counts, others lack some."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(SAMPLES, LENGTH, VOCABULARY, generator=generator)
    target = torch.randint(VOCABULARY, (SAMPLES, LENGTH), generator=generator)
    target[1, 2:] = -1
    target[2, 0] = -100
    target[4] = -1
    return outputs.requires_grad_(), target


def test_the_loss_of_a_sample_is_the_sum_of_its_tokens_over_its_length() -> None:
    outputs, target = draw_batch()
    losses = ALL.losses(outputs, target)
    for row in range(SAMPLES):
        is_valid = target[row] >= 0
        total = F.cross_entropy(outputs[row][is_valid], target[row][is_valid], reduction="sum")
        assert torch.allclose(losses[row], total / LENGTH)
    assert losses.dtype == torch.float32 and losses[4] == 0


def test_valid_averages_over_the_tokens_that_count() -> None:
    outputs, target = draw_batch()
    losses = VALID.losses(outputs, target)
    for row in range(SAMPLES - 1):
        is_valid = target[row] >= 0
        assert torch.allclose(
            losses[row], F.cross_entropy(outputs[row][is_valid], target[row][is_valid])
        )
    assert losses[4] == 0
    VALID.loss(outputs, target).backward()
    assert outputs.grad is not None and bool(outputs.grad.isfinite().all())
    assert bool((outputs.grad[target < 0] == 0).all())


@pytest.mark.parametrize("task", [ALL, VALID])
def test_the_sums_of_a_batch_are_those_of_its_samples_to_the_bit(task: NextToken) -> None:
    outputs, target = draw_batch()
    sums = measure_batch(task, outputs, target)
    parts = [measure_batch(task, outputs[i : i + 1], target[i : i + 1]) for i in range(SAMPLES)]
    for name, value in sums.items():
        assert value.dtype in (torch.int64, torch.float64)
        assert torch.equal(value, torch.stack([part[name] for part in parts]).sum(0))


@pytest.mark.parametrize("task", [ALL, VALID])
def test_the_figures_are_means_over_the_tokens_that_count(task: NextToken) -> None:
    outputs, target = draw_batch()
    outputs = outputs.detach()
    figures = task.summarise(measure_batch(task, outputs, target), SAMPLES)
    is_valid = target >= 0
    rows, tokens = outputs[is_valid], target[is_valid]
    assert tuple(figures) == task.figures
    assert figures["accuracy"] == float((rows.argmax(1) == tokens).double().mean())
    bits = float(F.cross_entropy(rows, tokens)) / math.log(2)
    assert figures["bits_per_token"] == pytest.approx(bits)


def test_no_token_that_counts_gives_no_figure() -> None:
    outputs, target = draw_batch()
    sums = measure_batch(ALL, outputs[4:], target[4:])
    assert ALL.summarise(sums, 1) == {"bits_per_token": None, "accuracy": None}


def test_a_vocabulary_of_256_is_that_of_bytes() -> None:
    task = NextToken(256, sample=(LENGTH,))
    assert task.metric.name == "bits_per_byte" and task.metric.better == "lower"
    assert ALL.metric.name == "bits_per_token" and ALL.metric.name in ALL.figures


def test_exits_read_every_token() -> None:
    h = torch.randn(SAMPLES, LENGTH, 3)
    assert torch.equal(ALL.pool(h), h) and ALL.features((LENGTH, 3)) == 3
    assert ALL.target.shape == (LENGTH,) and ALL.output_shape == (LENGTH, VOCABULARY)


def test_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"next_token reads tokens.*got shape \(3, 8, 8\)"):
        NextToken(VOCABULARY, sample=(3, 8, 8))

"""Checkpointed blocks: the same bits with and without, and fewer bytes that autograd holds."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

from localpipe import seeds
from localpipe.pipeline.stages.recompute import _Rerun, checkpoint_block
from tests.harness import differences, settings
from tests.pipeline.stages.test_stage import batch, stages_of
from tests.plan.test_costs import costs


def gradients(
    folder: Path, checkpointing: str, stage: int, precision: str = "fp32"
) -> dict[str, Any]:
    """Return gradients, weights, buffers and random state after one training step of a stage."""
    config = settings(
        folder,
        method={"objective": "dgl"},
        run={"checkpointing": checkpointing, "precision": precision},
    )
    stages = stages_of(config)
    message = batch(config)
    fields = {
        **message.fields,
        "h.0": torch.randn(16, 8, 8, 8, generator=torch.Generator().manual_seed(0)),
    }
    message = type(message)(message.header, fields)
    h = stages[stage].forward(message)
    loss = stages[stage].local_loss(message, h)
    loss.backward()
    return {
        "h": h.detach(),
        "loss": loss.detach(),
        "gradients": [parameter.grad for parameter in stages[stage].parameters()],
        "weights": stages[stage].weights(),
        "random": torch.get_rng_state(),
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1])
def test_gradients_buffers_and_dropout_are_those_without_to_the_bit(
    tmp_path: Path, stage: int, precision: str
) -> None:
    """The network has batch normalisation, dropout, and in-place layers right after a boundary."""
    with_it, without = (gradients(tmp_path, each, stage, precision) for each in ("block", "none"))
    assert differences(with_it, without) == []


class Negate(nn.Module):
    """Writes its input in place, and not twice with the same result."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(-1).exp()


def test_a_block_that_writes_in_place_leaves_the_input_for_its_second_run() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    out = checkpoint_block(Negate(), x)
    out.sum().backward()
    assert torch.equal(out.detach(), (-x.detach()).exp()) and torch.equal(x.grad, -out.detach())  # type: ignore[arg-type]


def test_a_second_backward_pass_finds_the_buffers_as_they_were() -> None:
    block = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh())
    x = torch.randn(8, 5, requires_grad=True)
    loss = checkpoint_block(block, x).square().sum()
    once = {name: buffer.clone() for name, buffer in block.named_buffers()}
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + gradient.square().sum()).backward()
    assert once["1.num_batches_tracked"] == 1
    assert all(torch.equal(once[name], buffer) for name, buffer in block.named_buffers())


@pytest.mark.parametrize("stages", [1, 2])
def test_fewer_bytes_are_held_and_the_plan_says_so(stages: int) -> None:
    without, block = (
        [
            cost.activation_bytes_per_sample
            for cost in costs("resnet20", stages, "dgl", run={"checkpointing": each})
        ]
        for each in ("none", "block")
    )
    assert all(few < 0.6 * many for few, many in zip(block, without, strict=True)), (block, without)


def test_the_bytes_of_a_checkpointed_plan_are_the_inputs_and_one_blocks_own() -> None:
    """ResNet-8 in one stage.

    A 3-channel image, then 16, 16, 32 and 64 channels at 32, 32, 16 and 8 pixels a side.
    """
    (cost,) = costs("resnet8", 1, "dgl", run={"checkpointing": "block"})
    kib = 32 * 32 * 4 // 1024
    inputs_of_two = (3 + 16) * kib  # the stem's and the first block's
    first_block = (
        5 * 16 * kib
    )  # its copied input; two outputs of convolutions, one of a ReLU in between, and its own
    assert cost.activation_bytes_per_sample // 1024 == inputs_of_two + first_block


class Momentum(nn.Module):
    """Moves a running mean and a counter, then reads both. `replaces`: by new tensors."""

    mean: Tensor
    count: Tensor
    table: Tensor

    def __init__(self, replaces: bool) -> None:
        super().__init__()
        self.replaces = replaces
        self.linear = nn.Linear(5, 5)
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.ones(5))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        mean = x.detach().mean(0)
        if self.replaces:
            self.mean, self.count = 0.5 * self.mean + mean, self.count + 1
        else:
            self.mean.mul_(0.5).add_(mean)
            self.count.add_(1)
        return (x - self.mean).tanh() * self.table / self.count.clone()


class Drawing(nn.Module):
    """Multiplies by numbers of torch, numpy and Python, and branches on one."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * np.random.rand() * random.random() * torch.rand(x.shape) * random.gauss(1, 0.1)
        if np.random.rand() < 0.5:
            return x.tanh()
        return x.sigmoid()


def normalised_old(width: int) -> nn.Module:
    return nn.Sequential(spectral_norm(nn.Linear(width, width)), nn.Tanh())


def normalised_new(width: int) -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(width, width)), nn.Tanh())


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "spectral norm": lambda: normalised_old(5),
    "parametrized spectral norm": lambda: normalised_new(5),
    "moved buffers": lambda: Momentum(False),
    "replaced buffers": lambda: Momentum(True),
    "numbers of numpy and Python": lambda: nn.Sequential(nn.Linear(5, 5), Drawing(), nn.Dropout()),
}


def two_steps(block: nn.Module, recomputes: bool, twice: bool) -> dict[str, Any]:
    """Return what two steps of a block leave, with a double backward where asked."""
    seeds.enter_stream(3)
    found: dict[str, Any] = {"outputs": [], "gradients": []}
    for _ in range(2):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = checkpoint_block(block, x) if recomputes else block(x)
        loss = out.square().sum()
        if twice:
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            loss = loss + gradient.square().sum()
        block.zero_grad()
        loss.backward()
        found["outputs"].append(out.detach())
        found["gradients"] += [p.grad.clone() for p in block.parameters() if p.grad is not None]
    found["buffers"] = {name: buffer.clone() for name, buffer in block.named_buffers()}
    found["draws"] = [float(torch.rand(())), np.random.rand(), random.random()]
    return found


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_may_read_what_it_moves_and_draw_from_any_generator(name: str, twice: bool) -> None:
    with_it, without = (
        two_steps(seeds.build_unit(0, name, BLOCKS[name]), recomputes, twice)
        for recomputes in (True, False)
    )
    assert len(without["gradients"]) >= 4 and differences(with_it, without) == []


def test_two_blocks_may_share_a_buffer_that_both_move() -> None:
    found: list[Any] = []
    for recomputes in (True, False):
        first, second = (seeds.build_unit(0, "block", lambda: Momentum(False)) for _ in range(2))
        second.mean, second.count = first.mean, first.count
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
        for block in (first, second):
            x = checkpoint_block(block, x.requires_grad_()) if recomputes else block(x)
        x.sum().backward()
        gradients = [p.grad for block in (first, second) for p in block.parameters()]
        found.append([x.detach(), first.mean.clone(), first.count.clone(), gradients])
    assert differences(found[0], found[1]) == []


def test_one_buffer_under_two_names_is_one_buffer_in_the_second_run_too() -> None:
    found: list[Any] = []
    for recomputes in (True, False):
        first, second = (seeds.build_unit(0, "block", lambda: Momentum(False)) for _ in range(2))
        second.mean = first.mean
        block = nn.Sequential(first, second)
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = checkpoint_block(block, x) if recomputes else block(x)
        out.sum().backward()
        found.append([out.detach(), first.mean.clone(), [p.grad for p in block.parameters()]])
    assert differences(found[0], found[1]) == []


def test_only_what_moves_is_kept_for_the_second_run() -> None:
    block = Momentum(False)
    out = checkpoint_block(block, torch.randn(8, 5, requires_grad=True))
    rerun = [each for each in gc.get_objects() if type(each) is _Rerun][-1]
    kept = [None if each is None else tuple(each.shape) for each in rerun._first]
    assert kept == [(5,), (), None, None] and rerun._generators is None
    out.sum().backward()

"""Checkpointed blocks: the same bits with and without, and fewer bytes that autograd holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localpipe.pipeline.stages.recompute import checkpoint_block
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

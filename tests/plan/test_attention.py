"""Attention in every count: what the fused kernel saves, wherever and whenever it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from localpipe.bench.systems.plain import choose_segments, count_plain_saved_bytes
from localpipe.config.resolved import Resolved
from localpipe.pipeline.stages.stage_plan import build_blueprint, build_plans
from localpipe.plan.cluster.block_costs import measure_blocks
from localpipe.plan.costs import StageCost, count_costs
from localpipe.plan.measure_worker import PieceSteps
from localpipe.plan.saved_bytes import SavedBytes, fuse_attention
from tests.harness import resolved


def vit(stages: int = 1, **run: Any) -> Resolved:
    model = {"name": "vit_tiny", "num_classes": 10, "args": {"patch": 8, "depth": 4}}
    return resolved({"model": model, "pipeline": {"stages": stages}, "run": run})


def count(config: Resolved) -> list[StageCost]:
    return count_costs(*build_plans(config), config)


@pytest.mark.parametrize("stages", [1, 2])
def test_a_transformer_whose_blocks_run_again_is_counted(stages: int) -> None:
    plain, again = count(vit(stages)), count(vit(stages, checkpointing="block"))
    for one, other in zip(plain, again, strict=True):
        assert other.activation_bytes_per_sample < 0.6 * one.activation_bytes_per_sample
        # The backward pass computes the forward pass of the blocks once more.
        assert one.train_macs < other.train_macs < 1.4 * one.train_macs
        assert one.macs == other.macs


def test_attention_that_runs_again_is_the_fused_one() -> None:
    query = torch.empty(2, 3, 64, 16, device="meta", requires_grad=True)

    def attend(x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    saved = SavedBytes([])
    with saved.hooks(), fuse_attention():
        torch.utils.checkpoint.checkpoint(attend, query, use_reentrant=False).sum().backward()
    assert F.scaled_dot_product_attention.__name__ == "scaled_dot_product_attention"
    assert query.grad is not None


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"is_causal": False}])
def test_causal_attention_saves_no_more_than_attention_to_all(options: Any) -> None:
    query = torch.empty(2, 3, 64, 16, device="meta", requires_grad=True)
    saved = SavedBytes([])
    with saved.hooks(), fuse_attention():
        attended = F.scaled_dot_product_attention(query, query, query, **options)
    # Four tensors like the query (one storage holds three of them) and a float a token and head.
    assert saved.peak <= 2 * 4 * query.numel() + 4 * 2 * 3 * 64
    assert attended.shape == query.shape


def test_a_peer_saves_as_much_as_the_same_network_in_one_stage() -> None:
    config = vit()
    (stage,) = count(config)
    blueprint = build_blueprint(config)
    assert count_plain_saved_bytes(blueprint, config) == stage.activation_bytes_per_sample
    blocks = measure_blocks(blueprint)
    assert sum(block.train_macs for block in blocks) == stage.train_macs
    # A forecast leaves out the loss, which saves a few values of the logits.
    difference = stage.activation_bytes_per_sample - sum(block.saved_bytes for block in blocks)
    assert 0 <= difference < 4 * 64
    segments = choose_segments(blueprint, config)
    assert (
        count_plain_saved_bytes(blueprint, config, segments)
        < 0.6 * stage.activation_bytes_per_sample
    )


def test_a_reconciled_transformer_is_measured() -> None:
    model = {"name": "vit_tiny", "num_classes": 10, "args": {"patch": 16, "depth": 3}}
    method = {"reconcile": {"distance": "cosine"}}
    steps = PieceSteps(resolved({"model": model, "method": method}), "cpu")
    # The fused kernel of the CPU has no second derivative.
    for step in (steps.lead(1, 1), steps.block(2), steps.loss(1, 3, 2)):
        assert step() > 0

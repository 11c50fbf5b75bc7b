"""The decoder: its blocks, its initial weights, and that no token sees a later one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from localpipe.errors import UserError
from localpipe.networks.blueprint import Blueprint
from localpipe.networks.gpt import gpt_blueprint

DEPTH, WIDTH, LENGTH, VOCABULARY = 3, 16, 8, 50


def build() -> tuple[Blueprint, nn.Sequential]:
    blueprint = gpt_blueprint("gpt", (LENGTH,), VOCABULARY, depth=DEPTH, width=WIDTH, heads=4)
    parts = blueprint.build(range(len(blueprint.parts)), 0)
    return blueprint, nn.Sequential(*parts)


def draw_tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def test_every_layer_is_a_block_after_the_embedding() -> None:
    blueprint, network = build()
    names = [block.name for block in blueprint.blocks]
    assert names == ["embedding", "blocks.0", "blocks.1", "blocks.2"]
    assert blueprint.shapes() == [(LENGTH, WIDTH)] * 4 and blueprint.dtype == "int64"
    assert network(draw_tokens()).shape == (2, *blueprint.task.output_shape)


def test_no_token_changes_what_comes_before_it() -> None:
    _, network = build()
    tokens = draw_tokens()
    before = network(tokens)
    for position in range(LENGTH):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCABULARY
        after = network(changed)
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position:], before[:, position:])


def test_fewer_tokens_have_the_first_positions() -> None:
    _, network = build()
    tokens = draw_tokens()
    assert torch.allclose(network(tokens[:, :5]), network(tokens)[:, :5], atol=1e-6)


def test_initial_weights_are_those_of_gpt_2() -> None:
    blueprint = gpt_blueprint("gpt", (64,), 256, depth=8, width=128, heads=4)
    embedding, layer, head = blueprint.build([0, 1, 9], 0)
    for module in (embedding, layer, head):
        for name, parameter in module.named_parameters():
            if "norm" in name:
                continue
            if name.endswith("bias"):
                assert not parameter.any(), name
                continue
            is_added = name in ("attn.proj.weight", "mlp.fc2.weight")
            expected = 0.02 / math.sqrt(16) if is_added else 0.02
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.05), name


def test_embedding_and_head_share_no_weight() -> None:
    _, network = build()
    assert sum(p.shape == (VOCABULARY, WIDTH) for p in network.parameters()) == 2


def test_heads_divide_the_width() -> None:
    with pytest.raises(UserError, match="width of 16 between 3 heads"):
        gpt_blueprint("gpt", (LENGTH,), VOCABULARY, width=WIDTH, heads=3)

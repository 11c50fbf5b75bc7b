"""The methods on next-token prediction: nothing of a stage sees a later token, in training too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localpipe import config as configs
from localpipe.config.resolve import DataFacts, Facts, MachineFacts, resolve
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.pipeline.channels.message import Header, Kind, Message
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.tasks.next_token import NextToken

LENGTH, BATCH, VOCABULARY = 6, 3, 13
OBJECTIVES: dict[str, dict[str, Any]] = {
    "greedy": {"name": "greedy"},
    "dgl": {"name": "dgl"},
    "dgl-0c2f": {"name": "dgl", "head": "0c2f"},
    "auglocal": {"name": "auglocal", "aux_depth": 2},
    "auglocal-1": {"name": "auglocal", "aux_depth": 1},
}
CONTEXTS = ["none", "E", "R1", "R2", "R4E"]
DISTANCES = ["none", "cosine"]


def resolved(**sections: Any) -> Resolved:
    base: dict[str, Any] = {
        "model": {"name": "gpt", "args": {"depth": 4, "width": 8, "heads": 2}},
        "data": {"name": "tokens", "vocabulary": VOCABULARY, "length": LENGTH, "batch_size": BATCH},
        "pipeline": {"stages": 4, "processes": 1},
        "run": {"device": "cpu", "threads": 1},
    }
    for section, keys in sections.items():
        base[section] = {**base.get(section, {}), **keys}
    given = configs.parse(base, "test")
    facts = DataFacts((LENGTH,), VOCABULARY, (), (), "none", dtype="int64", task="next_token")
    return resolve(given, Facts(facts, MachineFacts(cores=1)))


def build_stages(config: Resolved) -> list[Stage]:
    blueprint, plans = build_plans(config)
    return [Stage(plan, blueprint, config) for plan in plans]


def draw_message(stage: Stage) -> Message:
    """Return a training message of a stage. What it differentiates is a leaf."""
    generator = torch.Generator().manual_seed(stage.plan.stage)
    fields = {}
    for field in stage.plan.receives.fields:
        shape = (BATCH, *field.shape)
        if field.dtype == "int64":
            fields[field.name] = torch.randint(VOCABULARY, shape, generator=generator)
        else:
            fields[field.name] = torch.randn(shape, generator=generator, requires_grad=True)
    return Message(Header(Kind.TRAIN, 1, 1, BATCH), fields)


def keep_embedded(stage: Stage) -> list[Tensor]:
    """Return a list that gets the output of every embedding of tokens that runs."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        outputs.append(output)

    for module in (stage.blocks, stage.adapter):
        for layer in module.modules() if module is not None else ():
            if isinstance(layer, nn.Embedding):
                layer.register_forward_hook(keep)
    return outputs


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("mode", CONTEXTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_of_a_token_has_no_gradient_at_later_tokens(
    objective: str, mode: str, distance: str
) -> None:
    method = {
        "objective": OBJECTIVES[objective],
        "context": {"mode": mode},
        "reconcile": {"distance": distance},
    }
    # Stage 0 holds layers too, not the embedding alone.
    for stage in build_stages(resolved(method=method, pipeline={"stages": 3})):
        embedded = keep_embedded(stage)
        message = draw_message(stage)
        h = stage.forward(message)
        leaf = stage.boundary.leaf
        received = [tensor for tensor in message.fields.values() if tensor.requires_grad]
        inputs = [*embedded, *(received if leaf is None else [leaf])]
        assert inputs and stage.blocks.training and isinstance(stage.task, NextToken)
        with stage.precision():
            outputs = stage.objective.exit(stage.to_standard(h))
        assert outputs is not None
        losses = stage.task._token_losses(outputs, message.fields["target"])
        for position in range(LENGTH):
            gradients = torch.autograd.grad(
                losses[:, position].sum(), inputs, retain_graph=True, allow_unused=True
            )
            given = [gradient for gradient in gradients if gradient is not None]
            assert given and all(bool((g[:, position + 1 :] == 0).all()) for g in given)
            assert any(bool(g[:, position].any()) for g in given)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_head_has_a_batch_normalisation(objective: str) -> None:
    for stage in build_stages(resolved(method={"objective": OBJECTIVES[objective]})):
        names = [type(layer).__name__ for layer in stage.objective.modules()]
        assert "LayerNorm" in names and not any("BatchNorm" in name for name in names)


@pytest.mark.parametrize("mode", ["E", "R1"])
def test_a_context_of_the_inputs_embeds_the_tokens(mode: str) -> None:
    stages = build_stages(resolved(method={"context": {"mode": mode}}))
    assert stages[1].adapter is not None
    (encoder,) = stages[1].adapter.children()
    assert isinstance(encoder, nn.Embedding) and encoder.num_embeddings == VOCABULARY


@pytest.mark.parametrize(
    ("objective", "text"),
    [
        ({"name": "predsim"}, "predsim compares samples by their classes, and task next_token"),
        ({"name": "infopro"}, "infopro is for images, and the task reads tokens"),
        ({"name": "infopro", "task": "contrast"}, "infopro is for images, and the task reads"),
        ({"name": "dgl", "head": "1c2f"}, "head 1c2f has convolutions, which mix tokens"),
    ],
)
def test_other_objectives_are_one_line(objective: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=f"objective: {text}") as caught:
        build_stages(resolved(method={"objective": objective}))
    assert "\n" not in str(caught.value)


def test_a_probe_reads_every_token() -> None:
    from localpipe.pipeline.stages.probe import Probe

    stage = build_stages(resolved())[1]
    probe = Probe((LENGTH, 8), stage.task, 0, 1)
    h = torch.randn(BATCH, LENGTH, 8)
    target = torch.randint(VOCABULARY, (BATCH, LENGTH))
    probe.learn(h, target)
    assert int(probe.measure(h, target)["tokens"]) == BATCH * LENGTH

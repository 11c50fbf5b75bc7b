"""Several messages of one update: their batch's gradient, on any number of processes, resumed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from localpipe.config.resolved import Resolved
from localpipe.pipeline.channels.message import Flag, Header, Kind, Message
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.plan.costs import count_costs
from localpipe.plan.notes import plan_notes
from localpipe.plan.tables import plan_json
from tests.harness import differences, settings, train_here
from tests.pipeline.stages.test_stage import loader, stages_of

PLAIN = {
    "model": {"name": "tests.sample_networks:flat"},
    "method": {"objective": {"name": "greedy"}},
}


def weights(folder: Path, accumulate: int, **sections: Any) -> dict[str, torch.Tensor]:
    stages = train_here(settings(folder, optim={"accumulate": accumulate}, **sections))
    return {name: tensor for stage in stages for name, tensor in stage.weights().items()}


def test_without_batch_normalisation_four_messages_are_one_batch(tmp_path: Path) -> None:
    """The epoch's last batch of 8 makes four messages of two."""
    whole, four = (weights(tmp_path, accumulate, **PLAIN) for accumulate in (1, 4))
    for name, weight in whole.items():
        torch.testing.assert_close(four[name], weight, atol=1e-6, rtol=1e-6)


def test_messages_of_unequal_size_weigh_by_their_samples(tmp_path: Path) -> None:
    """A remainder of 11 divides into 5 and 6."""
    data = {"samples": 75, "batch_size": 64}
    found = _messages(settings(tmp_path, optim={"accumulate": 2}, data=data))
    assert [message.header.count for message in found][:4] == [32, 32, 5, 6]
    whole, two = (weights(tmp_path, accumulate, **PLAIN, data=data) for accumulate in (1, 2))
    for name, weight in whole.items():
        torch.testing.assert_close(two[name], weight, atol=1e-6, rtol=1e-6)


def _trained(config: Resolved, stage: Stage, messages: list[Message]) -> None:
    for message in messages:
        loss = stage.local_loss(message, stage.forward(message))
        stage.update(loss, message, 0.1)


def _messages(config: Resolved) -> list[Message]:
    inbox, found = loader(config), []
    while not (message := inbox.receive()).header.flags & Flag.STOP:
        if message.header.kind is Kind.TRAIN:
            found.append(Message(message.header, {k: v.clone() for k, v in message.fields.items()}))
    return found


def test_a_stage_resumed_between_two_steps_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    config = settings(tmp_path, optim={"accumulate": 2})
    messages = _messages(config)
    undisturbed, resumed = stages_of(config)[0], stages_of(config)[0]
    _trained(config, undisturbed, messages[:6])
    resumed.load_state(copy.deepcopy(undisturbed.state()))
    _trained(config, undisturbed, messages[6:])
    _trained(config, resumed, messages[6:])
    assert differences(undisturbed.state(), resumed.state()) == []


def test_nothing_moves_before_the_last_message_of_a_step(tmp_path: Path) -> None:
    config = settings(tmp_path, optim={"accumulate": 2})
    stage, (first, second, *_) = stages_of(config)[0], _messages(config)
    before = [parameter.detach().clone() for parameter in stage.parameters()]
    _trained(config, stage, [first])
    assert all(torch.equal(a, b) for a, b in zip(before, stage.parameters(), strict=True))
    _trained(config, stage, [second])
    assert not any(
        torch.equal(a, b)
        for a, b in zip(before, stage.parameters(), strict=True)
        if b.grad is not None
    )


def test_dropout_of_a_steps_messages_differs_and_its_first_is_the_steps_own(tmp_path: Path) -> None:
    stage = stages_of(settings(tmp_path, optim={"accumulate": 2}))[1]
    h = torch.randn(4, 8, 8, 8)

    def output(part: int, samples: int) -> torch.Tensor:
        fields = {"h.0": h.clone(), "target": torch.zeros(4, dtype=torch.int64)}
        return stage.forward(
            Message(Header(Kind.TRAIN, 1, 1, 4, part=part, samples=samples), fields)
        )

    assert torch.equal(output(0, 8), output(0, 0))
    assert torch.equal(output(1, 8), output(1, 8))
    assert not torch.equal(output(0, 8), output(1, 8))


def test_an_edge_holds_the_rows_of_one_message(tmp_path: Path) -> None:
    sizes = []
    for accumulate in (1, 4):
        config = settings(tmp_path, optim={"accumulate": accumulate})
        blueprint, plans = build_plans(config)
        assert all(plan.receives.batch == 16 // accumulate for plan in plans)
        sizes.append(
            plan_json(plans, count_costs(blueprint, plans, config))["totals"]["message_bytes"]
        )
    assert sizes[1] < sizes[0] / 2


@pytest.mark.parametrize(
    ("objective", "noted"),
    [("predsim", True), ({"name": "infopro", "task": "contrast"}, True), ("dgl", False)],
)
def test_plan_says_that_a_loss_over_pairs_sees_one_message(
    tmp_path: Path, objective: Any, noted: bool
) -> None:
    method = {"objective": {"name": objective} if isinstance(objective, str) else objective}
    found = plan_notes(settings(tmp_path, method=method, optim={"accumulate": 2}))
    assert bool(found) == noted
    assert not noted or "sees the 8 of one message, not the 16 of an update" in found[0]
    assert plan_notes(settings(tmp_path, method=method)) == []

"""Exported networks with layouts, orders in memory and several tensors at a cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from localpipe.pipeline.channels.channel import MemoryChannel
from localpipe.pipeline.channels.message import Header, Kind, Message
from localpipe.pipeline.stages.probe import Probe
from localpipe.pipeline.stages.stage import Stage, TailLoss
from localpipe.results.exported import Network, build_exported, describe_network, has_exit
from tests.hand_made import NAMES, settings
from tests.harness import train_here

pytestmark = pytest.mark.usefixtures("hand_made")

IMAGES = torch.arange(6 * 3 * 8 * 8).view(6, 3, 8, 8).mul(7).remainder(256).to(torch.uint8)
METHODS: dict[str, dict[str, Any]] = {
    "dgl": {"objective": {"name": "dgl"}},
    "contsup": {"objective": {"name": "greedy"}, "context": {"mode": "R1E"}},
}


def train(folder: Path, name: str, method: str) -> tuple[Any, list[Stage]]:
    config = settings(folder / "run", name, method=METHODS[method])
    return config, train_here(config)


def evaluate(stages: list[Stage]) -> tuple[list[Tensor], Tensor]:
    """Return every stage's raw output, and the logits of the last one."""
    target = torch.zeros(len(IMAGES), dtype=torch.int64)
    message = Message(
        Header(Kind.TEST, 1, 1, len(IMAGES)), {"image": IMAGES.clone(), "target": target}
    )
    outputs = []
    for stage in stages:
        h = stage.forward(message)
        outputs.append(h.clone())
        if stage.plan.sends is None:
            break
        channel = MemoryChannel(stage.plan.sends, 1)
        channel.send(message.header, stage.outgoing(message, h))
        message = channel.receive()
    assert isinstance(stage.objective, TailLoss)
    with torch.no_grad():
        return outputs, stage.objective.exit(h, *stage.companions)


def export(config: Any, stages: list[Stage], exit_stage: int | None) -> Network:
    network = build_exported(describe_network(config, exit_stage), "test")
    weights: dict[str, Tensor] = {}
    for stage in stages:
        weights.update(stage.weights())
    if exit_stage is not None:
        for key in [key for key in weights if key.startswith(f"aux.{exit_stage}.")]:
            weights[key.replace(f"aux.{exit_stage}.", "exit.")] = weights[key]
    network.load_state_dict({key: weights[key] for key in network.state_dict()})
    return network


CASES = [(name, "dgl") for name in NAMES] + [
    (name, "contsup") for name in NAMES if name != "hand_sequence"
]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_an_exported_network_gives_the_runs_outputs(tmp_path: Path, name: str, method: str) -> None:
    config, stages = train(tmp_path, name, method)
    _, logits = evaluate(stages)
    with torch.no_grad():
        assert torch.equal(export(config, stages, None)(IMAGES), logits)


@pytest.mark.parametrize("name", NAMES)
def test_an_exit_gives_the_stages_own_logits(tmp_path: Path, name: str) -> None:
    config, stages = train(tmp_path, name, "dgl")
    outputs, _ = evaluate(stages)
    with torch.no_grad():
        expected = stages[1].objective.exit(stages[1].to_standard(outputs[1]))
        assert expected is not None
        assert torch.equal(export(config, stages, 1)(IMAGES), expected)


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_has_an_exit(tmp_path: Path, name: str) -> None:
    config = settings(tmp_path / "run", name, method=METHODS["dgl"])
    assert all(has_exit(config, index) for index in range(4))


@pytest.mark.parametrize("name", NAMES)
def test_a_probe_reads_the_standard_form(tmp_path: Path, name: str) -> None:
    config = settings(tmp_path / "run", name, method=METHODS["dgl"], run={"probe": "linear"})
    stages = train_here(config)
    outputs, _ = evaluate(stages)
    for stage, h in zip(stages, outputs, strict=True):
        shape = stage.plan.gives.standard_shape
        probe = Probe(shape, stage.task, 0, stage.plan.stage)
        probe.learn(stage.to_standard(h), torch.zeros(len(h), dtype=torch.int64))
        target = torch.zeros(len(h), dtype=torch.int64)
        correct = probe.measure(stage.to_standard(h), target)["correct"]
        assert 0 <= int(correct) <= len(h)

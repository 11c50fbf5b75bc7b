"""Layers that write in place: nothing that is sent, learnt from or differentiated changes."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from localpipe import data
from localpipe.config.resolved import Resolved
from localpipe.errors import RunError
from localpipe.methods.objective import LocalLoss, Site
from localpipe.pipeline.channels.message import Header, Kind, Message
from localpipe.pipeline.launch.process import prepare_process
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.workers.assemble import build_source, join_stages
from localpipe.pipeline.workers.loop import RunnerContext, Worker
from localpipe.pipeline.workers.phase import PhaseTimer
from localpipe.pipeline.workers.steps import build_step_schedule
from tests.harness import differences, settings
from tests.pipeline.stages.test_stage import batch, stages_of

AXES = list(
    product(
        ("greedy", "dgl", "predsim", "infopro", "auglocal"),
        ("none", "E", "R1E"),
        ("none", "cosine"),
    )
)


def preact(num_classes: int = 10, inplace: bool = False, last: str = "Identity") -> nn.Sequential:
    """Return blocks and a head whose first layer may write in place. `last` ends the blocks."""

    def block(stride: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(8, 8, 3, stride, 1, bias=False)
        return nn.Sequential(nn.ReLU(inplace=inplace), conv, getattr(nn, last)())

    relu = nn.ReLU(inplace=inplace)
    head = nn.Sequential(relu, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), getattr(nn, last)())
    return nn.Sequential(stem, block(), block(2), block(), head)


def configured(folder: Path, method: Mapping[str, Any], **sections: dict[str, Any]) -> Resolved:
    base: dict[str, dict[str, Any]] = {
        "model": {"name": "tests.methods.test_in_place:preact"},
        "pipeline": {"stages": 3},
        "data": {"samples": 32},
        "optim": {"epochs": 1},
    }
    for section, keys in sections.items():
        base[section] = {**base.get(section, {}), **keys}
    return settings(folder / "run", method=dict(method), **base)


def trained(config: Resolved) -> dict[str, Any]:
    """Train all stages with their probes in this process; return what they learnt."""
    prepare_process(config)
    stages = stages_of(config)
    dataset = data.load(config.data, config.run.seed)
    todo = build_step_schedule(config, dataset)
    schedule = LearningRateSchedule(config.optim, todo.steps_per_epoch)
    context = RunnerContext(schedule, PhaseTimer(), None, None)
    source = build_source(config, stages[0], dataset, todo)
    runners = join_stages(stages, source, context, with_probes=True)
    Worker(runners, context.timer).run()
    probes = [runner.probe for runner in runners if runner.probe is not None]
    return {
        "weights": [dict(sorted(stage.weights().items())) for stage in stages],
        "probes": [dict(probe.network.state_dict()) for probe in probes],
    }


@pytest.mark.parametrize("axes", AXES, ids="+".join)
def test_layers_in_place_change_no_weight_and_no_probe(
    tmp_path: Path, axes: tuple[str, str, str]
) -> None:
    objective, mode, distance = axes
    method = {
        "objective": objective,
        "context": {"mode": mode},
        "reconcile": {"distance": distance},
    }
    without, with_it = (
        trained(configured(tmp_path, method, model={"args": {"inplace": inplace}}))
        for inplace in (False, True)
    )
    assert len(without["probes"]) == 3
    assert differences(without, with_it) == []


@pytest.mark.parametrize("last", ["Tanh", "ReLU", "Sigmoid"])
@pytest.mark.parametrize("objective", ["greedy", "auglocal"])
def test_a_block_may_keep_its_output_for_its_own_backward_pass(
    tmp_path: Path, objective: str, last: str
) -> None:
    """Its output is what the head or the copied block writes into."""
    method: dict[str, Any] = {"objective": objective}
    if objective == "auglocal":
        method = {"objective": {"name": objective, "aux_depth": 1}}
    without, with_it = (
        trained(
            configured(
                tmp_path,
                method,
                model={"args": {"inplace": inplace, "last": last}},
                pipeline={"stages": 4},
            )
        )
        for inplace in (False, True)
    )
    assert differences(without, with_it) == []


class Writer(LocalLoss):
    """Writes into the activation and into the target, and keeps what it was given."""

    @dataclass(frozen=True)
    class Options:
        from_step: int = 0

    def __init__(self, options: Options, site: Site) -> None:
        super().__init__()
        self.task = site.blueprint.task
        self.from_step = options.from_step
        self.step = 0
        self.given: Tensor | None = None
        features, classes = site.example().numel(), self.task.num_classes
        self.head = site.unit("head", lambda: nn.Linear(features, classes))

    def exit(self, h: Tensor) -> Tensor:
        logits: Tensor = self.head(h.flatten(1))
        return logits

    def forward(self, h: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        self.given = h
        self.step += 1
        if self.step > self.from_step:
            h.relu_()
            fields["target"].fill_(3)
        return self.task.loss(self.exit(h), fields["target"])


def writer_stage(folder: Path, stage: int, from_step: int) -> tuple[Stage, Message]:
    objective = {"name": "tests.methods.test_in_place:Writer", "from_step": from_step}
    config = configured(folder, {"objective": objective, "reconcile": {"distance": "cosine"}})
    fields = dict(batch(config).fields)
    if stage > 0:
        generator = torch.Generator().manual_seed(0)
        fields["h.0"] = torch.randn(16, 8, 8, 8, generator=generator)
        fields["grad.0"] = torch.randn(16, 8, 8, 8, generator=generator)
    message = Message(Header(Kind.TRAIN, 1, 1, 16), fields)
    return stages_of(config)[stage], message


@pytest.mark.parametrize("stage", [0, 1])
def test_a_users_loss_that_writes_changes_neither_the_activation_nor_the_message(
    tmp_path: Path, stage: int
) -> None:
    writer, message = writer_stage(tmp_path, stage, 0)
    h = writer.forward(message)
    before = {"h": h.detach().clone(), **{k: v.clone() for k, v in message.fields.items()}}
    loss = writer.local_loss(message, h)
    gradient = writer.boundary_gradient(loss, h)
    assert torch.equal(h, before["h"]) and (before["h"] < 0).any()
    for name, tensor in message.fields.items():
        assert torch.equal(tensor, before[name]), name
    # The gradient of ReLU at the raw output is zero where that is negative.
    assert (gradient[before["h"] < 0] == 0).all() and (gradient != 0).any()


def test_what_a_loss_does_not_write_into_is_not_copied(tmp_path: Path) -> None:
    writer, message = writer_stage(tmp_path, 0, 10)
    h = writer.forward(message)
    writer.local_loss(message, h)
    assert isinstance(writer.objective, Writer) and writer.objective.given is h


def test_a_loss_that_begins_to_write_later_is_an_error_that_names_the_stage(
    tmp_path: Path,
) -> None:
    writer, message = writer_stage(tmp_path, 0, 1)
    writer.local_loss(message, writer.forward(message))
    with pytest.raises(RunError, match="loss of stage 0 wrote into its input (h|target) in place"):
        writer.local_loss(message, writer.forward(message))


def test_trying_a_loss_moves_no_buffer_and_no_generator(tmp_path: Path) -> None:
    config = configured(tmp_path, {"objective": "dgl"}, model={"name": "resnet8"})
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    stages = stages_of(config)
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert states[2] == np.random.get_state()[1].tolist()  # type: ignore[index]
    buffers = [b for s in stages for n, b in s.weights().items() if n.endswith("batches_tracked")]
    assert buffers and all(buffer == 0 for buffer in buffers)


def test_evaluation_leaves_the_activation_as_it_is(tmp_path: Path) -> None:
    """The last stage's head writes in place."""
    config = configured(tmp_path, {"objective": "greedy"}, model={"args": {"inplace": True}})
    stage = stages_of(config)[2]
    fields = {"h.1": torch.randn(4, 8, 4, 4), "target": torch.zeros(4, dtype=torch.int64)}
    message = Message(Header(Kind.TEST, 1, 1, 4), fields)
    h = stage.forward(message)
    before = h.clone()
    assert stage.measure(message, h) is not None
    assert torch.equal(h, before) and (before < 0).any()

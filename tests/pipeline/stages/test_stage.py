"""A stage alone: isolation, the order of send and update.

Plain back-propagation is a special case.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from localpipe.config.resolved import Resolved
from localpipe.data.augment import augment_batch
from localpipe.data.dataset import epoch_order
from localpipe.networks.resnet_cifar import BasicBlock
from localpipe.pipeline.channels.channel import MemoryChannel
from localpipe.pipeline.channels.message import Header, Kind, Message
from localpipe.pipeline.stages.batch_norm import TwiceBatchNorm
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.workers.loop import RunnerContext, StageRunner
from localpipe.pipeline.workers.phase import PhaseTimer
from localpipe.pipeline.workers.source import BatchSource
from localpipe.pipeline.workers.steps import build_step_schedule
from tests.harness import load_images, settings


def stages_of(config: Resolved) -> list[Stage]:
    blueprint, plans = build_plans(config)
    return [Stage(plan, blueprint, config) for plan in plans]


def batch(config: Resolved) -> Message:
    dataset = load_images(config.data, config.run.seed)
    return BatchSource(
        dataset, build_step_schedule(config, dataset).headers(0), 0, float("inf")
    ).receive()


@pytest.mark.parametrize("objective", ["greedy", "dgl"])
@pytest.mark.parametrize("through_channel", [True, False])
def test_the_loss_of_a_stage_reaches_no_parameter_of_another(
    tmp_path: Path, objective: str, through_channel: bool
) -> None:
    config = settings(tmp_path, method={"objective": objective})
    stages = stages_of(config)
    message = batch(config)
    for own, stage in enumerate(stages):
        h = stage.forward(message)
        stage.local_loss(message, h).backward()
        for other, neighbour in enumerate(stages):
            moved = [
                p for p in neighbour.parameters() if p.grad is not None and p.grad.abs().sum() > 0
            ]
            assert bool(moved) == (other == own), (
                f"loss of stage {own}, parameters of stage {other}"
            )
            for parameter in neighbour.parameters():
                parameter.grad = None
        outgoing = stage.outgoing(message, h)
        assert not any(tensor.requires_grad for tensor in outgoing.values())
        if stage.plan.sends is not None and through_channel:
            channel = MemoryChannel(stage.plan.sends, 1)
            channel.send(message.header, outgoing)
            message = channel.receive()
        else:
            message = Message(message.header, outgoing)


class _Spy:
    """An outbox that notes the stage's weights at the moment of each send."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.weights: list[dict[str, Tensor]] = []
        self.sent: list[Tensor] = []

    def send(self, header: Header, fields: Mapping[str, Tensor]) -> None:
        self.weights.append({name: value.clone() for name, value in self.stage.weights().items()})
        self.sent.append(fields[f"h.{self.stage.plan.stage}"].clone())

    def close(self) -> None:
        pass


class _Given:
    def __init__(self, message: Message) -> None:
        self.message = message

    def receive(self) -> Message:
        return self.message


def test_the_activation_is_sent_before_the_update(tmp_path: Path) -> None:
    config = settings(tmp_path)
    stage = stages_of(config)[0]
    parameters = {name for block in stage.blocks for name, _ in block.named_parameters()}
    assert parameters
    before = {name: value.clone() for name, value in stage.weights().items()}
    spy = _Spy(stage)
    message = batch(config)
    StageRunner(
        stage,
        _Given(message),
        spy,
        RunnerContext(LearningRateSchedule(config.optim, 6), PhaseTimer(), None, None),
    ).turn()
    after = stage.weights()
    trained = [name for name in before if "running" not in name and "batches" not in name]
    assert any(not torch.equal(before[name], after[name]) for name in trained), (
        "the stage was not updated at all"
    )
    for name in trained:
        assert torch.equal(before[name], spy.weights[0][name]), (
            f"{name} had moved when the activation was sent"
        )


def test_the_activation_sent_is_the_raw_output_whatever_the_head_does_to_it(tmp_path: Path) -> None:
    config = settings(tmp_path)
    stage = stages_of(config)[1]
    assert stage.plan.sends is not None
    message = Message(
        Header(Kind.TRAIN, 1, 1, 4),
        {"h.0": torch.randn(4, 8, 8, 8), "target": torch.tensor([1, 2, 3, 4])},
    )
    h = stage.forward(message)
    expected = h.detach().clone()
    channel = MemoryChannel(stage.plan.sends, 1)
    channel.send(message.header, stage.outgoing(message, h))
    with torch.no_grad():
        h.mul_(-1)  # what a first layer in place would do
    assert torch.equal(channel.receive().fields["h.1"], expected)


class Plain(nn.Module):
    """ResNet-8 written as anybody would."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(BasicBlock(16, 16))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def test_one_stage_is_a_plain_loop_to_the_bit(tmp_path: Path) -> None:
    config = settings(
        tmp_path,
        model={"name": "resnet8"},
        pipeline={"stages": 1},
        data={
            "name": "digits",
            "batch_size": 32,
            "train_subset": 200,
            "image_size": "auto",
            "augment": "auto",
        },
    )
    torch.set_num_threads(1)
    (stage,) = stages_of(config)
    network = Plain()
    network.load_state_dict(stage.weights())
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    dataset = load_images(config.data, config.run.seed)
    todo = build_step_schedule(config, dataset)
    schedule = LearningRateSchedule(config.optim, todo.steps_per_epoch)
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1) * 255 for values in (dataset.mean, dataset.std)
    )
    runner = StageRunner(
        stage, loader(config), None, RunnerContext(schedule, PhaseTimer(), None, None)
    )
    while runner.turn():
        pass

    network.train()
    for step in range(1, todo.steps + 1):
        epoch = todo.epoch(step)
        first = (step - 1) % todo.steps_per_epoch * 32
        index = epoch_order(len(dataset.train), config.run.seed, epoch)[first : first + 32]
        images = torch.from_numpy(augment_batch(dataset, index, config.run.seed, epoch))
        loss = nn.functional.cross_entropy(
            network((images.float() - mean) / std), torch.from_numpy(dataset.train.labels[index])
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = schedule.rate(step)
        optimizer.step()

    expected = network.state_dict()
    assert stage.weights().keys() == expected.keys()
    assert [
        name for name, value in stage.weights().items() if not torch.equal(value, expected[name])
    ] == []


def loader(config: Resolved) -> BatchSource:
    dataset = load_images(config.data, config.run.seed)
    return BatchSource(
        dataset, build_step_schedule(config, dataset).headers(0), config.run.seed, float("inf")
    )


def test_evaluation_leaves_the_weights_as_they_are(tmp_path: Path) -> None:
    config = settings(tmp_path)
    stage = stages_of(config)[0]
    before = {name: value.clone() for name, value in stage.weights().items()}
    fields = dict(batch(config).fields)
    message = Message(Header(Kind.TEST, 1, 1, len(fields["target"])), fields)
    first = stage.measure(message, stage.forward(message))
    second = stage.measure(message, stage.forward(message))
    assert first is not None and second is not None and torch.equal(first["loss"], second["loss"])
    assert all(torch.equal(value, before[name]) for name, value in stage.weights().items())


def test_dropout_draws_from_stage_and_step_alone(tmp_path: Path) -> None:
    config = settings(tmp_path)
    stage = stages_of(config)[1]
    fields = {"h.0": torch.randn(4, 8, 8, 8), "target": torch.zeros(4, dtype=torch.int64)}

    def output(step: int) -> Tensor:
        message = Message(
            Header(Kind.TRAIN, step, 1, 4), {name: value.clone() for name, value in fields.items()}
        )
        return stage.forward(message)

    first = output(1)
    torch.rand(7)  # somebody else draws
    assert torch.equal(first, output(1))
    assert not torch.equal(first, output(2))


def test_only_a_stage_that_differentiates_twice_has_normalisations_made_for_it(
    tmp_path: Path,
) -> None:
    config = settings(
        tmp_path, method={"objective": "dgl", "reconcile": {"distance": "cosine", "weight": 0.1}}
    )
    kinds = [
        {
            type(layer)
            for module in (stage.blocks, stage.objective)
            for layer in module.modules()
            if "Norm" in type(layer).__name__
        }
        for stage in stages_of(config)
    ]
    assert (
        TwiceBatchNorm not in kinds[0]
        and all(kind <= {TwiceBatchNorm} for kind in kinds[1:])
        and kinds[1]
    )

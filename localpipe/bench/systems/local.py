"""localpipe itself: its pipeline, or the same stages one after another in one process (`sequential`).

In a bound window every worker computes at once (forward, local loss, backward, update of all stages it hosts) on a message
that it already holds, channels off. Batch size over the slowest worker's time per batch is the bound; the pipeline's rate
over the bound, pair by pair, is the efficiency. Queues keep their messages between windows, so that no window pays for
filling them. A chain with jitter has windows of the same pipeline without it beside those with it, and its bound has none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from localpipe import data
from localpipe.bench.systems.shared import StepTimer, SystemRequest, endless_schedule
from localpipe.config.resolved import Resolved
from localpipe.networks.chain import Wait
from localpipe.pipeline.channels.channel import Inbox
from localpipe.pipeline.channels.message import Message
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.workers.assemble import build_stages, join_stages
from localpipe.pipeline.workers.loop import RunnerContext, StageRunner
from localpipe.pipeline.workers.mesh import Mesh
from localpipe.pipeline.workers.phase import PhaseTimer, SpanKeeper
from localpipe.pipeline.workers.source import BatchSource

WARM_UP = 8


class _PulseClock(StepTimer):
    """A clock whose timeline is the worker's own."""

    def __init__(self, pulse: PhaseTimer, device: torch.device) -> None:
        super().__init__(device)
        self._pulse = pulse

    def trace(self, trace: SpanKeeper | None) -> None:
        self._pulse.trace = trace


@dataclass
class _Tap:
    """An inbox that remembers its last message."""

    inbox: Inbox
    last: Message | None = None

    def receive(self) -> Message:
        self.last = self.inbox.receive()
        return self.last

    def hold(self) -> Message:
        """Return a copy of the last message."""
        assert self.last is not None
        return Message(
            self.last.header, {name: tensor.clone() for name, tensor in self.last.fields.items()}
        )


class Local:
    """The stages that one worker hosts, each in its seat, as in training."""

    def __init__(self, place: Mesh, config: Resolved, asked: SystemRequest) -> None:
        self._place = place
        self.seats = _seats(place, config)
        self.clock: StepTimer = _PulseClock(self.seats[0].tools.pulse, self.seats[0].stage.device)
        self._taps = [_Tap(seat.inbox) for seat in self.seats]
        for seat, tap in zip(self.seats, self._taps, strict=True):
            seat.inbox = tap
        self._held: list[Message] = []
        modules = [module for seat in self.seats for module in seat.stage.blocks.modules()]
        self._jittering = [
            module for module in modules if isinstance(module, Wait) and module.jitter > 0
        ]

    def warm(self) -> None:
        # Every worker runs one message ahead of the next one, so that each edge holds a message when a window begins.
        for _ in range(WARM_UP + self._place.world - 1 - self._place.rank):
            self.step()
        self._held = [tap.hold() for tap in self._taps]

    def step(self) -> None:
        clock = self.clock
        for seat in self.seats:
            seat.turn()
            if clock.busy is None or clock.receive is None or clock.send is None:
                continue
            spans = seat.tools.pulse.spans
            clock.busy += seat.tools.pulse.compute_s
            clock.receive += spans.get("receive", 0.0) + spans.get("data", 0.0)
            clock.send += spans.get("send", 0.0)

    def steady(self) -> None:
        """Step without the jitter of a chain."""
        self._jitter(False)
        self.step()
        self._jitter(True)

    def bound(self) -> None:
        """Do a step's computing on the messages that are held, channels off, without jitter."""
        self._jitter(False)
        for seat, message in zip(self.seats, self._held, strict=True):
            _compute(seat.stage, message, seat.tools.schedule)
        self._jitter(True)

    def _jitter(self, on: bool) -> None:
        for wait in self._jittering:
            wait.jittering = on

    def weights(self) -> dict[str, Tensor]:
        return {name: value for seat in self.seats for name, value in seat.stage.weights().items()}

    def close(self) -> None:
        """Nothing to let go of: the process ends."""


def _compute(stage: Stage, message: Message, schedule: LearningRateSchedule) -> None:
    h = stage.forward(message)
    loss = stage.local_loss(message, h)
    if stage.sends_gradient:
        stage.boundary_gradient(loss, h)
    stage.update(stage.reconciled(loss, message), message, schedule.rate(message.header.step))


def _seats(place: Mesh, config: Resolved) -> list[StageRunner]:
    pulse = PhaseTimer()
    stages = build_stages(place, config, pulse)
    dataset = data.load(config.data, config.run.seed)
    course = endless_schedule(config, len(dataset.train.labels))
    tools = RunnerContext(
        LearningRateSchedule(config.optim, course.steps_per_epoch), pulse, None, None
    )
    loader = None
    if stages[0].plan.is_first:
        own, pinned = stages[0].replicas, stages[0].device.type == "cuda"
        schedule = course.headers(0, own.index)
        loader = BatchSource(
            dataset, schedule, config.run.seed, float("inf"), agree=own.first_says, pinned=pinned
        )
    return join_stages(place, config, stages, loader, tools)

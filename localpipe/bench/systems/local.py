"""localpipe itself: its pipeline, or the same stages in turn in one process (`sequential`).

`frozen-copies` is the pipeline with `method.feedback` but without any refresh.

In a bound window every worker computes at the same time: forward, local loss, backward and update
of all stages it hosts, on messages that it already has, with the channels off. Batch size over the
slowest worker's time for a batch is the bound. The pipeline's rate over the bound, pair by pair, is
the efficiency. Queues keep their messages between windows, so that no window pays for filling them.
A chain with jitter has windows of the same pipeline without jitter too. Its bound has no jitter.

A step is one update, of `optim.accumulate` messages, and so is a step of the bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from localpipe import data
from localpipe.bench.systems.batches import endless_schedule
from localpipe.bench.systems.spec import System, SystemRequest, SystemSpec
from localpipe.bench.systems.step_timer import StepTimer
from localpipe.config.resolved import Resolved
from localpipe.networks.chain import Wait
from localpipe.pipeline.channels.channel import Inbox
from localpipe.pipeline.channels.groups import end_groups
from localpipe.pipeline.channels.message import Message
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from localpipe.pipeline.stages.stage import Stage, encode_output, mark_nothing, train_step
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.workers.assemble import build_source, build_stages, join_stages
from localpipe.pipeline.workers.edges import Edges
from localpipe.pipeline.workers.loop import RunnerContext, StageRunner
from localpipe.pipeline.workers.mesh import Mesh, assign_hosts
from localpipe.pipeline.workers.phase import PhaseTimer, SpanKeeper
from localpipe.plan.costs import count_costs

_FLOAT_BYTES = 4
WARM_UP_STEPS = 8
MIN_STEPS = 5  # of a window: messages may wait in queues


class _RunnerTimer(StepTimer):
    """A timer whose trace is the worker's own."""

    def __init__(self, timer: PhaseTimer, device: torch.device) -> None:
        super().__init__(device)
        self._phase_timer = timer

    def set_trace(self, trace: SpanKeeper | None) -> None:
        self._phase_timer.trace = trace


@dataclass
class _RecordingInbox:
    """An inbox that stores copies of its newest messages, one for every part of a step."""

    inbox: Inbox
    is_recording: bool = True
    copies: dict[int, Message] = field(default_factory=dict)

    def receive(self) -> Message:
        message = self.inbox.receive()
        if self.is_recording:
            fields = {name: tensor.clone() for name, tensor in message.fields.items()}
            self.copies[message.header.part] = Message(message.header, fields)
        return message

    def end_recording(self) -> list[Message]:
        """Store no more messages, and return the copies of one step's parts in their order."""
        self.is_recording = False
        return [self.copies[part] for part in sorted(self.copies)]


class LocalStages(System):
    """The stages that one worker hosts, each with its runner, as in training.

    request: not used. The windows are `step`, `steady` for a chain with jitter, and `bound`.
    """

    def __init__(self, mesh: Mesh, config: Resolved, request: SystemRequest) -> None:
        self._edges_ahead = _count_edges_ahead(mesh, config)
        self._messages = config.optim.accumulate  # of a step
        self.runners = _build_runners(mesh, config)
        self._phase_timer = self.runners[0].context.timer
        self.timer = _RunnerTimer(self._phase_timer, self.runners[0].stage.device)
        self._inboxes = []
        for runner in self.runners:
            inbox = _RecordingInbox(runner.inbox)
            runner.inbox = inbox
            self._inboxes.append(inbox)
        self._bound_messages: list[list[Message]] = []  # by stage, then part
        self._jittering = self._find_jittering()
        # By the configuration, so that all workers take the same windows.
        self._has_jitter = config.only_waits and config.model.args.get("jitter", 0) > 0

    def _find_jittering(self) -> list[Wait]:
        """Return the blocks of a chain with jitter."""
        blocks = []
        for runner in self.runners:
            for module in runner.stage.blocks.modules():
                if isinstance(module, Wait) and module.jitter > 0:
                    blocks.append(module)
        return blocks

    def warm_up(self) -> None:
        """Run eight steps and more, until every edge holds a message. Store one step's messages."""
        # Every worker runs one message ahead of the next one, so that each edge holds a message
        # when a window begins. A whole step ahead might not fit into the edge. So a window may
        # begin within a step: its updates are as many, and what they add up does not matter here.
        for _ in range(WARM_UP_STEPS * self._messages + self._edges_ahead):
            self._turn_stages()
        self._bound_messages = [inbox.end_recording() for inbox in self._inboxes]

    def step(self) -> None:
        """Give every stage of this worker a turn for each message of a step, as training does.

        It waits for messages.
        """
        for _ in range(self._messages):
            self._turn_stages()

    def _turn_stages(self) -> None:
        for runner in self.runners:
            runner.turn()
            spans = self._phase_timer.spans
            self.timer.add(
                busy=self._phase_timer.compute_s,
                receive=spans.get("receive", 0.0) + spans.get("data", 0.0),
                send=spans.get("send", 0.0),
            )

    def trial_step(self) -> None:
        """Compute one step of the `bound` kind, without channels."""
        self._bound_step()

    def window_steps(self) -> dict[str, Callable[[], None]]:
        """Return the steps of `step`, `steady` (only with jitter) and `bound`, in this order."""
        steps = {"step": self.step}
        if self._has_jitter:
            steps["steady"] = self._steady_step
        steps["bound"] = self._bound_step
        return steps

    def _steady_step(self) -> None:
        """Step without the jitter of a chain."""
        self._set_jitter(False)
        self.step()
        self._set_jitter(True)

    def _bound_step(self) -> None:
        """Compute a step on the stored messages, with channels off and without jitter."""
        self._set_jitter(False)
        for part in range(self._messages):
            for runner, messages in zip(self.runners, self._bound_messages, strict=True):
                _train_without_channels(runner, messages[part])
        self._set_jitter(True)

    def _set_jitter(self, on: bool) -> None:
        for block in self._jittering:
            block.jittering = on

    def close(self) -> None:
        """End the groups of the edges and of the replicas, as all workers do at this time."""
        end_groups()

    def weights(self) -> dict[str, Tensor]:
        """Return the weights and buffers of all stages of this worker, auxiliary ones included."""
        weights: dict[str, Tensor] = {}
        for runner in self.runners:
            weights.update(runner.stage.weights())
        return weights


def _train_without_channels(runner: StageRunner, message: Message) -> None:
    """Train a stage, and its probe where it has one, on a message, as its turn does."""
    rate = runner.context.schedule.rate(message.header.step)
    send = partial(encode_output, runner.stage, message)
    h, _ = train_step(runner.stage, message, rate, send, mark_nothing)
    if runner.probe is not None:
        runner.probe.learn(runner.stage.to_standard(h), message.fields["target"])


def _count_edges_ahead(mesh: Mesh, config: Resolved) -> int:
    """Return the number of edges between processes from this worker to the last stage."""
    hosts = assign_hosts(config.replicas, config.pipeline.processes)
    first_stages = sorted({host.stages[0] for host in hosts})
    position = first_stages.index(hosts[mesh.rank].stages[0])
    return len(first_stages) - 1 - position


def _build_runners(mesh: Mesh, config: Resolved) -> list[StageRunner]:
    timer = PhaseTimer()
    stages = build_stages(mesh, config, timer)
    dataset = data.load(config.data, config.run.seed)
    images, messages = len(dataset.train), config.optim.accumulate
    steps = endless_schedule(config, images, config.replicas, messages)
    rates = LearningRateSchedule(config.optim, steps.steps_per_epoch)
    context = RunnerContext(rates, timer, None, None)
    source = None
    if stages[0].plan.is_first:
        source = build_source(config, stages[0], dataset, steps)
    edges = Edges(mesh, config, stages[0].device, timer.mark_connect)
    with_probes = config.run.probe == "linear" and timer.replica == 0
    return join_stages(stages, source, context, edges, with_probes)


# -- what is counted without a worker -----------------------------------------------------------


def _list_cuts(config: Resolved, request: SystemRequest) -> list[int]:
    _, plans = build_plans(config)
    return [plan.last for plan in plans[:-1]]


def _count_sent_bytes(config: Resolved, request: SystemRequest) -> int:
    """Return the bytes of a step that go from process to process: messages and gradients.

    Each of a stage's n replicas sends 2 (n - 1) / n of its gradients, as a ring all-reduce does.
    """
    blueprint, plans = build_plans(config)
    hosts = assign_hosts(config.replicas, config.pipeline.processes)
    edges = {host.stages[-1] for host in hosts}
    nbytes = 0
    for plan in plans:
        if plan.stage in edges and plan.sends is not None:
            nbytes += plan.sends.nbytes
    nbytes *= config.optim.accumulate
    for plan in plans:
        replicas = config.replicas[plan.stage]
        if replicas > 1:
            stage = Stage(plan, blueprint, config, "meta")
            parameters = sum(parameter.numel() for parameter in stage.parameters())
            nbytes += 2 * (replicas - 1) * _FLOAT_BYTES * parameters
    return nbytes


def _count_saved_bytes(config: Resolved) -> list[int]:
    """Return, by rank, the bytes of the largest stage for a sample of the whole batch.

    A replica has its part of them, and it holds one message of a step at a time.
    """
    blueprint, plans = build_plans(config)
    costs = count_costs(blueprint, plans, config)
    saved = []
    for host in assign_hosts(config.replicas, config.pipeline.processes):
        largest = max(costs[stage].activation_bytes_per_sample for stage in host.stages)
        parts = config.replicas[host.stages[0]] * config.optim.accumulate
        saved.append(largest // parts)
    return saved


LOCALPIPE = SystemSpec(
    build=LocalStages,
    list_cuts=_list_cuts,
    count_sent_bytes=_count_sent_bytes,
    count_saved_bytes=_count_saved_bytes,
    is_subject=True,
    is_peer=False,
    accumulates=True,
    min_steps=MIN_STEPS,
)
SEQUENTIAL = SystemSpec(
    build=LocalStages,
    list_cuts=_list_cuts,
    count_sent_bytes=_count_sent_bytes,
    count_saved_bytes=_count_saved_bytes,
    is_peer=False,
    accumulates=True,
    one_process=True,
)
# What the parameters that come back cost: the same networks, of which no copy is ever refreshed.
FROZEN_COPIES = replace(LOCALPIPE, is_subject=False, freezes_copies=True)

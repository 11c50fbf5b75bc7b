"""Parameters that come back from later stages, a fixed number of steps late (`method.feedback`).

    stage k      step t:      take what stage k + 1 had after step t - lag ─▶ forward, ... update
    stage k + 1  step t:      forward, ... update ─▶ keep its parameters, send them back

What a step takes does not depend on when it was made, so neither do the results on processes and
depth. A step waits for parameters only if the lag is shorter than the stages are apart. No stage
waits for a send. Parameters of a stage's newest `lag` steps are kept, for stages in this process
and for checkpoints: what is on its way when a run ends is sent again when it goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from localpipe.config.resolved import Resolved, ResolvedFeedback
from localpipe.errors import RunError
from localpipe.fields import Field, Schema, dtype_name
from localpipe.networks.blueprint import Blueprint
from localpipe.pipeline.channels.channel import RECEIVE_SLOTS, Inbox, Outbox
from localpipe.pipeline.channels.message import Header, Kind
from localpipe.pipeline.channels.streams import take_stream
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import StagePlan
from localpipe.pipeline.workers.edges import BackEdge, Edges
from localpipe.pipeline.workers.mesh import find_rank
from localpipe.pipeline.workers.phase import PhaseTimer

PHASE = "feedback"
FEEDBACK = "feedback"  # the key of a stage's checkpoint


class SnapshotReader(Protocol):
    """Where a stage finds the parameters of a later one."""

    def read(self, step: int) -> Mapping[str, Tensor]:
        """Return the parameters after a step, by name. It waits until they are there.

        Steps come in rising order, each that is due once. The tensors are valid until the next
        call.
        """


class SnapshotWriter(Protocol):
    """The sending end of an edge back."""

    def write(self, step: int, parameters: Mapping[str, Tensor]) -> None:
        """Send the parameters after a step. It does not wait. They stay as they are meanwhile."""

    def flush(self) -> None:
        """Wait until what was written is sent, which waits for a device at most."""


class Snapshots:
    """The parameters of a stage after those of its newest steps that earlier stages may still take.

    With `writers` each is also sent to other processes.
    """

    def __init__(self, stage: Stage, feedback: ResolvedFeedback) -> None:
        self.writers: list[SnapshotWriter] = []
        self._stage, self._feedback = stage, feedback
        self._kept: deque[tuple[int, dict[str, Tensor]]] = deque()

    def add(self, step: int) -> None:
        """Keep and send a copy of what the stage has now, after a step. Forget what is too old."""
        # A stage of this process takes the one of step - lag in its next step.
        while self._kept and self._kept[0][0] < step - self._feedback.lag:
            self._kept.popleft()
        shared = self._stage.shared_parameters()
        self._keep(step, {name: value.clone() for name, value in shared.items()})

    def read(self, step: int) -> Mapping[str, Tensor]:
        """Return the parameters after a step. Raises AssertionError if they are not kept."""
        for kept_step, parameters in self._kept:
            if kept_step == step:
                return parameters
        raise AssertionError("stages of one process run in order")

    def state(self, step: int) -> dict[int, dict[str, Tensor]]:
        """Return what may be taken after a step, {step: parameters}, as a checkpoint holds it."""
        oldest = step - self._feedback.lag
        return {kept: parameters for kept, parameters in self._kept if kept > oldest}

    def load_state(self, state: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Keep and send again what `state` has returned. The tensors may be on another device."""
        self._kept.clear()
        for step, parameters in sorted(state.items()):
            device = self._stage.device
            self._keep(step, {name: value.to(device) for name, value in parameters.items()})

    def _keep(self, step: int, parameters: dict[str, Tensor]) -> None:
        self._kept.append((step, parameters))
        for writer in self.writers:
            writer.write(step, parameters)


class FeedbackEnds:
    """What one stage takes from a later one and gives to earlier ones. By default it is nothing.

    snapshots: None where no stage copies this one. reader: None where this one copies none.
    """

    def __init__(self, stage: Stage) -> None:
        self.snapshots: Snapshots | None = None
        self.reader: SnapshotReader | None = None
        self.stage = stage

    def take(self, header: Header, timer: PhaseTimer) -> None:
        """Take the parameters that are due before a training message, the first one of its step.

        It may wait for them, in phase `feedback`.
        """
        if self.reader is None or header.part > 0:
            return
        assert self.stage.feedback is not None
        due = self.stage.feedback.due(header.step)
        if due is None:
            return
        timer.enter(PHASE)
        self.stage.refresh(self.reader.read(due))

    def give(self, header: Header, timer: PhaseTimer) -> None:
        """Keep and send the stage's parameters after the training message that has ended a step."""
        if self.snapshots is None or not header.ends_step:
            return
        assert self.stage.feedback is not None
        if self.stage.feedback.is_sent(header.step):
            timer.enter(PHASE)
            self.snapshots.add(header.step)

    def flush(self) -> None:
        """Wait until all that was given is sent."""
        if self.snapshots is not None:
            for writer in self.snapshots.writers:
                writer.flush()

    def state(self, step: int) -> dict[str, Any]:
        """Return the part of a checkpoint after a step, empty where no stage copies this one."""
        if self.snapshots is None:
            return {}
        return {FEEDBACK: self.snapshots.state(step)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Load the part of a checkpoint, before the first step. Parameters on their way are sent.

        state: of the stage's whole checkpoint.
        """
        if self.snapshots is not None:
            self.snapshots.load_state(state[FEEDBACK])


class BackReader:
    """The receiving end of an edge back, between two processes."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox

    def read(self, step: int) -> Mapping[str, Tensor]:
        """Return the parameters after a step, on the host. It waits until they have come.

        Raises RunError for those of another step, and NeighbourLostError if the sender is lost.
        """
        message = self._inbox.receive()
        if message.header.step != step:
            raise RunError(
                f"feedback: parameters of step {message.header.step} came back, expected those of "
                f"step {step}; do all workers run the same version and configuration?"
            )
        return {name: value[0] for name, value in message.fields.items()}


class BackWriter:
    """The sending end of an edge back, between two processes."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    def write(self, step: int, parameters: Mapping[str, Tensor]) -> None:
        """Copy the parameters out. The edge has room, since the receiver has taken the older ones.

        Raises NeighbourLostError if the receiver is lost.
        """
        header = Header(Kind.TRAIN, step, 1, count=1)
        fields = {name: value.unsqueeze(0) for name, value in parameters.items()}
        self._outbox.send(header, fields)

    def flush(self) -> None:
        """Do nothing: what was written is sent."""


class DeviceBackWriter:
    """The sending end of an edge back from a CUDA device, whose stage goes on at once.

    A thread waits for a copy to the host on a stream of its own, and then sends. What fails there
    is raised by a later call.
    """

    def __init__(self, writer: SnapshotWriter, device: torch.device) -> None:
        self._writer, self._device = writer, device
        self._stream = take_stream(device)
        self._thread = ThreadPoolExecutor(1, "feedback")
        self._sending: deque[Future[None]] = deque()

    def write(self, step: int, parameters: Mapping[str, Tensor]) -> None:
        """Send the parameters when the device has made them. They must not change meanwhile."""
        while self._sending and self._sending[0].done():
            self._sending.popleft().result()
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self._device))
        self._sending.append(self._thread.submit(self._send, step, dict(parameters), ready))

    def flush(self) -> None:
        """Wait until the thread has sent what was written. Raises what failed there."""
        while self._sending:
            self._sending.popleft().result()

    def _send(self, step: int, parameters: dict[str, Tensor], ready: torch.cuda.Event) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            on_host = {}
            for name, value in parameters.items():
                on_host[name] = torch.empty_like(value, device="cpu", pin_memory=True)
                on_host[name].copy_(value, non_blocking=True)
            self._stream.synchronize()
        self._writer.write(step, on_host)


def snapshot_schema(parameters: Mapping[str, Tensor]) -> Schema:
    """Return the schema of an edge back: the parameters, in a batch of one."""
    fields = []
    for name, value in parameters.items():
        fields.append(Field(name, tuple(value.shape), dtype_name(value.dtype)))
    return Schema(tuple(fields), 1)


def back_schemas(
    config: Resolved, blueprint: Blueprint, plans: Sequence[StagePlan]
) -> dict[tuple[int, int], Schema]:
    """Return the schemas of all edges back between two processes, by (later stage, earlier stage).

    plans: of all stages, which have one replica each. It is empty without `method.feedback`.
    """
    schemas: dict[tuple[int, int], Schema] = {}
    if not config.feeds_back:
        return schemas
    for later, earlier in list_pairs(config.method.feedback, config.stages):
        ranks = [
            find_rank(stage, 0, config.replicas, config.pipeline.processes)
            for stage in (later, earlier)
        ]
        if ranks[0] != ranks[1]:
            stage = Stage(plans[later], blueprint, config, "meta")
            schemas[later, earlier] = snapshot_schema(stage.shared_parameters())
    return schemas


def back_depth(feedback: ResolvedFeedback) -> int:
    """Return the depth of an edge back, with which a send never waits.

    After the update of step s the earlier stage has begun step s, and has taken what was due up to
    it. So ceil(lag / every) snapshots are not received yet, of which the channel's depth counts all
    but the newest. With the one that is read, the ring holds ceil(lag / every) + 1 of them.
    """
    return max(1, feedback.snapshots - 1)


def lag_without_waits(distance: int, depth: int, messages: int = 1) -> int:
    """Return the smallest lag with which no stage waits for parameters.

    distance: of the two stages. depth: of the edges. messages: of a step. A stage is at most
    depth + 2 messages ahead of the next one, and what it takes must have been made.
    """
    return 1 + -(-distance * (depth + RECEIVE_SLOTS) // messages)


def list_pairs(feedback: ResolvedFeedback, stages: int) -> list[tuple[int, int]]:
    """Return (later stage, earlier stage) of all parameters that come back, sorted."""
    if feedback.mode == "block":
        return [(stage + 1, stage) for stage in range(stages - 1)]
    return [(stages - 1, stage) for stage in range(stages - 1)]


def join_feedback(stages: Sequence[Stage], edges: Edges | None) -> list[FeedbackEnds]:
    """Return the ends of the consecutive stages of a process, in order.

    They are joined in memory to each other, and by `edges` to stages of other processes, for which
    it waits. Without edges, all stages of the pipeline are here. Raises RunError if the other end
    of an edge has another version or configuration.
    """
    ends = [FeedbackEnds(stage) for stage in stages]
    feedback = stages[0].feedback
    if feedback is None:
        return ends
    pairs = list_pairs(feedback, stages[0].plan.stages)
    hosted = {stage.plan.stage: end for stage, end in zip(stages, ends, strict=True)}
    for later, earlier in pairs:
        if later in hosted and hosted[later].snapshots is None:
            hosted[later].snapshots = Snapshots(hosted[later].stage, feedback)
        if later in hosted and earlier in hosted:
            hosted[earlier].reader = hosted[later].snapshots
    if edges is not None:
        for edge in edges.list_back_edges(pairs):
            _open_back_edge(edge, hosted, edges, back_depth(feedback))
    return ends


def _open_back_edge(
    edge: BackEdge, hosted: Mapping[int, FeedbackEnds], edges: Edges, depth: int
) -> None:
    """Open the end of an edge back that is in this process, and give it to its stage."""
    if edge.later not in hosted:
        end = hosted[edge.earlier]
        schema = snapshot_schema(end.stage.copied_parameters())
        end.reader = BackReader(edges.open_back_inbox(edge, schema, depth))
        return
    end = hosted[edge.later]
    schema = snapshot_schema(end.stage.shared_parameters())
    writer: SnapshotWriter = BackWriter(edges.open_back_outbox(edge, schema, depth))
    if end.stage.device.type == "cuda":
        writer = DeviceBackWriter(writer, end.stage.device)
    assert end.snapshots is not None, "this stage is copied"
    end.snapshots.writers.append(writer)

"""The loop of a worker: it hosts one or more consecutive stages and runs them in turn.

receive -> forward -> send -> local loss, backward -> update -> record

With `method.feedback`, parameters of a later stage are taken before the forward pass when they are
due, and the stage's own are given after the update.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from localpipe.errors import CrashError, RunError
from localpipe.pipeline.channels.channel import Inbox, Outbox
from localpipe.pipeline.channels.message import Flag, Header, Kind, Message
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from localpipe.pipeline.stages.probe import Probe
from localpipe.pipeline.stages.stage import Stage, train_step
from localpipe.pipeline.workers.device import (
    Stopwatch,
    describe_memory_error,
    peak_memory_bytes,
)
from localpipe.pipeline.workers.feedback import FeedbackEnds
from localpipe.pipeline.workers.meter import EvaluationSums, Meter, RecordWindow, Throughput
from localpipe.pipeline.workers.phase import PhaseTimer


@dataclass
class RunnerContext:
    """What all stages of a worker have in common.

    schedule: the learning rates. timer: of the worker's main thread. recorder, checkpoints: None if
    this worker writes none. log_every: steps between two training records. facts: what the manifest
    of a checkpoint states.
    """

    schedule: LearningRateSchedule
    timer: PhaseTimer
    recorder: RecordWriter | None
    checkpoints: CheckpointWriter | None
    log_every: int = 10
    facts: dict[str, object] = field(default_factory=dict)


class RecordWriter(Protocol):
    """Writes the records of a stage."""

    def write(self, kind: str, **values: Any) -> None:
        """Write one record of a kind: `train`, `eval` or `checkpoint`.

        values: `step`, `epoch`, `stage` and those of the kind, all of which JSON can hold.
        """


class CheckpointWriter(Protocol):
    """Writes the checkpoints of a stage."""

    def write_stage(self, step: int, stage: int, state: Mapping[str, Any]) -> None:
        """Write one stage's state; it is not used before the last stage commits the step.

        state: that of `Stage.state`, `meter`, `probe` (None without one) and `step`, and where
        earlier stages copy this one, `feedback`. It returns when the state is on disk.
        """

    def commit(self, step: int, facts: Mapping[str, Any]) -> None:
        """Declare the checkpoint of a step complete, after every stage has written it.

        facts: what the manifest states beside the step. The last stage calls it once for a step.
        """


class StageRunner:
    """Runs one stage of a pipeline, between an inbox and an outbox.

    outbox: None for the last stage. saved_step: the newest step on disk, or -1. probe: None without
    one. `saved_step` and `committed_step` are raised by saves of this stage and of the pipeline.
    """

    def __init__(
        self,
        stage: Stage,
        inbox: Inbox,
        outbox: Outbox | None,
        context: RunnerContext,
        saved_step: int = -1,
        probe: Probe | None = None,
    ) -> None:
        self.stage, self.inbox, self.outbox = stage, inbox, outbox
        self.context, self.probe = context, probe
        self.feedback = FeedbackEnds(stage)
        self.meter = Meter()
        self.throughput = Throughput()
        self.stopwatch = Stopwatch(stage.device)
        self.saved_step = saved_step  # of this stage
        self.committed_step = saved_step  # of the whole pipeline; counted by the last stage
        self.ends_step = True  # whether the last message did
        self._sums, self._probe_sums = EvaluationSums(), EvaluationSums()
        self._window = RecordWindow(time.monotonic())

    def turn(self) -> bool:
        """Run the stage on one message; return whether another one follows: False after Flag.STOP.

        It waits for the message, trains or evaluates, and sends on. Then it saves and commits as
        the flags say. An EMPTY message is only sent on. The context's recorder and checkpoints are
        called inside.
        Raises RunError if a loss or a saved weight is not finite, or if a neighbour is lost. Other
        errors of the stage, the inbox and the writers pass through.
        """
        message = self._receive()
        header = message.header
        if header.kind is Kind.TRAIN:
            self._train(message)
        elif header.kind.is_evaluation:
            with self.stage.use_average():
                self._evaluate(message)
        else:
            self._send(message, None)
        if header.flags & Flag.SAVE_AFTER:
            self._save(header)
        if self.stage.plan.is_last:
            self._commit(header)
        self.ends_step = header.ends_step
        return not header.flags & Flag.STOP

    def _receive(self) -> Message:
        timer, plan = self.context.timer, self.stage.plan
        timer.begin_turn(plan.stage, "data" if plan.is_first else "receive")
        message = self.inbox.receive()
        timer.step = message.header.step
        return message

    def _train(self, message: Message) -> None:
        timer = self.context.timer
        rate = self.context.schedule.rate(message.header.step)
        send = partial(self._send, message)
        self.feedback.take(message.header, timer)
        self.stopwatch.begin()
        h, loss = train_step(self.stage, message, rate, send, timer.enter)
        timer.enter("probe")
        self.stopwatch.stop()
        if self.probe is not None:
            self.probe.learn(self.stage.to_standard(h), message.fields["target"])
        self.feedback.give(message.header, timer)
        if self.stopwatch.runs_ahead:
            timer.enter("update")  # the device is still in it, and the host will wait
        else:
            timer.enter("record")
        self._record(message.header, loss)

    def _evaluate(self, message: Message) -> None:
        timer, header = self.context.timer, message.header
        timer.enter("eval")
        self.settle()
        h = self.stage.forward(message)
        self._send(message, h)
        timer.enter("eval")
        if self.probe is not None:
            standard = self.stage.to_standard(h)
            probe_sums = self.probe.measure(standard, message.fields["target"])
            self._probe_sums.add(probe_sums, header.count)
        self._sums.add(self.stage.measure(message, h), header.count)
        if header.flags & Flag.END_EVAL:
            self._write("eval", header, split=header.kind.name.lower(), **self._figures())
            self._sums, self._probe_sums = EvaluationSums(), EvaluationSums()
            if header.kind is Kind.TEST:  # the last split of an evaluation
                self.meter.restart()
        self.throughput.interrupt()

    def _figures(self) -> dict[str, object]:
        """Return the figures of an evaluation's record. Waits for a device."""
        task = self.stage.task
        values = self._sums.result(task)
        if self.probe is not None:
            name = task.metric.name
            values[f"probe_{name}"] = self._probe_sums.result(task)[name]
        return values

    def _send(self, message: Message, h: Tensor | None, gradient: Tensor | None = None) -> None:
        if self.outbox is None:
            return
        # Encoding belongs to the phase before it: it is work of this stage, not a transfer.
        fields: Mapping[str, Tensor] = {}
        if h is not None:
            fields = self.stage.outgoing(message, h, gradient)
        self.context.timer.enter("send")
        header = message.header
        saved = self._newest_saved_step(header)
        if header.saved != saved:
            header = replace(header, saved=saved)
        with self.stopwatch.pause():
            self.outbox.send(header, fields)

    def settle(self) -> None:
        """Wait until a device has ended every turn, and count each. Raises as `Meter.settle`."""
        self.stopwatch.settle()
        self.meter.settle()

    def _record(self, header: Header, loss: Tensor) -> None:
        timer = self.context.timer
        timer.armed = True
        self.meter.add(header.step, loss, header.count)
        record: _TrainRecord | None = None
        if header.ends_step and header.step % self.context.log_every == 0:
            record = _TrainRecord(partial(self._write, "train", header))
            self.meter.report(record.add_loss)
        count_turn = partial(self._count_turn, header, timer.spans, record)
        self.stopwatch.finish(timer.compute_s, count_turn)

    def _count_turn(
        self,
        header: Header,
        spans: Mapping[str, float],
        record: _TrainRecord | None,
        end: float,
        compute_s: float,
    ) -> None:
        """Count a turn that has ended at `end`. record: of the window that ends with it, if any."""
        self.meter.busy_s += compute_s
        self.throughput.step(end, compute_s, header.total_count)
        self._window.add(spans, compute_s, header.total_count)
        if record is not None:
            values: dict[str, object] = {
                "lr": self.context.schedule.rate(header.step),
                **self._window.result(end),
                "peak_memory_bytes": peak_memory_bytes(self.stage.device),
            }
            self._window = RecordWindow(end)
            record.add_values(values)

    def _save(self, header: Header) -> None:
        if header.step <= max(self.saved_step, 0):
            return
        self.context.timer.enter("save")
        # A checkpoint never has weights after a loss that was not finite.
        self.settle()
        self.throughput.interrupt()
        self.stage.check_finite()
        if self.context.checkpoints is not None:
            state = self._checkpoint_state(header.step)
            self.context.checkpoints.write_stage(header.step, self.stage.plan.stage, state)
        self.saved_step = header.step

    def _checkpoint_state(self, step: int) -> dict[str, Any]:
        probe_state = None
        if self.probe is not None:
            probe_state = self.probe.state()
        return {
            **self.stage.state(),
            "meter": self.meter.state(),
            "probe": probe_state,
            "step": step,
            **self.feedback.state(step),
        }

    def load_checkpoint_state(self, state: Mapping[str, Any], step: int) -> None:
        """Load the state that a checkpoint of a step holds of this stage. Errors: `load_state`.

        Raises KeyError if a key is missing.
        """
        self.stage.load_state(state)
        self.meter.load_state(state["meter"])
        self.feedback.load_state(state)
        if self.probe is not None:
            self.probe.load_state(state["probe"])
        self.saved_step = step
        self.committed_step = step

    def state(self, step: int) -> dict[str, Any]:
        """Return all that the next message depends on, between two steps, as torch.save writes it.

        It is a checkpoint's state, and what a checkpoint is never made in the middle of: a running
        evaluation and the sums of a training record. step: of the last message. Waits for a device.
        """
        self.settle()
        self.feedback.flush()
        return {
            "checkpoint": self._checkpoint_state(step),
            "saved_step": self.saved_step,
            "committed_step": self.committed_step,
            "evaluation": self._sums.state(),
            "probe_evaluation": self._probe_sums.state(),
            "losses": self.meter.window_state(),
            "throughput": self.throughput.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state`. Raises KeyError if a key is missing, and as `load_state`.

        Tensors may be on another device, and then the sums of an evaluation are moved.
        """
        self.load_checkpoint_state(state["checkpoint"], state["saved_step"])
        self.committed_step = state["committed_step"]
        self._sums.load_state(_on_device(state["evaluation"], self.stage.device))
        self._probe_sums.load_state(_on_device(state["probe_evaluation"], self.stage.device))
        self.meter.load_window_state(state["losses"])
        self.restart_rates(state)

    def restart_rates(self, state: Mapping[str, Any]) -> None:
        """Count speed from now on, after what `state` has counted."""
        self.throughput.load_state(state["throughput"])
        self._window = RecordWindow(time.monotonic())

    def _newest_saved_step(self, header: Header) -> int:
        """Return the newest step that this stage and all before it have on disk, or -1."""
        if self.stage.plan.is_first:
            return self.saved_step
        return min(self.saved_step, header.saved)

    def _commit(self, header: Header) -> None:
        """Declare a step complete if every stage has it on disk; only the last stage does this."""
        step = self._newest_saved_step(header)
        if step > self.committed_step and self.context.checkpoints is not None:
            self.context.timer.enter("save")
            self.context.checkpoints.commit(step, self.context.facts)
            self._write("checkpoint", replace(header, step=step))
            self.committed_step = step

    def _write(self, kind: str, header: Header, **values: object) -> None:
        if self.context.recorder is not None:
            self.context.recorder.write(
                kind, step=header.step, epoch=header.epoch, stage=self.stage.plan.stage, **values
            )


def _on_device(sums: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the state of an evaluation's sums with its tensors on a device."""
    moved = {name: value.to(device) for name, value in sums["sums"].items()}
    return {**sums, "sums": moved}


class _TrainRecord:
    """A training record that is written when its loss and its other values are there.

    On a device they arrive a few turns later, in any order. A loss that is not finite ends the run,
    and its record is never written. write: takes the values by name.
    """

    def __init__(self, write: Callable[..., None]) -> None:
        self._write = write
        self._loss: float | None = None
        self._values: Mapping[str, object] | None = None

    def add_loss(self, loss: float) -> None:
        """Take the mean loss of the window."""
        self._loss = loss
        self._write_if_complete()

    def add_values(self, values: Mapping[str, object]) -> None:
        """Take the other values of the record."""
        self._values = values
        self._write_if_complete()

    def _write_if_complete(self) -> None:
        if self._loss is not None and self._values is not None:
            self._write(loss=self._loss, **self._values)


class MessageCounter(Protocol):
    """Counts what a worker has done, so that another process can go on from there."""

    def count_message(self, is_last: bool) -> None:
        """Count a message that has passed all stages of the worker.

        It may write a snapshot, unless the message is the last one, with Flag.STOP.
        """


class Worker:
    """The consecutive stages of one process. counter: None where nobody goes on in its place."""

    def __init__(
        self,
        runners: Sequence[StageRunner],
        timer: PhaseTimer,
        counter: MessageCounter | None = None,
    ) -> None:
        self.runners, self.timer, self.counter = runners, timer, counter

    def run(self) -> None:
        """Run the stages in turn until the stop has passed all of them, then close the last outbox.

        Errors name stage, replica and step. A RunError keeps its class. Memory that does not
        suffice is a RunError. Any other Exception, and SystemExit, is raised as a CrashError. The
        timer is in phase `end` only after success.
        """
        try:
            more = True
            while more:
                for runner in self.runners:
                    more = runner.turn()
                if self.counter is not None:
                    self.counter.count_message(is_last=not more)
            self._close()
        except RunError as error:
            raise type(error)(f"{self.timer.position}: {error}") from error
        except (Exception, SystemExit) as error:
            reason = describe_memory_error(error)
            if reason is not None:
                raise RunError(f"{self.timer.position}: {reason}") from error
            text = f"{self.timer.position}: {type(error).__name__}: {error}".removesuffix(": ")
            raise CrashError(text) from error
        self.timer.enter("end")

    def _close(self) -> None:
        """Wait until the neighbour has taken every message and the host has read every loss."""
        outbox = self.runners[-1].outbox
        if outbox is not None:
            self.timer.enter("send")
            outbox.close()
        for runner in self.runners:
            runner.settle()

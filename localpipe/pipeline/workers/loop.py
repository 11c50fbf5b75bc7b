"""The loop of a worker: it hosts one or more consecutive stages and takes their messages in turn.

receive -> forward -> send -> local loss, backward -> update -> record
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from localpipe.errors import CrashError, RunError
from localpipe.pipeline.channels.channel import Inbox, Outbox
from localpipe.pipeline.channels.message import Flag, Header, Kind, Message
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from localpipe.pipeline.stages.probe import Probe
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.workers.device import Stopwatch, peak_memory_bytes
from localpipe.pipeline.workers.meter import EvaluationSums, Meter, RecordWindow, Throughput
from localpipe.pipeline.workers.phase import PhaseTimer


@dataclass
class RunnerContext:
    """What every stage of a worker shares."""

    schedule: LearningRateSchedule
    pulse: PhaseTimer
    recorder: RecordWriter | None
    checkpoints: CheckpointWriter | None
    log_every: int = 10
    facts: dict[str, object] = field(default_factory=dict)


class RecordWriter(Protocol):
    """Takes the records of a stage."""

    def write(self, kind: str, **values: Any) -> None:
        """Take one record."""


class CheckpointWriter(Protocol):
    """Takes the checkpoints of a stage."""

    def write_stage(self, step: int, stage: int, state: Mapping[str, Any]) -> None:
        """Put one stage's state on disk; it counts only after the last stage commits the step."""

    def commit(self, step: int, facts: Mapping[str, Any]) -> None:
        """Declare a step complete."""


class StageRunner:
    """A stage in its place in the pipeline, between an inbox and an outbox."""

    def __init__(
        self,
        stage: Stage,
        inbox: Inbox,
        outbox: Outbox | None,
        tools: RunnerContext,
        saved: int = -1,
        probe: Probe | None = None,
    ) -> None:
        self.stage, self.inbox, self.outbox, self.tools = stage, inbox, outbox, tools
        self.meter, self.pace, self.stopwatch = Meter(), Throughput(), Stopwatch(stage.device)
        self.probe = probe
        self.saved = self.committed = (
            saved  # newest step of this stage on disk; of the whole pipeline (last stage)
        )
        self._judged = EvaluationSums()
        self._window = RecordWindow()

    def turn(self) -> bool:
        """Take one message; return whether another one follows."""
        pulse = self.tools.pulse
        pulse.turn(self.stage.plan.stage, "data" if self.stage.plan.is_first else "receive")
        message = self.inbox.receive()
        header = message.header
        pulse.step = header.step
        if header.kind is Kind.TRAIN:
            self._train(message)
        elif header.kind.evaluates:
            self._evaluate(message)
        else:
            self._send(message, None)
        if header.flags & Flag.SAVE_AFTER:
            self._save(header)
        if self.stage.plan.is_last:
            self._commit(header)
        return not header.flags & Flag.STOP

    def _train(self, message: Message) -> None:
        pulse, step = self.tools.pulse, message.header.step
        pulse.enter("forward")
        self.stopwatch.begin()
        h = self.stage.forward(message)
        if not self.stage.sends_gradient:  # the activation needs nothing else, so it goes first
            self._send(message, h)
        pulse.enter("loss")
        loss = self.stage.local_loss(message, h)
        if self.stage.sends_gradient:
            gradient = self.stage.boundary_gradient(loss, h)
            self._send(message, h, gradient)
        pulse.enter("update")
        self.stage.update(
            self.stage.reconciled(loss, message), message, self.tools.schedule.rate(step)
        )
        pulse.enter("probe")
        compute_s = self.stopwatch.lap(pulse.compute_s)
        if self.probe is not None:
            self.probe.learn(h, message.fields["target"])
        pulse.enter("record")
        self._record(message.header, loss, compute_s)

    def _evaluate(self, message: Message) -> None:
        pulse, header = self.tools.pulse, message.header
        pulse.enter("eval")
        self.meter.settle()
        h = self.stage.forward(message)
        self._send(message, h)
        pulse.enter("eval")
        found = None if self.probe is None else self.probe.score(h, message.fields["target"])
        self._judged.add(self.stage.judge(message, h), found, header.count)
        if header.flags & Flag.END_EVAL:
            self._write("eval", header, split=header.kind.name.lower(), **self._judged.result())
            self._judged = EvaluationSums()
            if header.kind is Kind.TEST:  # the last split of an evaluation
                self.meter.restart()
        self.pace.interrupt()

    def _send(self, message: Message, h: Tensor | None, gradient: Tensor | None = None) -> None:
        if self.outbox is None:
            return
        self.tools.pulse.enter("send")
        fields = {} if h is None else self.stage.outgoing(message, h, gradient)
        header, covered = message.header, self._covered(message.header)
        with self.stopwatch.apart():
            self.outbox.send(
                header if header.saved == covered else replace(header, saved=covered), fields
            )

    def _record(self, header: Header, loss: Tensor, compute_s: float) -> None:
        pulse = self.tools.pulse
        pulse.armed = True
        self.meter.add(header.step, loss, header.count)
        self.meter.busy_s += compute_s
        self.pace.step(time.monotonic(), compute_s, header.whole)
        self._window.add(pulse, compute_s, header.whole)
        if header.ends_step and header.step % self.tools.log_every == 0:
            values = {"lr": self.tools.schedule.rate(header.step), **self._window.result()}
            peak = peak_memory_bytes(self.stage.device)
            # Written when the losses have come: what is not finite ends the run, and is never written.
            self.meter.tell(
                lambda loss: self._write(
                    "train", header, loss=loss, **values, peak_memory_bytes=peak
                )
            )
            self._window = RecordWindow()

    def _save(self, header: Header) -> None:
        if header.step <= max(self.saved, 0):
            return
        self.pace.interrupt()
        self.tools.pulse.enter("save")
        self.meter.settle()  # a checkpoint never holds weights behind a loss that was not finite
        self.stage.check_finite()
        if self.tools.checkpoints is not None:
            probe = None if self.probe is None else self.probe.state()
            state = {
                **self.stage.state(),
                "meter": self.meter.state(),
                "probe": probe,
                "step": header.step,
            }
            self.tools.checkpoints.write_stage(header.step, self.stage.plan.stage, state)
        self.saved = header.step

    def _covered(self, header: Header) -> int:
        """Return the newest step that this stage and all before it have on disk."""
        return self.saved if self.stage.plan.is_first else min(self.saved, header.saved)

    def _commit(self, header: Header) -> None:
        covered = self._covered(header)
        if covered > self.committed and self.tools.checkpoints is not None:
            self.tools.pulse.enter("save")
            self.tools.checkpoints.commit(covered, self.tools.facts)
            self._write("checkpoint", replace(header, step=covered))
            self.committed = covered

    def _write(self, kind: str, header: Header, **values: object) -> None:
        if self.tools.recorder is not None:
            self.tools.recorder.write(
                kind, step=header.step, epoch=header.epoch, stage=self.stage.plan.stage, **values
            )


class Worker:
    """The consecutive stages of one process."""

    def __init__(self, seats: Sequence[StageRunner], pulse: PhaseTimer) -> None:
        self.seats, self.pulse = seats, pulse

    def run(self) -> None:
        """Take messages in turn until the stop has passed every stage; errors name stage, replica and step."""
        try:
            more = True
            while more:
                for seat in self.seats:
                    more = seat.turn()
            last = self.seats[-1].outbox
            if last is not None:
                self.pulse.enter("send")
                last.close()
            for seat in self.seats:
                seat.meter.settle()
        except RunError as error:
            raise type(error)(f"{self.pulse.where()}: {error}") from error
        except (Exception, SystemExit) as error:
            raise CrashError(f"{self.pulse.where()}: {type(error).__name__}: {error}") from error
        self.pulse.enter("end")

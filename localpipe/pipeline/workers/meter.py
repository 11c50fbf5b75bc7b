"""Running sums of a stage: losses, throughput, evaluation sums and the means of a record."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from localpipe.errors import RunError
from localpipe.tasks.task import Task

FIRST_STEPS = 5  # left out of every rate: kernels, caches and queues are still filling
Report = Callable[[float], None]


class EvaluationSums:
    """Sums over one evaluation of a stage's exit, or of its probe."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._samples = 0

    def add(self, sums: Mapping[str, Tensor] | None, count: int) -> None:
        """Add a batch of `count` samples. It does not wait for a device.

        sums: as `measure_batch` gives them, or None without an exit.
        """
        self._samples += count
        for name, value in (sums or {}).items():
            self._sums[name] = self._sums.get(name, 0) + value

    def state(self) -> dict[str, Any]:
        """Return the sums of an evaluation that goes on, not copied: `sums` and `samples`."""
        return {"sums": self._sums, "samples": self._samples}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state`. The sums stay on their device. KeyError without a key."""
        self._sums, self._samples = dict(state["sums"]), state["samples"]

    def result(self, task: Task) -> dict[str, object]:
        """Return the values of an evaluation's record. Waits for a device. The sums stay.

        They are `loss`, the mean, and the task's figures, each None without an exit or where it is
        not finite, and `samples`, their number.
        """
        values: dict[str, float | None] = dict.fromkeys(("loss", *task.figures))
        if self._sums:
            values["loss"] = float(self._sums["loss"]) / self._samples
            values.update(task.summarise(self._sums, self._samples))
        finite = {name: _finite_or_none(value) for name, value in values.items()}
        return {**finite, "samples": self._samples}


def _finite_or_none(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return value


class RecordWindow:
    """Sums between two training records. start: when it begins, of the monotonic clock."""

    def __init__(self, start: float) -> None:
        self.start = start
        self.samples = 0
        self.compute_s = 0.0
        self.receive_s = 0.0
        self.send_s = 0.0

    def add(self, spans: Mapping[str, float], compute_s: float, samples: int) -> None:
        """Add a training message; `samples` counts those of all replicas.

        spans: the seconds of its phases, of which those of waiting are read. compute_s: its seconds
        of computing.
        """
        self.samples += samples
        self.compute_s += compute_s
        self.receive_s += spans.get("receive", 0.0) + spans.get("data", 0.0)
        self.send_s += spans.get("send", 0.0)

    def result(self, end: float) -> dict[str, float]:
        """Return the values of a training record: a rate, and fractions of the wall time.

        `samples_per_s` is rounded to 2 digits, `busy`, `receive_wait` and `send_wait` to 4. The
        wall time is that from the start to `end`. The sums stay.

        A host that runs ahead of its device waits while the device computes, which costs nothing.
        So the two waits are at most the time without computing.
        """
        wall_s = max(end - self.start, 1e-9)
        waits_s = self.receive_s + self.send_s
        idle_s = max(wall_s - self.compute_s, 0.0)
        part = 1.0
        if waits_s > idle_s:
            part = idle_s / waits_s
        return {
            "samples_per_s": round(self.samples / wall_s, 2),
            "busy": round(self.compute_s / wall_s, 4),
            "receive_wait": round(part * self.receive_s / wall_s, 4),
            "send_wait": round(part * self.send_s / wall_s, 4),
        }


@dataclass(frozen=True)
class _Arrival:
    """A loss on its way to the host.

    `copied` is an event that has passed when the host has the loss. It is None if the loss was on
    the host from the start.
    """

    step: int
    loss: Tensor
    samples: int
    copied: torch.cuda.Event | None

    @property
    def is_on_host(self) -> bool:
        return self.copied is None or self.copied.query()


class Meter:
    """A stage's mean training loss.

    It is part of the stage's checkpoint, so that a resumed run reports what an undisturbed one
    does. A loss is read when it has arrived from the device, at least one step later. The device is
    waited for only at an evaluation, a checkpoint and the end.
    """

    def __init__(self) -> None:
        self.loss_sum = 0.0
        self.samples = 0
        self.busy_s = 0.0
        self._whole_epoch: float | None = None
        self._pending: deque[_Arrival | Report] = deque()
        self._window: list[tuple[float, int]] = []

    def add(self, step: int, loss: Tensor, samples: int) -> None:
        """Add a training loss, 0-dim, the mean over `samples` rows. It does not wait for a device.

        Losses that have arrived meanwhile are read, and reports on them are called. Raises RunError
        if such a loss is not finite. step: for that error.
        """
        while self._pending and _is_ready(self._pending[0]):
            self._process_next()
        self._pending.append(_start_copy(step, loss, samples))

    def report(self, report: Report) -> None:
        """Call `report` with the mean loss since the last report.

        The call is made when all losses that were added so far have arrived: at once on the CPU,
        else inside a later method. It is not made if none was added since the last report. Raises
        RunError if a loss is not finite.
        """
        self._pending.append(report)
        if not any(_is_in_flight(entry) for entry in self._pending):
            self.settle()

    def settle(self) -> None:
        """Read every loss, waiting for the device, and make the calls of all reports.

        Raises RunError if a loss is not finite. A second call does nothing.
        """
        while self._pending:
            entry = self._pending[0]
            if isinstance(entry, _Arrival) and entry.copied is not None:
                entry.copied.synchronize()
            self._process_next()

    def _process_next(self) -> None:
        entry = self._pending.popleft()
        if isinstance(entry, _Arrival):
            self._read_loss(entry)
            return
        samples = sum(count for _, count in self._window)
        if samples:
            entry(sum(loss * count for loss, count in self._window) / samples)
        self._window = []

    def _read_loss(self, arrival: _Arrival) -> None:
        loss = float(arrival.loss)
        if not math.isfinite(loss):
            raise RunError(
                f"the local loss of step {arrival.step} is {loss}; "
                "start a new run with a lower optim.lr, or look at the data"
            )
        self.loss_sum += loss * arrival.samples
        self.samples += arrival.samples
        self._window.append((loss, arrival.samples))

    def mean_loss(self) -> float | None:
        """Return the mean local loss since the last restart, over samples.

        Without a step since then it is that of the epoch before, and None before the first step. It
        waits for the device, and raises RunError if a loss is not finite.
        """
        self.settle()
        if not self.samples:
            return self._whole_epoch
        return self.loss_sum / self.samples

    def restart(self) -> None:
        """Begin a new epoch. The mean of the old one stays until the next step. It settles."""
        self._whole_epoch = self.mean_loss()
        self.loss_sum = 0.0
        self.samples = 0

    def state(self) -> dict[str, float | None]:
        """Return the sums, for a checkpoint: `loss_sum`, `samples`, `busy_s`, `whole_epoch`.

        `whole_epoch` is the mean loss of the epoch before, or None. It settles first.
        """
        self.settle()
        return {
            "loss_sum": self.loss_sum,
            "samples": self.samples,
            "busy_s": self.busy_s,
            "whole_epoch": self._whole_epoch,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state`. Raises KeyError if a key is missing."""
        self.loss_sum = state["loss_sum"]
        self.samples = state["samples"]
        self.busy_s = state["busy_s"]
        self._whole_epoch = state["whole_epoch"]

    def window_state(self) -> list[tuple[float, int]]:
        """Return the losses since the last report, each with its samples. It settles first."""
        self.settle()
        return list(self._window)

    def load_window_state(self, state: Sequence[tuple[float, int]]) -> None:
        """Load the result of `window_state`."""
        self._window = list(state)


def _is_in_flight(entry: _Arrival | Report) -> bool:
    return isinstance(entry, _Arrival) and entry.copied is not None


def _is_ready(entry: _Arrival | Report) -> bool:
    """Return whether an entry can be processed without waiting for the device."""
    return not isinstance(entry, _Arrival) or entry.is_on_host


def _start_copy(step: int, loss: Tensor, samples: int) -> _Arrival:
    """Start the copy of a loss to the host, after what its device has been given so far."""
    loss = loss.detach()
    if loss.device.type != "cuda":
        return _Arrival(step, loss, samples, None)
    host = torch.empty(loss.shape, dtype=loss.dtype, pin_memory=True)
    host.copy_(loss, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(loss.device))
    return _Arrival(step, host, samples, copied)


class Throughput:
    """A stage's steady throughput: the time between training steps with nothing in between.

    The first 5 messages are left out.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.samples = 0
        self.wall_s = 0.0
        self.compute_s = 0.0
        self._step_count = 0
        self._last_end: float | None = None

    def step(self, end: float, compute_s: float, samples: int) -> None:
        """Add a training step that ended at `end`, in seconds of the monotonic clock.

        compute_s: its seconds of computing. samples: those of all replicas. The first 5, and the
        first one after `interrupt`, only set the start of the next.
        """
        self._step_count += 1
        if self._last_end is not None and self._step_count > FIRST_STEPS:
            self.steps += 1
            self.samples += samples
            self.wall_s += end - self._last_end
            self.compute_s += compute_s
        self._last_end = end

    def interrupt(self) -> None:
        """Leave out the time up to the next step: an evaluation or a checkpoint is in between."""
        self._last_end = None

    def state(self) -> dict[str, Any]:
        """Return the sums, for a process that goes on in place of this one."""
        return {
            "steps": self.steps,
            "samples": self.samples,
            "wall_s": self.wall_s,
            "compute_s": self.compute_s,
            "step_count": self._step_count,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state`, interrupted. Raises KeyError if a key is missing."""
        self.steps, self.samples = state["steps"], state["samples"]
        self.wall_s, self.compute_s = state["wall_s"], state["compute_s"]
        self._step_count = state["step_count"]
        self.interrupt()

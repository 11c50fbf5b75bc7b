"""Running sums of a stage: losses, throughput, evaluation sums and the means of a record."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from localpipe.errors import RunError
from localpipe.pipeline.workers.phase import PhaseTimer
from localpipe.tasks.classification import fraction


class EvaluationSums:
    """Sums over one evaluation."""

    def __init__(self) -> None:
        self.loss: Tensor | float = 0.0
        self.correct: Tensor | int = 0
        self.probed: Tensor | int | None = None
        self.samples = self.judged = 0

    def add(self, verdict: tuple[Tensor, Tensor] | None, found: Tensor | None, count: int) -> None:
        self.samples += count
        if found is not None:
            self.probed = (self.probed or 0) + found
        if verdict is not None:
            loss, correct = verdict
            self.loss = self.loss + loss.double() * count
            self.correct = self.correct + correct
            self.judged += count

    def result(self) -> dict[str, object]:
        known, loss = bool(self.judged), float(self.loss)
        probed = (
            {} if self.probed is None else {"probe_accuracy": fraction(self.probed, self.samples)}
        )
        return {
            "loss": loss / self.judged if known and math.isfinite(loss) else None,
            "accuracy": fraction(self.correct, self.judged) if known else None,
            "samples": self.samples,
            **probed,
        }


class RecordWindow:
    """Means between two training records."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.samples = 0
        self.compute_s = self.receive_s = self.send_s = 0.0

    def add(self, pulse: PhaseTimer, compute_s: float, samples: int) -> None:
        self.samples += samples
        self.compute_s += compute_s
        self.receive_s += pulse.spans.get("receive", 0.0) + pulse.spans.get("data", 0.0)
        self.send_s += pulse.spans.get("send", 0.0)

    def result(self) -> dict[str, float]:
        wall = max(time.monotonic() - self.began, 1e-9)
        return {
            "samples_per_s": round(self.samples / wall, 2),
            "busy": round(self.compute_s / wall, 4),
            "receive_wait": round(self.receive_s / wall, 4),
            "send_wait": round(self.send_s / wall, 4),
        }


FIRST_STEPS = 5  # left out of every rate: kernels, caches and queues are still filling


@dataclass(frozen=True)
class _Arrival:
    """A loss on its way to the host; `copied` has passed when the host has it, None where it never left."""

    step: int
    loss: Tensor
    samples: int
    copied: torch.cuda.Event | None

    @property
    def has_come(self) -> bool:
        return self.copied is None or self.copied.query()


class Meter:
    """A stage's mean training loss: part of its checkpoint, so that a resumed run reports what an undisturbed one does.

    A loss is looked at when it has come from the device, at least one step later; the device is never waited for but at
    an evaluation, a checkpoint and the end. What is to be told of the losses so far is told when they have come.
    """

    def __init__(self) -> None:
        self.loss_sum = 0.0
        self.samples = 0
        self.busy_s = 0.0
        self._whole_epoch: float | None = None
        self._pending: deque[_Arrival | Callable[[float], None]] = deque()
        self._window: list[tuple[float, int]] = []

    def add(self, step: int, loss: Tensor, samples: int) -> None:
        """Count a training loss; raise RunError when one that has come meanwhile is not finite."""
        while self._pending and (
            not isinstance(first := self._pending[0], _Arrival) or first.has_come
        ):
            self._look()
        self._pending.append(_sent(step, loss, samples))

    def tell(self, told: Callable[[float], None]) -> None:
        """Have `told` called with the mean loss since the last such call, as soon as all losses added so far have come."""
        self._pending.append(told)
        if all(not isinstance(each, _Arrival) or each.copied is None for each in self._pending):
            self.settle()

    def settle(self) -> None:
        """Look at every loss, waiting for the device; raise RunError when one is not finite."""
        while self._pending:
            first = self._pending[0]
            if isinstance(first, _Arrival) and first.copied is not None:
                first.copied.synchronize()
            self._look()

    def _look(self) -> None:
        first = self._pending.popleft()
        if not isinstance(first, _Arrival):
            samples = sum(count for _, count in self._window)
            first(sum(value * count for value, count in self._window) / samples)
            self._window = []
            return
        value = float(first.loss)
        if not math.isfinite(value):
            raise RunError(
                f"the local loss of step {first.step} is {value}; lower optim.lr, or look at the data"
            )
        self.loss_sum += value * first.samples
        self.samples += first.samples
        self._window.append((value, first.samples))

    def mean_loss(self) -> float | None:
        """Return the mean local loss of the last whole epoch, or of the steps so far; None before the first step."""
        self.settle()
        return self.loss_sum / self.samples if self.samples else self._whole_epoch

    def restart(self) -> None:
        """Begin a new epoch."""
        self._whole_epoch = self.mean_loss()
        self.loss_sum, self.samples = 0.0, 0

    def state(self) -> dict[str, float | None]:
        """Return the sums, for a checkpoint."""
        self.settle()
        return {
            "loss_sum": self.loss_sum,
            "samples": self.samples,
            "busy_s": self.busy_s,
            "whole_epoch": self._whole_epoch,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        self.loss_sum, self.samples, self.busy_s = (
            state["loss_sum"],
            state["samples"],
            state["busy_s"],
        )
        self._whole_epoch = state["whole_epoch"]


def _sent(step: int, loss: Tensor, samples: int) -> _Arrival:
    """Start a loss towards the host, behind what its device has been given so far."""
    loss = loss.detach()
    if loss.device.type != "cuda":
        return _Arrival(step, loss, samples, None)
    host = torch.empty(loss.shape, dtype=loss.dtype, pin_memory=True)
    host.copy_(loss, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(loss.device))
    return _Arrival(step, host, samples, copied)


class Throughput:
    """A stage's steady speed: time between training steps that nothing but training stood between."""

    def __init__(self) -> None:
        self.steps = self.samples = 0
        self.wall_s = self.compute_s = 0.0
        self._seen = 0
        self._last_end: float | None = None

    def step(self, end: float, compute_s: float, samples: int) -> None:
        """Count a training step that ended at `end`."""
        self._seen += 1
        if self._last_end is not None and self._seen > FIRST_STEPS:
            self.steps += 1
            self.samples += samples
            self.wall_s += end - self._last_end
            self.compute_s += compute_s
        self._last_end = end

    def interrupt(self) -> None:
        """Leave the time up to the next step out: an evaluation or a checkpoint stands between."""
        self._last_end = None

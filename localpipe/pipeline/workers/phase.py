"""What a worker is doing right now, and how long each part took: for the watcher, the metrics and the bound."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

WAITING = ("receive", "send", "reduce")
MARKED = ("start", "compile", "data", "save", "end")
COMPUTE = ("forward", "loss", "update")


class SpanKeeper(Protocol):
    """Keeps the spans of a traced run."""

    def add(self, stage: int, phase: str, step: int, begin: float, end: float) -> None:
        """Keep one span."""


@dataclass
class PhaseTimer:
    """The phase of the main thread. Written by it alone; the watcher thread only reads."""

    replica: int = 0
    stage: int = 0
    step: int = 0
    phase: str = "start"
    since: float = field(default_factory=time.monotonic)
    armed: bool = False  # after the first step: before it, kernels are built and neighbours are still starting
    spans: dict[str, float] = field(default_factory=dict)
    trace: SpanKeeper | None = None
    queued: Callable[[], bool] = lambda: (
        False
    )  # whether a collective of replicas is still in a device's queue

    def enter(self, phase: str) -> None:
        """Begin a phase and end the one before."""
        now = time.monotonic()
        self.spans[self.phase] = self.spans.get(self.phase, 0.0) + now - self.since
        if self.trace is not None:
            self.trace.add(self.stage, self.phase, self.step, self.since, now)
        self.phase, self.since = phase, now

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for the other replicas of the stage."""
        before = self.phase
        self.enter("reduce")
        yield
        self.enter(before)

    def turn(self, stage: int, waits_in: str = "receive") -> None:
        """Begin the next message of a stage with empty spans; the first stage waits for `data`."""
        self.enter(waits_in)
        self.stage = stage
        self.spans = {}

    @property
    def waits(self) -> bool:
        """Whether it waits for others. The host goes on behind a collective in a device's queue, and stops anywhere later."""
        return self.phase in WAITING or (self.phase in COMPUTE and self.queued())

    @property
    def compute_s(self) -> float:
        """Seconds of this turn in forward, local loss, backward and update."""
        return sum(self.spans.get(phase, 0.0) for phase in COMPUTE)

    def where(self) -> str:
        """Name the stage, replica and step, as errors do."""
        return f"stage {self.stage}, replica {self.replica}, step {self.step}"

"""The current phase of a worker and the time of every phase: for watchdog, records and bound."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

WAITING_PHASES = ("receive", "send", "reduce", "feedback")
EXEMPT_PHASES = ("start", "compile", "data", "save", "end")  # the watchdog sets no limit for them
CONNECT = "connect"  # both ends of a connection are there; the watchdog has a limit of its own
COMPUTE_PHASES = ("forward", "loss", "update")


class SpanKeeper(Protocol):
    """Stores the spans of a traced run."""

    def add(self, stage: int, phase: str, step: int, begin: float, end: float) -> None:
        """Store one span; `begin` and `end` are seconds of the monotonic clock.

        It is called in the main thread at the end of every phase.
        """


def _has_no_collective() -> bool:
    return False


@dataclass
class PhaseTimer:
    """The phase of the main thread. Only the main thread writes it; the watchdog's thread reads it.

    `step` is set by the worker. `since` is the start of the phase on the monotonic clock. `armed`
    is set after the first step. Before it, kernels are built and neighbours still start. `spans`
    are the seconds of each phase of the current message. `trace` gets every phase that ends, None
    for no trace. `has_pending_collective` returns whether a collective of replicas is still in a
    device's queue. `neighbour` is whom phase `connect` connects to.
    """

    replica: int = 0
    stage: int = 0
    step: int = 0
    phase: str = "start"
    since: float = field(default_factory=time.monotonic)
    armed: bool = False
    spans: dict[str, float] = field(default_factory=dict)
    trace: SpanKeeper | None = None
    has_pending_collective: Callable[[], bool] = _has_no_collective
    neighbour: str = ""

    def enter(self, phase: str) -> None:
        """Begin a phase and end the previous one. Its seconds are added to `spans` and the trace.

        Any text is a phase. The same phase again adds to the same span.
        """
        now = time.monotonic()
        self.spans[self.phase] = self.spans.get(self.phase, 0.0) + now - self.since
        if self.trace is not None:
            self.trace.add(self.stage, self.phase, self.step, self.since, now)
        self.phase = phase
        self.since = now

    @contextmanager
    def mark_reduce(self) -> Iterator[None]:
        """Count the time inside as waiting for the other replicas of the stage, in phase `reduce`.

        The previous phase goes on after it, but not if the body raises.
        """
        previous = self.phase
        self.enter("reduce")
        yield
        self.enter(previous)

    @contextmanager
    def mark_connect(self, neighbour: str) -> Iterator[None]:
        """Count the time inside as phase `connect`, in which both ends are there and connect.

        neighbour: the other end's name, for errors. The previous phase goes on after it, but not if
        the body raises.
        """
        previous = self.phase
        self.neighbour = neighbour
        self.enter(CONNECT)
        yield
        self.enter(previous)

    def begin_turn(self, stage: int, first_phase: str = "receive") -> None:
        """Begin the next message of a stage in `first_phase`, with empty spans.

        `spans` is a new mapping. The phase that ends goes to the trace under the previous stage.
        """
        self.enter(first_phase)
        self.stage = stage
        self.spans = {}

    @property
    def is_waiting(self) -> bool:
        """Whether the worker waits for another one.

        The host does not wait for a collective in a device's queue: it stops in a later phase.
        """
        if self.phase in WAITING_PHASES:
            return True
        return self.phase in COMPUTE_PHASES and self.has_pending_collective()

    @property
    def compute_s(self) -> float:
        """Seconds of this message in forward, local loss, backward and update. 0.0 without any.

        The phase that has not ended is not counted.
        """
        return sum(self.spans.get(phase, 0.0) for phase in COMPUTE_PHASES)

    @property
    def position(self) -> str:
        """Stage, replica and step, as error messages name them: `stage 1, replica 0, step 12`."""
        return f"stage {self.stage}, replica {self.replica}, step {self.step}"

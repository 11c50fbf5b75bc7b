"""The seconds of a system's steps, divided into computing, receiving and sending."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from localpipe.pipeline.workers.phase import SpanKeeper

CPU = torch.device("cpu")


class StepTimer:
    """Seconds of the steps since the last `read`: busy, receive and send.

    A kind is None where a system cannot tell it. All three are None for a device that is not the
    CPU. Where a system cannot tell receiving from sending, `receive` holds both.
    """

    def __init__(self, device: torch.device = CPU) -> None:
        zero = None
        if device.type == "cpu":
            zero = 0.0
        self.busy, self.receive, self.send = zero, zero, zero
        self._cpu_start = time.process_time()
        self._trace: SpanKeeper | None = None
        self._step = 0

    def read(self) -> dict[str, float | None]:
        """Return the seconds since the last call and start again.

        Keys: `busy`, `receive`, `send`, each None if it is not counted, and `cpu`, the sum over the
        process's threads.
        """
        now = time.process_time()
        seconds = {
            "busy": self.busy,
            "receive": self.receive,
            "send": self.send,
            "cpu": now - self._cpu_start,
        }
        self._cpu_start = now
        self.busy = _reset(self.busy)
        self.receive = _reset(self.receive)
        self.send = _reset(self.send)
        return seconds

    def add(self, busy: float = 0.0, receive: float = 0.0, send: float = 0.0) -> None:
        """Add seconds to the kinds that are counted. Those of other kinds are ignored."""
        if self.busy is not None:
            self.busy += busy
        if self.receive is not None:
            self.receive += receive
        if self.send is not None:
            self.send += send

    def count_nothing(self) -> None:
        """Stop counting all three kinds, for good, for a system that cannot tell them."""
        self.busy = self.receive = self.send = None

    def set_trace(self, trace: SpanKeeper | None) -> None:
        """Store the spans of the following steps in `trace`, or none of them for None.

        The steps of a trace count from 0, and `begin_step` adds 1.
        """
        self._trace = trace
        self._step = 0

    def begin_step(self) -> None:
        """Begin the next step of a trace: following spans have its number."""
        self._step += 1

    def wrap(
        self, call: Callable[..., Any], stage: int = 0, phase: str = "update"
    ) -> Callable[..., Any]:
        """Return the call with its time counted as busy, and stored as a span of a traced step.

        It takes the same arguments and returns the same result. stage, phase: of the span. A call
        that raises is neither counted nor stored.
        """

        def timed_call(*args: Any, **kwargs: Any) -> Any:
            start = time.monotonic()
            result = call(*args, **kwargs)
            end = time.monotonic()
            if self.busy is not None:
                self.busy += end - start
            if self._trace is not None:
                self._trace.add(stage, phase, self._step, start, end)
            return result

        return timed_call


def _reset(seconds: float | None) -> float | None:
    if seconds is None:
        return None
    return 0.0

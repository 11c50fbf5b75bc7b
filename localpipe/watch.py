"""Liveness, watched from a thread of its own: signals, heartbeats, a worker that hangs, a launcher that died.

A Python signal handler does not run while the main thread waits in gloo, so signals arrive here through a pipe.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from localpipe.mesh import Mesh
from localpipe.pulse import MARKED, WAITING, Pulse

ABORT = "abort"
GRACE_S = 15.0  # from the first signal to the last moment a worker may take to save and stop
_TICK_S = 0.5
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Let the kernel kill this process when its launcher dies; torchrun leaves workers running when it is killed."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    launcher = int(os.environ.get("LOCALPIPE_PARENT", parent))
    if os.getppid() != launcher:  # it died before the kernel knew
        os._exit(1)


@dataclass
class _Neighbour:
    beat: int = -1
    seen: float = field(default_factory=time.monotonic)
    told: dict[str, Any] = field(default_factory=dict)


class Watch(threading.Thread):
    """Beats for this worker, looks after the next one, and ends the process when the run cannot go on.

    `verdict(line)` is called with the cause, just before the process ends with status 1.
    """

    def __init__(self, mesh: Mesh, pulse: Pulse, timeout_s: float, verdict: Callable[[str], None]) -> None:
        super().__init__(name="watch", daemon=True)
        self.stop_requested = threading.Event()
        self._mesh, self._pulse, self._timeout_s, self._verdict = mesh, pulse, timeout_s, verdict
        self._store: dist.Store = mesh.store.clone()  # the main thread may be waiting in its own
        self._next = (mesh.rank + 1) % mesh.world
        self._neighbour = _Neighbour()
        self._beats = 0
        self._deadline: float | None = None
        self._ended = threading.Event()
        self._wake, self._woken = os.pipe()

    def start(self) -> None:
        """Take over SIGTERM and SIGINT (from the main thread) and begin to watch."""
        os.set_blocking(self._woken, False)
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        super().start()

    def end(self) -> None:
        """Stop watching: this worker is done, and its silence is no death."""
        self._ended.set()

    def run(self) -> None:
        while not self._ended.is_set():
            readable, _, _ = select.select([self._wake], [], [], _TICK_S)
            if readable:
                self._on_signal(os.read(self._wake, 64)[-1])
            try:
                self._tick()
            except RuntimeError as error:
                if not self._ended.is_set():
                    self._die(f"{self._pulse.where()}: lost the store: {str(error).splitlines()[0]}")

    def _on_signal(self, number: int) -> None:
        if self.stop_requested.is_set() and number == signal.SIGINT:
            os._exit(128 + number)
        self.stop_requested.set()
        self._deadline = self._deadline or time.monotonic() + GRACE_S

    def _tick(self) -> None:
        if self._deadline is not None and time.monotonic() > self._deadline:
            os._exit(128 + signal.SIGTERM)
        self._beats += 1
        pulse = self._pulse
        beat = {
            "beat": self._beats,
            "phase": pulse.phase,
            "age": pulse.age_s(),
            "armed": pulse.armed,
            "where": pulse.where(),
        }
        self._store.set(f"beat/{self._mesh.rank}", json.dumps(beat))
        if self._store.check([ABORT]):
            os._exit(1)
        self._check_self()
        if self._mesh.world > 1:
            self._check_next()

    def _check_self(self) -> None:
        pulse = self._pulse
        if not pulse.armed or pulse.age_s() < self._timeout_s or pulse.phase in MARKED:
            return
        if pulse.phase not in WAITING:
            self._die(
                f"{pulse.where()}: no progress in {pulse.phase} for {self._timeout_s:g} s; "
                "the worker hangs, or run.timeout_s is too short"
            )
        elif self._all_wait():
            self._die(
                f"{pulse.where()}: no message for {self._timeout_s:g} s while every worker waits; "
                "look for an earlier error"
            )

    def _check_next(self) -> None:
        told = self._beat_of(self._next)
        neighbour, now = self._neighbour, time.monotonic()
        if told.get("beat") != neighbour.beat:
            neighbour.beat, neighbour.seen, neighbour.told = told.get("beat", -1), now, told
        elif (
            neighbour.told.get("armed") and neighbour.told["phase"] != "end" and now - neighbour.seen > self._timeout_s
        ):
            self._die(
                f"{neighbour.told['where']}: no sign of life from rank {self._next} for {self._timeout_s:g} s; "
                "its process is stopped, or its machine is gone"
            )

    def _all_wait(self) -> bool:
        beats = [self._beat_of(rank) for rank in range(self._mesh.world)]
        return all(b.get("phase") in WAITING and b.get("age", 0.0) >= self._timeout_s - 2 * _TICK_S for b in beats)

    def _beat_of(self, rank: int) -> dict[str, Any]:
        key = f"beat/{rank}"
        told: dict[str, Any] = json.loads(self._store.get(key)) if self._store.check([key]) else {}
        return told

    def _die(self, line: str) -> None:
        self._verdict(line)
        try:
            self._store.set(ABORT, line)
        finally:
            os._exit(1)

"""Liveness, watched from a thread of its own: signals, heartbeats, a worker that hangs or has stopped.

A Python signal handler does not run while the main thread waits in gloo, so signals arrive here through a pipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

from localpipe.pipeline.launch.notes import HeartbeatMonitor, NoteStore, UnchangedTimer, open_notes
from localpipe.pipeline.workers.mesh import Mesh
from localpipe.pipeline.workers.phase import MARKED, PhaseTimer

ABORT, STOP = "abort", "stop"
START_S = 300.0  # from a worker's birth to its first heartbeat: imports, however slow the disk
GRACE_S = 15.0  # from the first signal to the last moment a worker may take to save and stop
_TICK_S = 0.5


class Watchdog(threading.Thread):
    """Beats for this worker, listens to the next one, and ends the process when the run cannot go on.

    `verdict(line)` is called with the cause, just before the process ends with status 1.
    """

    def __init__(
        self, mesh: Mesh, pulse: PhaseTimer, timeout_s: float, verdict: Callable[[str], None]
    ) -> None:
        super().__init__(name="watch", daemon=True)
        self.stop_requested = threading.Event()
        self._mesh, self._pulse, self._timeout_s, self._verdict = mesh, pulse, timeout_s, verdict
        self._board: NoteStore = open_notes(mesh)
        self._next = (mesh.rank + 1) % mesh.world
        self._silence = HeartbeatMonitor(self._board, heartbeat_key(self._next), timeout_s)
        self._patience, self._age_s = UnchangedTimer(), 0.0  # with its own main thread
        self._beats = 0
        self._born = time.monotonic()
        self._deadline = float("inf")
        self._ended = threading.Event()
        self._wake, self._woken = os.pipe()

    def start(self) -> None:
        """Take over SIGTERM and SIGINT (from the main thread) and begin to watch."""
        os.set_blocking(self._woken, False)
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        with contextlib.suppress(RuntimeError, OSError):  # the thread tells what it means
            self._beat()  # at once: of a worker that never beat nobody would know that it is gone
        super().start()

    def end(self) -> None:
        """Stop watching: this worker is done, and its silence is no death."""
        self._ended.set()
        self.join(5)

    def run(self) -> None:
        while not self._ended.is_set():
            readable, _, _ = select.select([self._wake], [], [], _TICK_S)
            if readable:
                self._on_signal(os.read(self._wake, 64)[-1])
            try:
                self._tick()
            except (RuntimeError, OSError) as error:
                if not self._ended.is_set():
                    self._die(
                        f"{self._pulse.where()}: lost the launcher: {str(error).splitlines()[0]}"
                    )

    def _on_signal(self, number: int) -> None:
        if self.stop_requested.is_set() and number == signal.SIGINT:
            os._exit(128 + number)
        self._ask_to_stop()
        with contextlib.suppress(RuntimeError, OSError):  # no launcher left: the next tick tells
            self._board.put(STOP, self._pulse.where())

    def _ask_to_stop(self) -> None:
        self.stop_requested.set()
        self._deadline = min(self._deadline, time.monotonic() + GRACE_S)

    def _tick(self) -> None:
        if time.monotonic() > self._deadline:
            os._exit(128 + signal.SIGTERM)
        self._beat()
        if self._board.get(ABORT) is not None:
            os._exit(1)
        if not self.stop_requested.is_set() and self._board.get(STOP) is not None:
            self._ask_to_stop()  # one node was asked: the first stage, on another perhaps, ends the run
        self._check_self()
        if self._mesh.world > 1 and (note := self._silence.last()) is not None:
            line = declare_dead(self._next, note, self._timeout_s)
            if line is not None:
                self._die(line)
        elif self._mesh.world > 1 and time.monotonic() - self._born > START_S:
            if self._board.get(heartbeat_key(self._next)) is None:
                self._die(
                    f"rank {self._next} has not started within {START_S:g} s; look at what its node printed"
                )
            self._born = float("inf")

    def _beat(self) -> None:
        self._beats += 1
        pulse = self._pulse
        self._age_s = self._patience.same_s(pulse.since)
        beat = {
            "beat": self._beats, "phase": pulse.phase, "waits": pulse.waits, "age": self._age_s, "where": pulse.where(),
            "pid": os.getpid(), "host": socket.gethostname(),
        }  # fmt: skip
        self._board.put(heartbeat_key(self._mesh.rank), json.dumps(beat))

    def _check_self(self) -> None:
        pulse = self._pulse
        if not pulse.armed or self._age_s < self._timeout_s or pulse.phase in MARKED:
            return
        if not pulse.waits:
            self._die(
                f"{pulse.where()}: no progress in {pulse.phase} for {self._timeout_s:g} s; "
                "the worker hangs, or run.timeout_s is too short"
            )
        elif self._all_wait():
            self._die(
                f"{pulse.where()}: no message for {self._timeout_s:g} s while every worker waits; look for an earlier error"
            )

    def _all_wait(self) -> bool:
        notes = [self._board.get(heartbeat_key(rank)) for rank in range(self._mesh.world)]
        beats: list[dict[str, Any]] = [json.loads(note) if note else {} for note in notes]
        return all(b.get("waits") and b["age"] >= self._timeout_s - 2 * _TICK_S for b in beats)

    def _die(self, line: str) -> None:
        try:
            self._verdict(line)
            self._board.put(ABORT, line)
        finally:  # whatever cannot be said any more, the process ends
            os._exit(1)


def heartbeat_key(rank: int) -> str:
    """Return the key of a rank's heartbeat."""
    return f"beat_{rank}"


def declare_dead(rank: int, note: str, timeout_s: float) -> str | None:
    """Return the verdict over a worker whose heartbeat has stopped, None where it had ended; a local one is killed.

    The heart beats in a thread of its own, so its silence means that the process is stopped or the machine is gone,
    whatever it was doing. A stopped process would leave its launcher waiting.
    """
    told = json.loads(note)
    if told["phase"] == "end":
        return None
    if told["host"] == socket.gethostname():
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(told["pid"])
            if any(
                "localpipe" in word for word in process.cmdline()
            ):  # not a stranger with a dead worker's number
                process.kill()
    return (
        f"{told['where']}: no sign of life from rank {rank} for {timeout_s:g} s; "
        "its process was stopped, or its machine is gone"
    )

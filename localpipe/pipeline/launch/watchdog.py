"""The watchdog of a worker, in a thread of its own: signals, heartbeats, processes that hang.

A Python signal handler does not run while the main thread waits in gloo, so signals reach this
thread through a pipe.
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

from localpipe.environment import is_ignored
from localpipe.errors import first_line
from localpipe.pipeline.launch.notes import HeartbeatMonitor, NoteStore, UnchangedTimer, open_notes
from localpipe.pipeline.workers.mesh import Mesh
from localpipe.pipeline.workers.phase import CONNECT, EXEMPT_PHASES, PhaseTimer

ABORT, STOP = "abort", "stop"
START_S = 300.0  # from a worker's start to its first heartbeat: imports, however slow the disk
CONNECT_S = 300.0  # for two ends that are both there to connect, as long as for a start
GRACE_S = 15.0  # from the first signal to the last moment a worker may take to save and stop
HUNG = 75  # the exit status of a worker that hangs and is to be replaced
_SLACK_S = 2.0  # by which a worker that is blocked by a suspended one waits for the launcher
_TICK_S = 0.5
_WAKE = b"\0"  # no signal has this number


class Watchdog(threading.Thread):
    """Writes this worker's heartbeat, monitors the next rank's, and handles signals.

    `stop_requested` is set by a signal or by another worker's request. The process then has 15 s to
    end. It ends the process when the run cannot go on. `report(cause)` is called in this thread,
    with the cause, just before the process ends with status 1. timeout_s: seconds without progress
    or heartbeat. recovers: whether the launcher replaces workers. It alone judges then: a worker
    monitors no other one and aborts nothing, and one that hangs ends with status HUNG.
    """

    def __init__(
        self,
        mesh: Mesh,
        timer: PhaseTimer,
        timeout_s: float,
        report: Callable[[str], None],
        recovers: bool = False,
    ) -> None:
        super().__init__(name="watch", daemon=True)
        self.stop_requested = threading.Event()
        self._mesh = mesh
        self._timer = timer
        self._timeout_s = timeout_s
        self._report = report
        self._recovers = recovers
        self._hang_s = timeout_s + _SLACK_S if recovers else timeout_s
        self._notes: NoteStore = open_notes(mesh)
        # Each rank monitors the next one, the last rank monitors rank 0.
        self._next_rank = (mesh.rank + 1) % mesh.world
        self._next_monitor = HeartbeatMonitor(
            self._notes, heartbeat_key(self._next_rank), timeout_s
        )
        self._waits_for_start = mesh.world > 1
        # How long this worker's main thread has been in its phase.
        self._phase_age = UnchangedTimer()
        self._phase_age_s = 0.0
        self._beats = 0
        self._start_time = time.monotonic()
        self._deadline = float("inf")
        self._finished = threading.Event()
        self._signal_reader, self._signal_writer = os.pipe()

    def start(self) -> None:
        """Take over SIGTERM and SIGINT (from the main thread) and begin to watch.

        A signal that was ignored stays ignored.
        Writes the first heartbeat. The handlers stay after `end`. Raises ValueError outside of the
        main thread, and RuntimeError at a second call.
        """
        os.set_blocking(self._signal_writer, False)
        signal.set_wakeup_fd(self._signal_writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            # Workers under nohup, or of a background job, inherit what is ignored.
            if not is_ignored(number):
                signal.signal(number, lambda *_: None)
        # The first heartbeat comes at once: nobody would miss a worker that never wrote one. If
        # it fails, the thread reports it.
        with contextlib.suppress(RuntimeError, OSError):
            self._write_heartbeat()
        super().start()

    def end(self) -> None:
        """Stop watching. This worker is done, and its last heartbeat says so.

        Waits up to 5 s for the thread. Call it after `start`, with the timer in phase `end`.
        """
        self._finished.set()
        # Whoever waits for this process waits for the thread too, so it is woken at once.
        os.write(self._signal_writer, _WAKE)
        self.join(5)

    def run(self) -> None:
        """Watch twice a second until `end`, in the thread. `start` calls it."""
        while not self._finished.is_set():
            readable, _, _ = select.select([self._signal_reader], [], [], _TICK_S)
            if readable:
                self._handle_signal(os.read(self._signal_reader, 64)[-1])
            try:
                self._tick()
            except (RuntimeError, OSError) as error:
                if not self._finished.is_set():
                    self._die(f"{self._timer.position}: lost the launcher: {first_line(error)}")

    def _handle_signal(self, number: int) -> None:
        if number == _WAKE[0]:
            return
        if self.stop_requested.is_set() and number == signal.SIGINT:
            os._exit(128 + number)
        self._request_stop()
        with contextlib.suppress(RuntimeError, OSError):  # no launcher: the next tick reports it
            self._notes.put(STOP, self._timer.position)

    def _request_stop(self) -> None:
        """Let the main thread save and stop, for at most `GRACE_S` seconds."""
        self.stop_requested.set()
        self._deadline = min(self._deadline, time.monotonic() + GRACE_S)

    def _tick(self) -> None:
        if time.monotonic() > self._deadline:
            os._exit(128 + signal.SIGTERM)
        self._write_heartbeat()

        # Requests of other workers. One node may get the signal while the first stage, which ends
        # the run, is on another.
        if self._notes.get(ABORT) is not None:
            os._exit(1)
        if not self.stop_requested.is_set() and self._notes.get(STOP) is not None:
            self._request_stop()

        self._check_main_thread()
        if self._mesh.world > 1 and not self._recovers:
            self._check_next_rank()

    def _write_heartbeat(self) -> None:
        self._beats += 1
        timer = self._timer
        self._phase_age_s = self._phase_age.update(timer.since)
        heartbeat = {
            "beat": self._beats,
            "phase": timer.phase,
            "waits": timer.is_waiting,
            "age": self._phase_age_s,
            "where": timer.position,
            "step": timer.step,
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        self._notes.put(heartbeat_key(self._mesh.rank), json.dumps(heartbeat))

    def _check_main_thread(self) -> None:
        """End the process if its main thread hangs, or if every worker waits for the others."""
        timer = self._timer
        if timer.phase == CONNECT:
            self._check_connecting()
            return
        if not timer.armed or self._phase_age_s < self._hang_s or timer.phase in EXEMPT_PHASES:
            return
        if self._recovers:
            self._end_hanging()
        elif not timer.is_waiting:
            self._die(
                f"{timer.position}: no progress in {timer.phase} for {self._timeout_s:g} s; "
                "the worker hangs, or run.timeout_s is too short"
            )
        elif self._all_wait():
            self._die(
                f"{timer.position}: no message for {self._timeout_s:g} s while every worker waits; "
                "look for an earlier error"
            )

    def _end_hanging(self) -> None:
        """End this process for its launcher to replace, unless it waits for another one."""
        timer = self._timer
        if timer.is_waiting:
            return
        self._report(
            f"{timer.position}: no progress in {timer.phase} for {self._timeout_s:g} s; "
            "the worker hangs, or run.timeout_s is too short"
        )
        os._exit(HUNG)

    def _check_connecting(self) -> None:
        """End the process if a connection does not come about, although both ends are there."""
        if self._phase_age_s >= CONNECT_S:
            timer = self._timer
            self._die(
                f"{timer.position}: not connected to {timer.neighbour} within {CONNECT_S:g} s, "
                "though both ends are there; run localpipe doctor, or again with NCCL_DEBUG=WARN"
            )

    def _all_wait(self) -> bool:
        """Return whether every worker has waited for about `timeout_s`."""
        least_age_s = self._timeout_s - 2 * _TICK_S
        for rank in range(self._mesh.world):
            note = self._notes.get(heartbeat_key(rank))
            if not note:
                return False
            heartbeat = json.loads(note)
            if not heartbeat["waits"] or heartbeat["age"] < least_age_s:
                return False
        return True

    def _check_next_rank(self) -> None:
        """End the process if the next rank's heartbeat has stopped, or has never begun."""
        note = self._next_monitor.read_overdue()
        if note is not None:
            cause = declare_dead(self._next_rank, note, self._timeout_s)
            if cause is not None:
                self._die(cause)
            return
        if self._waits_for_start and time.monotonic() - self._start_time > START_S:
            self._waits_for_start = False
            if self._notes.get(heartbeat_key(self._next_rank)) is None:
                self._die(
                    f"rank {self._next_rank} has not started within {START_S:g} s; "
                    "look at what its node printed"
                )

    def _die(self, cause: str) -> None:
        """Report the cause, abort the other workers, and end the process."""
        try:
            self._report(cause)
            self._notes.put(ABORT, cause)
        finally:  # the process ends, whatever cannot be written any more
            os._exit(1)


def heartbeat_key(rank: int) -> str:
    """Return the key of a rank's heartbeat: `beat_` and the rank."""
    return f"beat_{rank}"


def declare_dead(rank: int, note: str, timeout_s: float) -> str | None:
    """Return why a worker whose heartbeat has stopped ends the run, or None if it had ended well.

    note: its last heartbeat, JSON. timeout_s: for the text. A worker of this machine is killed,
    unless its pid belongs to another program. Heartbeats come from a thread of their own, whatever
    the worker does, so without them the process is suspended or the machine is gone. A suspended
    process would leave its launcher waiting. Raises ValueError or KeyError for other notes.
    """
    heartbeat = json.loads(note)
    if heartbeat["phase"] == "end":
        return None
    if heartbeat["host"] == socket.gethostname():
        _kill_worker(heartbeat)
    return (
        f"{heartbeat['where']}: no sign of life from rank {rank} for {timeout_s:g} s; "
        "its process was stopped, or its machine is gone"
    )


def _kill_worker(heartbeat: dict[str, Any]) -> None:
    """Kill the process of a heartbeat, unless its number belongs to another program now."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(heartbeat["pid"])
        if any("localpipe" in argument for argument in process.cmdline()):
            process.kill()

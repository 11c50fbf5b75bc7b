"""Starts the ranks of one job on this machine and follows them to their end. It opens no port."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from localpipe.config.resolved import Resolved
from localpipe.environment import is_ignored
from localpipe.files import PrivateFolder
from localpipe.output import warn
from localpipe.pipeline.launch.job import Job
from localpipe.pipeline.launch.notes import FileNotes, HeartbeatMonitor
from localpipe.pipeline.launch.process import publish_job
from localpipe.pipeline.launch.rank import RankNetwork, kill_ranks, start_rank
from localpipe.pipeline.launch.watchdog import GRACE_S, START_S, STOP, declare_dead, heartbeat_key
from localpipe.pipeline.workers.mesh import assign_hosts, open_file_store

_TICK_S = 0.25
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PREFIX = "localpipe-launch-"
_CAUSE_TICKS = 12


class Workers:
    """The worker processes of one job, in a private folder with their store, notes and failures.

    config.pipeline.processes workers start at once, and each calls `main()` of `module`. Leaving
    the context kills what still runs, restores the signal handlers and removes the folder. `store`
    is the run's store. `stop_signal` is the first signal that requested a stop, else 0.

    In the main thread it handles SIGINT, SIGTERM and SIGHUP, except those that were ignored, as
    nohup and a shell's `&` make them. In another thread it handles no signal. Raises OSError
    without room for the folder, and KeyboardInterrupt for a signal while it starts. A second signal
    later raises KeyboardInterrupt.

    advise: returns what the user may do after a worker was killed, for the end of an error.
    networks: by rank, for links that a benchmark shapes. Without them the workers share memory.
    """

    def __init__(
        self,
        config: Resolved,
        job: Job,
        module: str,
        advise: Callable[[], str] = lambda: "run the same command again",
        networks: Sequence[RankNetwork] = (),
    ) -> None:
        self.config = config
        self._networks = networks
        self._advise = advise
        self.stop_signal = 0  # the first signal that requested a stop
        self._module = module
        self._private = PrivateFolder(self._folder_root(), _PREFIX)
        self._notes = FileNotes(self.folder)
        self.store: dist.Store = self._open_store()
        publish_job(self.store, job)

        # The handlers come before the first rank, so that no signal leaves a rank without launcher.
        self._old_handlers: dict[int, Any] = {}
        is_main = threading.current_thread() is threading.main_thread()
        for number in _STOP_SIGNALS:
            if is_main and not is_ignored(number):
                self._old_handlers[number] = signal.signal(number, self._request_stop)
        self._ranks: list[subprocess.Popen[bytes]] = []
        try:
            self._start_ranks(module)
        except BaseException:
            self._close()
            raise

        self._start_time = time.monotonic()
        self._monitors: list[HeartbeatMonitor] = []
        for rank in range(len(self._ranks)):
            monitor = HeartbeatMonitor(self._notes, heartbeat_key(rank), config.run.timeout_s)
            self._monitors.append(monitor)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    @property
    def folder(self) -> Path:
        """The private folder that the workers share with their launcher.

        It is gone after the context.
        """
        return self._private.path

    def follow(self, tick: Callable[[], None]) -> int:
        """Wait until every worker has ended well or one has failed; return the exit status.

        `tick` is called four times a second, before the workers are looked at. Its errors pass
        through. 0: all ended well, also after a stop. 2: the first cause is a user's mistake. 1:
        any other. 128 + signal: stopped, but a worker failed or needed over 20 s. The first cause
        is printed to standard error. Workers that still run are killed only when the context ends.
        """
        deadline = float("inf")
        while True:
            time.sleep(_TICK_S)
            tick()

            # A failure, unless the workers were stopped.
            failed = self._replace_ranks(self._failed_ranks())
            if failed and not self.stop_signal:
                return self._print_cause(failed)
            cause = self._find_dead_rank()
            if cause is not None:
                warn(f"localpipe: {cause}")
                return 1

            # The end. After a stop, workers that could not save end with a status.
            if failed or time.monotonic() > deadline:
                warn(f"localpipe: stopped before every stage had saved; {self._advise()}")
                return 128 + self.stop_signal
            if all(process.poll() == 0 for process in self._ranks):
                return 0

            # The first signal reaches every worker once.
            if self.stop_signal and deadline == float("inf"):
                deadline = time.monotonic() + GRACE_S + 5
                self._forward_stop()

    def cause(self) -> str | None:
        """Return why a worker has failed, or None if none has. A crash may have several lines.

        It waits up to 3 s while only workers that lost a neighbour have ended. A worker that hangs
        has not failed.
        """
        failed = self._failed_ranks()
        if not failed:
            return None
        return self._find_cause(self._wait_for_cause(failed)).line

    # -- what a launcher that replaces workers does otherwise ----------------------------------

    def _folder_root(self) -> Path:
        """Return where the private folder is made."""
        return Path(tempfile.gettempdir())

    def _open_store(self) -> dist.Store:
        """Return the store of the run, in its private folder."""
        return open_file_store(self.folder)

    def _replace_ranks(self, failed: dict[int, int]) -> dict[int, int]:
        """Return which of the failed ranks, with their exit statuses, are not replaced: all."""
        return failed

    # -- starting and stopping ------------------------------------------------------------------

    def _start_ranks(self, module: str) -> None:
        world = self.config.pipeline.processes
        for rank in range(world):
            options: dict[str, Any] = {}
            if self._networks:
                options["network"] = self._networks[rank]
            self._ranks.append(start_rank(module, rank, world, self.folder, **options))
            if self.stop_signal:
                raise KeyboardInterrupt  # nothing has begun that could be saved

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        if self.stop_signal:
            raise KeyboardInterrupt  # the second signal does not wait for a checkpoint
        self.stop_signal = number

    def _forward_stop(self) -> None:
        # A worker that ignores SIGTERM, because this process did at its start, reads the note.
        self._notes.put(STOP, "launcher")
        for process in self._ranks:
            process.send_signal(signal.SIGTERM)

    def _close(self) -> None:
        kill_ranks(self._ranks)
        for number, handler in self._old_handlers.items():
            if handler is not None:  # one that Python did not set
                signal.signal(number, handler)
        self._private.remove()

    # -- finding out what went wrong ------------------------------------------------------------

    def _failed_ranks(self) -> dict[int, int]:
        """Return the exit statuses of the ranks that have failed; negative ones are signals."""
        failed = {}
        for rank, process in enumerate(self._ranks):
            status = process.poll()
            if status:
                failed[rank] = status
        return failed

    def _find_dead_rank(self) -> str | None:
        """Return why a rank without heartbeats ends the run, or None if every rank has them.

        The workers' own watchdogs miss it if all of them are suspended.
        """
        is_late = time.monotonic() - self._start_time > START_S
        for rank, monitor in enumerate(self._monitors):
            note = monitor.read_overdue()
            if is_late and self._notes.get(heartbeat_key(rank)) is None:
                return (
                    f"{self._describe_rank(rank)}: rank {rank} has not started within "
                    f"{START_S:g} s; its process was stopped"
                )
            if note is None:
                continue
            cause = declare_dead(rank, note, self.config.run.timeout_s)
            if cause is not None:
                return cause
        return None

    def _wait_for_cause(self, failed: dict[int, int]) -> dict[int, int]:
        """Wait a moment while only victims have ended; return the ranks that have failed then.

        The worker that the victims lost may still be about to end.
        """
        for _ in range(_CAUSE_TICKS):
            failures = _read_failures(self.folder)
            has_cause = any(failure["kind"] != "peer" for failure in failures)
            # A worker without a record was killed, and that is a cause too.
            if has_cause or len(failures) < len(failed):
                break
            time.sleep(_TICK_S)
            failed = self._failed_ranks()
        return failed

    def _print_cause(self, failed: dict[int, int]) -> int:
        """Print the first cause; return the exit status of the run."""
        cause = self._find_cause(self._wait_for_cause(failed))
        warn(f"localpipe: {cause.line}")
        if cause.trace:
            warn(cause.trace)
        return cause.status

    def _find_cause(self, failed: dict[int, int]) -> _Cause:
        """Return the first cause of a failure, of which at least one worker has ended."""
        # What a worker reported of itself comes first.
        failures = _read_failures(self.folder)
        for failure in failures:
            if failure["kind"] != "peer":
                status = 2 if failure["kind"] == "user" else 1
                return _Cause(failure["line"], failure["trace"], status)

        # Then a worker that could report nothing.
        reported = {failure["rank"] for failure in failures}
        for rank, status in failed.items():
            if rank not in reported:
                return _Cause(
                    f"{self._describe_rank(rank)}: rank {rank} {_describe_status(status)}; "
                    f"{self._advise()}"
                )

        # Then a victim that lost a neighbour.
        return _Cause(failures[0]["line"])

    def _describe_rank(self, rank: int) -> str:
        """Name the stages and the step of a worker that could report nothing itself."""
        hosts = assign_hosts(self.config.replicas, self.config.pipeline.processes)
        note = self._notes.get(heartbeat_key(rank))
        if note is None:
            return f"{hosts[rank]}, before the first step"
        return f"{hosts[rank]}, about step {json.loads(note)['step']}"


@dataclass(frozen=True)
class _Cause:
    """Why a run has failed: one line, a crash's traceback, the exit status of the run."""

    line: str
    trace: str = ""
    status: int = 1


def _describe_status(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def _read_failures(folder: Path) -> list[dict[str, Any]]:
    """Return the failures that workers have reported, the earliest first."""
    failures = []
    for path in folder.glob("error_*.json"):
        with contextlib.suppress(OSError, ValueError):  # not written to its end
            failures.append(json.loads(path.read_text(encoding="utf-8")))
    return sorted(failures, key=lambda failure: float(failure["time"]))

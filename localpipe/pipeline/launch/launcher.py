"""Starts worker processes on this machine, follows them, and says how they ended. No port is opened for it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    SignalException,
    start_processes,
)

from localpipe.environment import PARENT, PRIVATE_DIR
from localpipe.files import PrivateFolder
from localpipe.pipeline.launch.job import Job
from localpipe.pipeline.launch.notes import FileNotes, HeartbeatMonitor
from localpipe.pipeline.launch.process import publish_job
from localpipe.pipeline.launch.watchdog import GRACE_S, START_S, declare_dead, heartbeat_key
from localpipe.pipeline.workers.mesh import assign_hosts, open_file_store

_TICK_S = 0.25
_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PREFIX = "localpipe-launch-"
_MOMENTS = 12


class Workers:
    """The worker processes of one job, in a private directory that holds their store and their last words.

    Leaving the context kills what still runs.
    """

    def __init__(self, decided: Job, module: str) -> None:
        self.config = decided.parsed()
        self.asked = 0  # the signal that asked for a stop
        self._folder = PrivateFolder(Path(tempfile.gettempdir()), _PREFIX)
        self._private = self._folder.path
        self._board = FileNotes(self._private)
        self.store: dist.Store = open_file_store(self._private)
        publish_job(self.store, decided)
        try:
            self._context = self._start(module)
        except SignalException:
            self._folder.remove()
            raise KeyboardInterrupt from None
        self._started = time.monotonic()
        # Behind the start, which installs handlers of its own.
        self._handlers = {number: signal.signal(number, self._note) for number in _ASKING}
        world = len(self._context.pids())
        self._silences = [
            HeartbeatMonitor(self._board, heartbeat_key(rank), self.config.run.timeout_s)
            for rank in range(world)
        ]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._context.close(signal.SIGKILL, timeout=5)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._folder.remove()

    @property
    def private(self) -> Path:
        """The folder that the workers share with their launcher."""
        return self._private

    def follow(self, tick: Callable[[], None]) -> int:
        """Wait until all workers have ended well, or one has failed; say why, and return the exit status."""
        told, deadline = False, float("inf")
        while True:
            time.sleep(_TICK_S)
            tick()
            statuses = {rank: _status(pid) for rank, pid in self._context.pids().items()}
            failed = {rank: status for rank, status in statuses.items() if status}
            if failed and not self.asked:
                return self._tell(self._with_first_cause(failed))
            if (verdict := self._silent()) is not None:
                print(f"localpipe: {verdict}", file=sys.stderr)
                return 1
            if failed or time.monotonic() > deadline:
                print(
                    "localpipe: stopped before every stage had saved; the same command goes on from the last checkpoint",
                    file=sys.stderr,
                )
                return 128 + self.asked
            if all(status == 0 for status in statuses.values()):
                return 0
            if self.asked and not told:
                told, deadline = True, time.monotonic() + GRACE_S + 5
                self._pass_on()

    def _silent(self) -> str | None:
        """Return the verdict over a worker whose heart has stopped; the workers' own watch misses it if all have."""
        for rank, silence in enumerate(self._silences):
            note = silence.last()
            if (
                self._board.get(heartbeat_key(rank)) is None
                and time.monotonic() - self._started > START_S
            ):
                return f"{self._where(rank)}: rank {rank} has not started within {START_S:g} s; its process was stopped"
            if (
                note is not None
                and (line := declare_dead(rank, note, self.config.run.timeout_s)) is not None
            ):
                return line
        return None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt  # asked twice: do not wait for a checkpoint
        self.asked = number

    def _pass_on(self) -> None:
        for pid in self._context.pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def _start(self, module: str) -> Any:
        world = self.config.pipeline.processes
        assert isinstance(world, int)
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        common = {
            PRIVATE_DIR: str(self._private),
            "WORLD_SIZE": str(world),
            PARENT: str(os.getpid()),
        }
        envs = {
            rank: {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)
        }
        args: dict[int, tuple[Any, ...]] = dict.fromkeys(
            range(world), ("-m", "localpipe.pipeline.launch.start", module)
        )
        logs = DefaultLogsSpecs(log_dir=str(self._private / "logs"))
        return start_processes("localpipe", sys.executable, args, envs, logs)

    def _with_first_cause(self, failed: dict[int, int]) -> dict[int, int]:
        """Wait a moment where only victims have ended: whoever they lost may still be on its way out."""
        for _ in range(_MOMENTS):
            records = list(_read_records(self._private))
            if any(record["kind"] != "peer" for record in records) or len(records) < len(failed):
                break
            time.sleep(_TICK_S)
            statuses = {rank: _status(pid) for rank, pid in self._context.pids().items()}
            failed = {rank: status for rank, status in statuses.items() if status}
        return failed

    def cause(self) -> str | None:
        """Return in one line why a worker has failed; None while none has."""
        statuses = {rank: _status(pid) for rank, pid in self._context.pids().items()}
        failed = {rank: status for rank, status in statuses.items() if status}
        return self._first_cause(self._with_first_cause(failed))[0] if failed else None

    def _tell(self, failed: dict[int, int]) -> int:
        """Print the first cause on top; return the exit status."""
        line, trace, status = self._first_cause(failed)
        print(f"localpipe: {line}", file=sys.stderr)
        if trace:
            print(trace, file=sys.stderr)
        return status

    def _first_cause(self, failed: dict[int, int]) -> tuple[str, str, int]:
        """Return the first cause in one line, its traceback where there is one, and the exit status."""
        records = sorted(_read_records(self._private), key=lambda record: float(record["time"]))
        causes = [record for record in records if record["kind"] != "peer"]
        if causes:
            first = causes[0]
            return first["line"], first["trace"], 2 if first["kind"] == "user" else 1
        known = {record["rank"] for record in records}
        for rank, status in failed.items():
            if rank not in known:
                end = (
                    f"was killed by {signal.Signals(-status).name}"
                    if status < 0
                    else f"ended with status {status}"
                )
                advice = "the same command goes on from the last checkpoint"
                return f"{self._where(rank)}: rank {rank} {end}; {advice}", "", 1
        return records[0]["line"], "", 1

    def _where(self, rank: int) -> str:
        """Name the stages and the step of a worker that could not speak for itself."""
        world = self.config.pipeline.processes
        assert isinstance(world, int)
        host = assign_hosts(self.config.replicas, world)[rank]
        note = self._board.get(heartbeat_key(rank))
        if note is None:
            return f"{host}, before the first step"
        step = json.loads(note)["where"].rpartition("step ")[2]
        return f"{host}, about step {step}"


def _status(pid: int) -> int | None:
    """Return how a child ended (negative: by that signal), or None while it runs; it stays to be reaped."""
    try:
        result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def _read_records(private: Path) -> Iterator[dict[str, Any]]:
    for path in private.glob("error_*.json"):
        with contextlib.suppress(OSError, ValueError):
            yield json.loads(path.read_text(encoding="utf-8"))

"""Starts the workers of a run on this machine, follows them, and says how it ended. No port is opened for it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, PContext, start_processes

from localpipe import mesh, process
from localpipe.collector import Collector
from localpipe.config import Config
from localpipe.job import Prepared, prepare
from localpipe.view import print_summary
from localpipe.watch import GRACE_S

_TICK_S = 0.25


def train(given: Config) -> int:
    """Run a job to its end; return the exit status."""
    prepared = prepare(given)
    for note in prepared.notes:
        print(note, flush=True)
    if prepared.summary is not None:
        print_summary(prepared.summary, prepared.config.run.dir)
        return 0
    with tempfile.TemporaryDirectory(prefix="localpipe-") as private, _signals() as asked:
        return _Launch(prepared, Path(private), asked).run()


class _Launch:
    """One start of the workers, in a private directory that holds their store and their last words."""

    def __init__(self, prepared: Prepared, private: Path, asked: list[int]) -> None:
        self._config, self._private, self._asked = prepared.config, private, asked
        self._store = mesh.file_store(private)
        process.publish(self._store, prepared.job)
        self._collector = Collector(prepared.config, prepared.course, prepared.job)
        self._workers = self._start()

    def run(self) -> int:
        """Follow the workers until all have ended or one has failed."""
        try:
            failed = self._follow()
        finally:
            with contextlib.redirect_stderr(None):
                self._workers.close(signal.SIGKILL, timeout=5)
        self._collector.tick()
        if failed is not None and not self._asked:
            self._collector.close()
            return self._tell(failed)
        if failed is None and self._collector.finish(self._store):
            return 0
        self._collector.close()
        status = 128 + (self._asked[0] if self._asked else signal.SIGTERM)
        print(f"localpipe: stopped; the same command goes on in {self._config.run.dir}", file=sys.stderr)
        return status

    def _start(self) -> PContext:
        world = self._config.pipeline.processes
        assert isinstance(world, int)
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        common = {mesh.PRIVATE_DIR: str(self._private), "WORLD_SIZE": str(world), "LOCALPIPE_PARENT": str(os.getpid())}
        envs = {rank: {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)}
        args: dict[int, tuple[Any, ...]] = dict.fromkeys(range(world), ("-m", "localpipe.process"))
        logs = DefaultLogsSpecs(log_dir=str(self._private / "logs"))
        return start_processes("localpipe", sys.executable, args, envs, logs)

    def _follow(self) -> dict[int, int] | None:
        """Return the exit statuses (negative: a signal) of failed workers by rank, or None when all ended well."""
        told, deadline = False, float("inf")
        while True:
            time.sleep(_TICK_S)
            self._collector.tick()
            ended = {rank: status for rank, pid in self._workers.pids().items() if (status := _status(pid)) is not None}
            failed = {rank: status for rank, status in ended.items() if status != 0}
            if failed or time.monotonic() > deadline:
                return failed
            if len(ended) == len(self._workers.pids()):
                return None
            if self._asked and not told:
                told, deadline = True, time.monotonic() + GRACE_S + 5
                for pid in self._workers.pids().values():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)

    def _tell(self, failed: dict[int, int]) -> int:
        """Print the first cause on top; return the exit status."""
        records = sorted(_read_records(self._private), key=lambda record: float(record["time"]))
        causes = [record for record in records if record["kind"] != "peer"]
        killed = {rank: -status for rank, status in failed.items() if status < 0}
        if causes:
            first = causes[0]
            print(f"localpipe: {first['line']}", file=sys.stderr)
            if first["trace"]:
                print(first["trace"], file=sys.stderr)
            return 2 if first["kind"] == "user" else 1
        if killed:
            rank, number = next(iter(killed.items()))
            print(
                f"localpipe: {self._where(rank)}: rank {rank} was killed by {signal.Signals(number).name}; "
                "the same command goes on from the last checkpoint",
                file=sys.stderr,
            )
            return 1
        line = (
            records[0]["line"]
            if records
            else f"rank {next(iter(failed))} ended with status {next(iter(failed.values()))}"
        )
        print(f"localpipe: {line}", file=sys.stderr)
        return 1

    def _where(self, rank: int) -> str:
        """Name the stages and the step of a worker that could not speak for itself."""
        stages, world = self._config.pipeline.stages, self._config.pipeline.processes
        assert stages is not None and isinstance(world, int)
        hosted = mesh.hosts(stages, world)[rank]
        names = f"stage {hosted[0]}" if len(hosted) == 1 else f"stages {hosted[0]}..{hosted[-1]}"
        key = f"beat/{rank}"
        if not self._store.check([key]):
            return f"{names}, replica 0, before the first step"
        step = json.loads(self._store.get(key))["where"].rpartition("step ")[2]
        return f"{names}, replica 0, about step {step}"


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


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying; a second one ends the run at once."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

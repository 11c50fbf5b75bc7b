"""Replaces a worker that dies alone (`run.recover: stage`). The launcher decides, and nobody else.

A worker that is killed by a signal, that is suspended, or that ends itself because it hangs, gets a
new process of the same rank. That one loads the newest snapshot of its stages, reads on from its
ring and computes again what was lost. The other workers wait meanwhile and never restart. What
raises in a worker ends the run, and so does every death after a stop was requested.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.fields import Schema
from localpipe.pipeline.channels.persistent_ring import ring_bytes
from localpipe.pipeline.channels.shared_memory import SHARED_MEMORY_DIR
from localpipe.pipeline.launch.job import Job
from localpipe.pipeline.launch.launcher import Workers
from localpipe.pipeline.launch.notes import HeartbeatMonitor
from localpipe.pipeline.launch.process import failure_file
from localpipe.pipeline.launch.rank import assign_rank, kill_ranks, start_rank, start_spare
from localpipe.pipeline.launch.snapshots import CAUGHT_UP, READY
from localpipe.pipeline.launch.watchdog import HUNG, START_S, STOP, heartbeat_key
from localpipe.pipeline.stages.stage_plan import StagePlan
from localpipe.pipeline.workers.folder_store import FACTS_FOLDER, FolderStore
from localpipe.pipeline.workers.mesh import assign_hosts
from localpipe.pipeline.workers.persistent_edges import back_slots, create_edges, list_edges


@dataclass
class Recovery:
    """One replacement of a worker: how long each part of it took, in seconds.

    stage: the worker's first one. step: that at which it died. detect_s: until the launcher knew,
    at most. ready_s: from there until the new process had its snapshot and its edges.
    replayed_steps, replay_s: what it computed again. The last three are None as long as the process
    has not come so far.
    """

    rank: int
    stage: int
    step: int
    cause: str
    detect_s: float
    start_time: float
    ready_s: float | None = None
    replayed_steps: int | None = None
    replay_s: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return what summary.json tells of it."""
        return {
            "stage": self.stage,
            "step": self.step,
            "cause": self.cause,
            "detect_s": round(self.detect_s, 3),
            "ready_s": None if self.ready_s is None else round(self.ready_s, 3),
            "replayed_steps": self.replayed_steps,
            "replay_s": None if self.replay_s is None else round(self.replay_s, 3),
        }

    def __str__(self) -> str:
        steps = "1 step" if self.replayed_steps == 1 else f"{self.replayed_steps} steps"
        return (
            f"stage {self.stage} goes on in a new process: its worker {self.cause} at step "
            f"{self.step}; noticed in {self.detect_s:.1f} s, ready in {self.ready_s or 0:.1f} s, "
            f"{steps} computed again in {self.replay_s or 0:.1f} s"
        )


class RecoveringWorkers(Workers):
    """The worker processes of one job, each of which is replaced when it dies alone.

    plans: of all stages. back_schemas: of the edges back. snapshots_bytes: of all workers'
    snapshots, for the check of shared memory. show: called with each recovery that has ended. Other
    arguments are those of Workers. Raises UserError without room in shared memory.
    """

    def __init__(
        self,
        config: Resolved,
        job: Job,
        module: str,
        advise: Callable[[], str],
        plans: Sequence[StagePlan],
        back_schemas: Mapping[tuple[int, int], Schema],
        snapshots_bytes: int,
        show: Callable[[Recovery], None],
    ) -> None:
        self._plans, self._back_schemas = plans, back_schemas
        self._snapshots_bytes, self._show = snapshots_bytes, show
        self._recoveries: list[Recovery] = []
        self._pending: dict[int, Recovery] = {}  # by rank
        self._counts: Counter[int] = Counter()
        self._spares: list[subprocess.Popen[bytes]] = []
        self._overdue_s: dict[int, float] = {}
        self._look_time = time.monotonic()  # when all workers were last seen alive
        self._advise_on_resume = advise
        super().__init__(config, job, module, advise)
        self._start_times = [time.monotonic()] * len(self._ranks)

    def list_recoveries(self) -> list[Recovery]:
        """Return every replacement so far, in order. Call it inside the context."""
        self._read_progress()
        return self._recoveries

    # -- the folder in shared memory, with everything that outlives a worker ----------------------

    def _folder_root(self) -> Path:
        return Path(SHARED_MEMORY_DIR)

    def _open_store(self) -> dist.Store:
        try:
            self._check_room()
            create_edges(self.folder, self.config, self._plans, self._back_schemas)
            facts = self.folder / FACTS_FOLDER
            facts.mkdir()
        except OSError as error:
            self._private.remove()
            raise UserError(self._describe_room(error.strerror or "")) from None
        except UserError:
            self._private.remove()
            raise
        return FolderStore(facts)

    def _needed_bytes(self) -> int:
        slots = self.config.pipeline.replay or 0
        edges = list_edges(self.config, self._plans)
        rings = sum(ring_bytes(schema, slots) for _, schema in edges)
        for schema in self._back_schemas.values():
            rings += ring_bytes(schema, back_slots(self.config))
        # A snapshot is whole before it replaces the one before it.
        return rings + 2 * self._snapshots_bytes

    def _check_room(self) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < self._needed_bytes():
            raise UserError(self._describe_room(f"{free:,} bytes are free"))

    def _describe_room(self, found: str) -> str:
        return (
            f"run: run.recover stage needs {self._needed_bytes():,} bytes in {SHARED_MEMORY_DIR}, "
            f"but {found}; make it larger (docker: --shm-size), lower pipeline.replay, or set "
            "run.recover=none"
        )

    # -- replacing --------------------------------------------------------------------------------

    def _replace_ranks(self, failed: dict[int, int]) -> dict[int, int]:
        """Replace the ranks that died alone. Return all failed ones if one of them ends the run."""
        self._read_progress()
        self._tend_spares()
        if failed:
            if self.stop_signal or self._notes.get(STOP) is not None:
                return failed
            if not all(self._is_replaceable(rank, status) for rank, status in failed.items()):
                return failed
            for rank, status in failed.items():
                self._replace(rank, status)
        self._look_time = time.monotonic()
        return {}

    def _is_replaceable(self, rank: int, status: int) -> bool:
        """Return whether a rank died in a way that its replacement need not repeat."""
        if status >= 0 and status != HUNG:
            return False
        if status != HUNG and failure_file(self.folder, rank).exists():
            return False  # it had raised
        if self._counts[rank] < self.config.run.max_recoveries:
            return True
        self._advise = lambda: (
            f"run.max_recoveries {self.config.run.max_recoveries} allows no more of its deaths; "
            f"{self._advise_on_resume()}"
        )
        return False

    def _replace(self, rank: int, status: int) -> None:
        """Start a new process of a rank whose old one has been reaped."""
        now = time.monotonic()
        note = self._notes.get(heartbeat_key(rank))
        heartbeat = {} if note is None else json.loads(note)
        cause = f"was killed by {signal.Signals(-status).name}" if status < 0 else "hung"
        detect_s = now - self._look_time
        if status == HUNG:
            detect_s = heartbeat.get("age", 0.0)
        elif rank in self._overdue_s:
            detect_s, cause = self._overdue_s.pop(rank), "was suspended"
        stages = assign_hosts(self.config.replicas, self.config.pipeline.processes)[rank].stages
        recovery = Recovery(rank, stages[0], heartbeat.get("step", 0), cause, detect_s, now)
        self._sweep(rank)
        self._counts[rank] += 1
        self._recoveries.append(recovery)
        self._pending[rank] = recovery
        self._ranks[rank] = self._start(rank)
        self._monitors[rank] = HeartbeatMonitor(
            self._notes, heartbeat_key(rank), self.config.run.timeout_s
        )
        self._start_times[rank] = now

    def _sweep(self, rank: int) -> None:
        """Remove what a dead rank has left: its children, its notes, files written in part."""
        pid = self._ranks[rank].pid
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        for key in (heartbeat_key(rank), f"{READY}_{rank}", f"{CAUGHT_UP}_{rank}"):
            self._notes.remove(key)
        failure_file(self.folder, rank).unlink(missing_ok=True)
        for folder in (self.folder, self.folder / FACTS_FOLDER):
            for part in folder.glob(f".*.{pid}"):
                part.unlink(missing_ok=True)

    def _start(self, rank: int) -> subprocess.Popen[bytes]:
        while self._spares:
            spare = self._spares.pop()
            if assign_rank(spare, rank):
                return spare
        return start_rank(self._module, rank, len(self._ranks), self.folder)

    def _tend_spares(self) -> None:
        """Keep as many spare processes as are configured, from the first step on."""
        self._spares = [spare for spare in self._spares if spare.poll() is None]
        if len(self._spares) >= self.config.run.spares or not self._is_under_way():
            return
        self._spares.append(start_spare(self._module, len(self._ranks), self.folder))

    def _is_under_way(self) -> bool:
        """Return whether every worker has made its first step, so that no start is slowed."""
        notes = [self._notes.get(heartbeat_key(rank)) for rank in range(len(self._ranks))]
        return all(note is not None and json.loads(note)["step"] > 0 for note in notes)

    def _read_progress(self) -> None:
        """Read how far the new processes have come, and show those that have caught up."""
        for rank, recovery in list(self._pending.items()):
            note = self._notes.get(f"{READY}_{rank}")
            if note is not None:
                recovery.ready_s = json.loads(note)["time"] - recovery.start_time
            note = self._notes.get(f"{CAUGHT_UP}_{rank}")
            if note is not None:
                values = json.loads(note)
                recovery.step, recovery.replayed_steps = values["step"], values["steps"]
                recovery.replay_s = values["replay_s"]
                del self._pending[rank]
                self._show(recovery)

    # -- judging ----------------------------------------------------------------------------------

    def _find_dead_rank(self) -> str | None:
        """Kill the ranks without heartbeats, to be replaced. Return why nothing goes on."""
        for rank, monitor in enumerate(self._monitors):
            note = monitor.read_overdue()
            is_late = time.monotonic() - self._start_times[rank] > START_S
            if is_late and self._notes.get(heartbeat_key(rank)) is None:
                return (
                    f"{self._describe_rank(rank)}: rank {rank} has not started within "
                    f"{START_S:g} s; its process was stopped"
                )
            if note is not None and self._ranks[rank].poll() is None:
                self._overdue_s[rank] = monitor.unchanged_s
                self._ranks[rank].kill()
        return self._find_circle()

    def _find_circle(self) -> str | None:
        """Return that all workers wait for each other, if they have for too long, else None."""
        timeout_s = self.config.run.timeout_s
        heartbeats = []
        for rank in range(len(self._ranks)):
            note = self._notes.get(heartbeat_key(rank))
            if note is None:
                return None
            heartbeats.append(json.loads(note))
        if not all(beat["waits"] and beat["age"] > timeout_s for beat in heartbeats):
            return None
        return (
            f"{heartbeats[0]['where']}: no message for {timeout_s:g} s while every worker waits; "
            "look for an earlier error"
        )

    def _close(self) -> None:
        kill_ranks(self._spares)
        super()._close()

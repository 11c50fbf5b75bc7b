"""Snapshots of a worker's stages in shared memory, from which another process goes on alone.

A snapshot is one file for all stages of a worker, replaced whole. It is made between two messages,
when nothing is on its way between the stages of the process, and never within a step. After it,
the sender of the worker may use the slots of the messages that it covers.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from localpipe.config.resolved import Resolved
from localpipe.errors import RunError
from localpipe.files import write_whole
from localpipe.pipeline.launch.notes import open_notes
from localpipe.pipeline.workers.feedback import FEEDBACK
from localpipe.pipeline.workers.loop import StageRunner
from localpipe.pipeline.workers.mesh import Mesh, private_dir
from localpipe.pipeline.workers.persistent_edges import PersistentEdges
from localpipe.pipeline.workers.phase import PhaseTimer

READY, CAUGHT_UP = "ready", "caught_up"


@dataclass(frozen=True)
class WorkerSnapshot:
    """What a worker was after so many messages.

    handled: the messages since the run began. step: of the last one. positions: of the edges back,
    as `PersistentEdges.positions`. runners: of every stage, as `StageRunner.state`.
    """

    handled: int
    step: int
    positions: dict[str, int]
    runners: Sequence[dict[str, Any]]

    def restore(self, runners: Sequence[StageRunner], timer: PhaseTimer) -> None:
        """Load the snapshot into the stages of a new process. Raises as `load_state`."""
        timer.step = self.step
        for runner, state in zip(runners, self.runners, strict=True):
            runner.load_state(state)


def snapshot_file(folder: Path, rank: int) -> Path:
    """Return the file of a worker's snapshot in the private folder of a run."""
    return folder / f"snapshot_{rank}"


def read_snapshot(folder: Path, rank: int) -> WorkerSnapshot | None:
    """Return the newest snapshot of a worker, its tensors on the CPU, None before its first one."""
    path = snapshot_file(folder, rank)
    if not path.exists():
        return None
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return WorkerSnapshot(**content)


class SnapshotKeeper:
    """Counts a worker's messages, and writes a snapshot after every half of `pipeline.replay`.

    edges: the worker's, opened. past: the snapshot that the worker began with, None for one without
    a predecessor. It writes notes when it is ready, and when it has caught up with what its
    predecessor had begun. Construct it when the stages are restored: without `past` it writes the
    first snapshot. Raises RunError without room for a snapshot.
    """

    def __init__(
        self,
        mesh: Mesh,
        config: Resolved,
        runners: Sequence[StageRunner],
        edges: PersistentEdges,
        past: WorkerSnapshot | None,
    ) -> None:
        assert config.pipeline.replay is not None, "the configuration recovers"
        self._interval = config.pipeline.replay // 2
        self._path, self._rank = snapshot_file(private_dir(), mesh.rank), mesh.rank
        self._notes = open_notes(mesh)
        self._runners, self._edges = runners, edges
        self._timer = runners[0].context.timer
        self._past, self._has_caught_up = past, False
        self._handled = self._covered = 0
        self._first_step = self._timer.step
        if past is None:
            self._write()
        else:
            self._handled = self._covered = past.handled
        self._lost = edges.lost
        self._put(READY)
        self._ready_time = time.monotonic()
        self._catch_up()

    def count_message(self, is_last: bool) -> None:
        """Count a message that has passed all stages of the worker, and write a snapshot if due.

        After the last message there is none: whoever loaded it would wait for another message.
        """
        self._handled += 1
        if not self._has_caught_up:
            self._catch_up()
        is_due = self._handled - self._covered >= self._interval
        if is_due and not is_last and self._runners[-1].ends_step:
            self._write()

    def _catch_up(self) -> None:
        """Note that the worker has caught up with its predecessor; count its speed from here on."""
        if self._handled < self._lost:
            return
        if self._past is not None:
            for runner, state in zip(self._runners, self._past.runners, strict=True):
                runner.restart_rates(state)
        self._put(
            CAUGHT_UP,
            steps=self._timer.step - self._first_step,
            step=self._timer.step,
            replay_s=time.monotonic() - self._ready_time,
        )
        self._has_caught_up, self._past = True, None

    def _put(self, key: str, **values: object) -> None:
        note = {"time": time.monotonic(), **values}
        self._notes.put(f"{key}_{self._rank}", json.dumps(note))

    def _write(self) -> None:
        """Write a snapshot, then let the sender use the slots that it covers."""
        step = self._timer.step
        states = [runner.state(step) for runner in self._runners]
        kept = {}
        for runner, state in zip(self._runners, states, strict=True):
            kept[runner.stage.plan.stage] = len(state["checkpoint"].get(FEEDBACK, ()))
        positions = self._edges.positions(kept)
        snapshot = {"handled": self._handled, "step": step, "positions": positions}
        content = io.BytesIO()
        torch.save({**snapshot, "runners": states}, content)
        try:
            write_whole(self._path, content.getbuffer(), fsync=False)
        except OSError as error:
            raise RunError(
                f"recover: cannot write a snapshot of {content.tell()} bytes into shared memory: "
                f"{error.strerror}; make it larger (docker: --shm-size), or set run.recover=none"
            ) from None
        self._covered = self._handled
        self._edges.save(self._handled)

"""Key-value notes shared by workers and launcher: heartbeats, the stop request, the abort reason.

On one machine a note is a file that is replaced atomically. No lock is taken, so a suspended process cannot block the others.
Under torchrun a note is a key of torchrun's store.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from localpipe.environment import PRIVATE_DIR
from localpipe.pipeline.workers.mesh import Mesh


class NoteStore(Protocol):
    """Where notes are pinned."""

    def put(self, key: str, text: str) -> None:
        """Pin a note, in place of the one before."""

    def get(self, key: str) -> str | None:
        """Return a note, or None where there is none."""


class FileNotes:
    """Notes as files of a private directory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, key: str, text: str) -> None:
        part = self._folder / f".note_{key}_{os.getpid()}"
        part.write_text(text, encoding="utf-8")
        part.replace(self._folder / f"note_{key}")

    def get(self, key: str) -> str | None:
        with contextlib.suppress(FileNotFoundError):
            return (self._folder / f"note_{key}").read_text(encoding="utf-8")
        return None


class StoreNotes:
    """Notes as entries of a store."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    def put(self, key: str, text: str) -> None:
        self._store.set(f"note/{key}", text)

    def get(self, key: str) -> str | None:
        return (
            self._store.get(f"note/{key}").decode() if self._store.check([f"note/{key}"]) else None
        )


def open_notes(mesh: Mesh) -> NoteStore:
    """Return the notes of this worker's run; with a store of its own, since another thread uses it."""
    private = os.environ.get(PRIVATE_DIR)
    return StoreNotes(mesh.store.clone()) if private is None else FileNotes(Path(private))


_GAP_S = 2.0  # looks come twice a second; of a longer gap between two, no more than this counts


class UnchangedTimer:
    """Counts seconds without change, look by look.

    A laptop that slept, a virtual machine that was frozen, a whole run that was stopped and continued: when it looks again,
    nothing has changed for an hour, yet nobody has hung. So a gap between two looks counts for two seconds at most.
    """

    def __init__(self) -> None:
        self._last: object = None
        self._looked = time.monotonic()
        self._same_s = 0.0

    def same_s(self, thing: object) -> float:
        """Look once more; return for how many seconds the thing has been equal to what it is now."""
        now = time.monotonic()
        gap, self._looked = now - self._looked, now
        self._same_s = self._same_s + min(gap, _GAP_S) if thing == self._last else 0.0
        self._last = thing
        return self._same_s


class HeartbeatMonitor:
    """Notices when a note that should change has not changed for too long."""

    def __init__(self, board: NoteStore, key: str, timeout_s: float) -> None:
        self._board, self._key, self._timeout_s = board, key, timeout_s
        self._patience = UnchangedTimer()

    def last(self) -> str | None:
        """Return the note if it has been the same for `timeout_s`; a note that never came is not silent."""
        note = self._board.get(self._key)
        return note if self._patience.same_s(note) > self._timeout_s else None

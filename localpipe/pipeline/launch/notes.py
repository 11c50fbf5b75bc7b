"""Key-value notes shared by workers and launcher: heartbeats, the stop request, the abort reason.

On one machine a note is a file that is replaced atomically. No lock is taken, so a suspended
process cannot block the others. Under torchrun a note is a key of torchrun's store.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from localpipe.environment import private_folder
from localpipe.files import write_whole
from localpipe.pipeline.workers.mesh import Mesh


class NoteStore(Protocol):
    """Notes by key. A new note replaces the one before."""

    def put(self, key: str, text: str) -> None:
        """Write a note. Raises OSError or RuntimeError if the notes' folder or store is lost."""

    def get(self, key: str) -> str | None:
        """Return a note, or None if nobody has written it. It does not wait.

        Raises OSError or RuntimeError if the notes cannot be read.
        """


class FileNotes:
    """Notes as files of a private folder. A key is part of a file's name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, key: str, text: str) -> None:
        """Write a note atomically. Raises OSError if the folder is gone or full."""
        # A heartbeat never waits for the disk: notes end with their run.
        write_whole(self._path(key), text, fsync=False)

    def get(self, key: str) -> str | None:
        """Return a note, or None without its file. Raises OSError if the file cannot be read."""
        with contextlib.suppress(FileNotFoundError):
            return self._path(key).read_text(encoding="utf-8")
        return None

    def remove(self, key: str) -> None:
        """Remove a note, if there is one. Raises OSError if it cannot be removed."""
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / f"note_{key}"


class StoreNotes:
    """Notes as keys of a store."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    def put(self, key: str, text: str) -> None:
        """Write a note. torch's RuntimeError passes through if the store is lost."""
        self._store.set(f"note/{key}", text)

    def get(self, key: str) -> str | None:
        """Return a note, or None if nobody has written it, without waiting for it.

        torch's RuntimeError passes through if the store is lost.
        """
        # `Store.get` waits for a key that is missing.
        if not self._store.check([f"note/{key}"]):
            return None
        return self._store.get(f"note/{key}").decode()


def open_notes(mesh: Mesh) -> NoteStore:
    """Return the notes of this worker's run: files, or under torchrun keys of its store.

    Their store is a clone, because another thread uses the worker's own.
    """
    folder = private_folder()
    if folder is None:
        return StoreNotes(mesh.store.clone())
    return FileNotes(folder)


_MOST_GAP_S = 2.0  # updates come twice a second; a longer gap between two counts as this much


class UnchangedTimer:
    """The seconds for which a value has not changed, counted from update to update.

    A laptop that slept, a virtual machine that was frozen, a whole run that was suspended and
    continued: at its next update nothing has changed for an hour, yet no process hangs. So a gap
    between two updates counts for two seconds at most. Call it more often than that. Before the
    first update the value is None.
    """

    def __init__(self) -> None:
        self._value: object = None
        self._time = time.monotonic()
        self._unchanged_s = 0.0

    def update(self, value: object) -> float:
        """Take the value of now; return for how many seconds it has been the same.

        Values are compared by ==. A changed one gives 0.0.
        """
        now = time.monotonic()
        gap_s = now - self._time
        self._time = now
        if value == self._value:
            self._unchanged_s += min(gap_s, _MOST_GAP_S)
        else:
            self._unchanged_s = 0.0
        self._value = value
        return self._unchanged_s


class HeartbeatMonitor:
    """Watches one note that should change, and notices if it has not changed for too long.

    timeout_s: seconds, counted as UnchangedTimer counts them.
    """

    def __init__(self, notes: NoteStore, key: str, timeout_s: float) -> None:
        self._notes = notes
        self._key = key
        self._timeout_s = timeout_s
        self._unchanged = UnchangedTimer()
        self.unchanged_s = 0.0  # as of the last look

    def read_overdue(self) -> str | None:
        """Return the note if it has been the same for longer than `timeout_s`, else None.

        Call it at least every two seconds. A note that was never written is not overdue. An overdue
        one is returned by every call until it changes. Errors of the notes pass through.
        """
        note = self._notes.get(self._key)
        self.unchanged_s = self._unchanged.update(note)
        if self.unchanged_s > self._timeout_s:
            return note
        return None

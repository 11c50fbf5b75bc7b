"""Notes that workers leave for each other and for their launcher: heartbeats, and the word that ends a run.

On one machine a note is a file, replaced whole: no lock is taken, so a stopped process can block nobody. Under torchrun a
note is an entry of its store.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from localpipe.patience import Patience


class Board(Protocol):
    """Where notes are pinned."""

    def put(self, key: str, text: str) -> None:
        """Pin a note, in place of the one before."""

    def get(self, key: str) -> str | None:
        """Return a note, or None where there is none."""


class FileBoard:
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


class StoreBoard:
    """Notes as entries of a store."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    def put(self, key: str, text: str) -> None:
        self._store.set(f"note/{key}", text)

    def get(self, key: str) -> str | None:
        return (
            self._store.get(f"note/{key}").decode() if self._store.check([f"note/{key}"]) else None
        )


class Silence:
    """Notices when a note that should change has not changed for too long."""

    def __init__(self, board: Board, key: str, timeout_s: float) -> None:
        self._board, self._key, self._timeout_s = board, key, timeout_s
        self._patience = Patience()

    def last(self) -> str | None:
        """Return the note if it has been the same for `timeout_s`; a note that never came is not silent."""
        note = self._board.get(self._key)
        return note if self._patience.same_s(note) > self._timeout_s else None

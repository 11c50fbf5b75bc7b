"""The store of a run whose workers are replaced: a file for each key, replaced whole.

torch's file store appends under a lock. A worker that is killed there may leave half an entry, and
one that is suspended keeps the lock. Here no lock is taken, and a key is whole or absent.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import torch.distributed as dist

from localpipe.files import write_whole

FACTS_FOLDER = "facts"  # in the private folder of a run
_TICK_S = 0.02


class FolderStore(dist.Store):
    """Facts by key. folder: it must exist. `get` and `wait` wait for missing keys without end."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def set(self, key: str, value: str) -> None:
        """Write a fact, in place of one that is there. Raises OSError without room or folder."""
        write_whole(self._path(key), value, fsync=False)

    def get(self, key: str) -> bytes:
        """Return a fact, waiting for it."""
        self.wait([key])
        return self._path(key).read_bytes()

    def check(self, keys: Sequence[str]) -> bool:
        """Return whether all of the facts are there."""
        return all(self._path(key).exists() for key in keys)

    def wait(self, keys: Sequence[str], timeout: datetime.timedelta | None = None) -> None:
        """Wait until all of the facts are there, whatever `timeout` is."""
        while not self.check(keys):
            time.sleep(_TICK_S)

    def _path(self, key: str) -> Path:
        return self._folder / quote(key, safe="")

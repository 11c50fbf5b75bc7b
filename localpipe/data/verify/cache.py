"""The files of a folder that were found good, kept in the user's cache folder or nowhere."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localpipe.environment import cache_folder
from localpipe.files import write_whole

# What is known of a good file, as bits.
READ, DECODED, SEVERAL = 1, 2, 4  # its header, its pixels, and that it has more images than one
UNKNOWN = np.uint64(0)  # the key of a file without size and time
_AT_ONCE = 64  # files of a task of the threads

Keys = NDArray[np.uint64]
Facts = NDArray[np.uint8]


class VerifiedFiles:
    """The good files of one folder, by keys of `file_keys`, with facts as bits.

    Several processes may use one cache at the same time: the last one to write wins, and what it
    lacks is checked again. A cache that cannot be read or written is an empty one.
    """

    def __init__(self, root: Path) -> None:
        self._file: Path | None = None
        folder = cache_folder()
        if folder is not None:
            name = hashlib.blake2b(os.fsencode(os.path.abspath(root)), digest_size=16).hexdigest()
            self._file = folder / "images" / f"{name}.npz"

    def find(self, keys: Keys) -> Facts:
        """Return what is known of files, (N,) as `keys`: 0 for a file that is not in the cache."""
        known, facts = self._read()
        if len(known) == 0:
            return np.zeros(len(keys), np.uint8)
        place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        is_known = (known[place] == keys) & (keys != UNKNOWN)
        found: Facts = np.where(is_known, facts[place], 0).astype(np.uint8)
        return found

    def add(self, keys: Keys, facts: Facts, keeps_others: bool) -> None:
        """Add files to the cache. Those without facts are not good, and are not added.

        keeps_others: keep what it has of other files. Else these are all files of the folder.
        """
        if self._file is None:
            return
        old, old_facts = self._read()
        if not keeps_others:
            is_kept = np.isin(old, keys)
            old, old_facts = old[is_kept], old_facts[is_kept]
        is_good = (facts != 0) & (keys != UNKNOWN)
        keys, facts = keys[is_good], facts[is_good]

        # Another process may have learnt more of the same files.
        merged, place = np.unique(np.concatenate([old, keys]), return_inverse=True)
        merged_facts = np.zeros(len(merged), np.uint8)
        np.bitwise_or.at(merged_facts, place, np.concatenate([old_facts, facts]))
        content = io.BytesIO()
        np.savez(content, keys=merged, facts=merged_facts)
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._file, content.getbuffer(), fsync=False)

    def _read(self) -> tuple[Keys, Facts]:
        """Return the keys of the cache in sorted order, and their facts."""
        empty = np.zeros(0, np.uint64), np.zeros(0, np.uint8)
        if self._file is None:
            return empty
        # zipfile, zlib and numpy each raise errors of their own for a damaged file.
        try:
            with np.load(self._file, allow_pickle=False) as content:
                keys, facts = content["keys"], content["facts"]
        except Exception:
            return empty
        is_whole = keys.dtype == np.uint64 and facts.dtype == np.uint8 and keys.ndim == 1
        if is_whole and keys.shape == facts.shape:
            return keys, facts
        return empty


def find_keys(pool: ThreadPoolExecutor, paths: Sequence[str], root: Path, check: str) -> Keys:
    """Return what `file_keys` does. The threads of `pool` wait for a slow disk together."""

    def find(part: slice) -> Keys:
        return file_keys(paths[part], root, check)

    keys = [np.zeros(0, np.uint64), *pool.map(find, split_rows(len(paths)))]
    return np.concatenate(keys)


def split_rows(count: int) -> list[slice]:
    """Return the tasks of threads, which are together the rows 0 .. count - 1."""
    return [slice(start, start + _AT_ONCE) for start in range(0, count, _AT_ONCE)]


def file_keys(paths: Sequence[str], root: Path, check: str) -> Keys:
    """Return a key (N,) of every file's name below `root`, its size, its time, and the check.

    check: the text of all that decides what is good, the files apart.
    """
    above = len(str(root / "x")) - 1  # letters of a path; `root` may be "."
    keys = np.zeros(len(paths), np.uint64)
    for row, path in enumerate(paths):
        try:
            status = os.stat(path)
        except OSError:  # it is reported when it is opened
            continue
        text = f"{check}\0{path[above:]}\0{status.st_size}\0{status.st_mtime_ns}"
        digest = hashlib.blake2b(os.fsencode(text), digest_size=8).digest()
        keys[row] = int.from_bytes(digest, "little")
    return keys

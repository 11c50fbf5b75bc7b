"""The lines of metrics.jsonl: written by every worker, read back in order."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from localpipe.errors import RunError
from localpipe.files import SCHEMA, write_whole


class Recorder:
    """Appends records to metrics.jsonl, one line each, from any number of processes."""

    def __init__(self, path: Path, started: float, elapsed_s: float) -> None:
        self._path, self._started, self._elapsed_s = path, started, elapsed_s

    def write(self, kind: str, **values: Any) -> None:
        """Append one record; `wall_s` counts from the start of the run, earlier sessions included."""
        wall = round(self._elapsed_s + time.time() - self._started, 3)
        append_record(self._path, {"kind": kind, **values, "wall_s": wall})


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line under a lock, so that lines never mix, on a shared file system either."""
    line = (json.dumps(record, allow_nan=False) + "\n").encode()
    try:
        with open(path, "ab", buffering=0) as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            written = file.write(line)
            if written < len(
                line
            ):  # a full disk; the next line must not go on where this one broke off
                file.truncate(file.tell() - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise RunError(
            f"metrics: cannot write {path}: {error.strerror}; the last checkpoint is untouched"
        ) from None


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics file, leaving out a last line that was never finished."""
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:
                    continue


def begin_records(
    path: Path, header: Mapping[str, Any], step: int, keeps: Callable[[int], bool]
) -> float:
    """Start metrics.jsonl, or cut off what came after `step`; return the seconds that the kept part covers.

    `keeps` says of a step whether its evaluation stays: the one that a resumed run does again goes, and so does one that
    stood at the end of a shorter run.
    """
    kept = []
    for record in read_records(path):
        stays = record.get("step", 0) <= step and (
            record["kind"] != "eval" or keeps(record["step"])
        )
        if record["kind"] != "start" and stays:
            kept.append(record)
    lines = [{"schema": SCHEMA, "kind": "start", **header, "resumed_at": step or None}, *kept]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
    return max((record.get("wall_s", 0.0) for record in kept), default=0.0)

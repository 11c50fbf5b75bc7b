"""The lines of metrics.jsonl: written by every worker, read back in order."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from localpipe.errors import RunError, UserError
from localpipe.files import SCHEMA, write_output
from localpipe.runs.checkpoint import describe_kept


class Recorder:
    """Appends records to metrics.jsonl, one line each, from any number of processes.

    started: the time of this session's start, in seconds since the epoch. elapsed_s: seconds of the
    sessions before it. Nothing is opened before `write`.
    """

    def __init__(self, path: Path, started: float, elapsed_s: float) -> None:
        self._path = path
        self._started = started
        self._elapsed_s = elapsed_s
        self._written: set[tuple[Any, ...]] = set()

    def write(self, kind: str, **values: Any) -> None:
        """Append one record with the keys `kind`, those of `values`, and `wall_s`.

        `wall_s` is in seconds from the run's start, earlier sessions included. Raises what
        `append_record` raises. A record that `skip_written` has found is left out.
        """
        if self._written and _identify(kind, values) in self._written:
            return
        wall_s = round(self._elapsed_s + time.time() - self._started, 3)
        append_record(self._path, {"kind": kind, **values, "wall_s": wall_s})

    def skip_written(self, stages: Iterable[int]) -> None:
        """Leave out from now on what some stages have written already.

        For a worker that computes steps again. Raises as `read_records`.
        """
        numbers = set(stages)
        for record in read_records(self._path):
            if record.get("stage") in numbers:
                self._written.add(_identify(record["kind"], record))


def _identify(kind: str, values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a stage writes one record of."""
    return kind, values.get("stage"), values.get("step"), values.get("split")


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line under a lock, so that lines never mix, on a shared file system either.

    The file is made if it is missing, but its folder must exist. Raises RunError if the file cannot
    be written, and leaves no part of the line on a full disk. Raises ValueError if a number is NaN
    or infinite, and TypeError if JSON cannot hold a value.
    """
    line = (json.dumps(record, allow_nan=False) + "\n").encode()
    try:
        with open(path, "ab", buffering=0) as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            size = file.write(line)
            # The disk is full. The next line must not continue where this one ends.
            if size < len(line):
                file.truncate(file.tell() - size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise RunError(
            f"metrics: cannot write {path}: {error.strerror}; {describe_kept(path.parent)}"
        ) from None


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics file, in the order of its lines.

    Yields nothing if there is no file. A last line without a newline and lines that are no JSON are
    left out, and so are lines that are no mapping with a `kind`. Raises UserError if the file
    cannot be read or is not UTF-8, when the first record is requested.
    """
    if not path.exists():
        return
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8 text" if isinstance(error, ValueError) else error.strerror
        raise UserError(
            f"run: cannot read {path}: {reason}; mend it, or remove it to go on without its records"
        ) from None
    # What follows the last newline was not written to its end.
    for line in lines[:-1]:
        record = parse_record(line)
        if record is not None:
            yield record


def parse_record(line: str | bytes) -> dict[str, Any] | None:
    """Return the record of a line of metrics.jsonl, None if it is no mapping with a `kind`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or "kind" not in record:
        return None
    return record


def begin_records(
    path: Path,
    header: Mapping[str, Any],
    step: int,
    keeps_evaluation: Callable[[int], bool],
) -> float:
    """Start metrics.jsonl, or remove the records after `step`, and return the seconds of the rest.

    The first line becomes a new `start` record with the keys of `header`, and `resumed_at`: `step`,
    or None for 0. `keeps_evaluation` gets the step of every evaluation up to `step`, and returns
    whether it stays. A resumed run does the evaluation of its first step again. Returns the largest
    `wall_s` that stays, 0.0 without one. Raises RunError if the file cannot be written, and
    UserError if it cannot be read.
    """
    records = []
    for record in read_records(path):
        stays = record.get("step", 0) <= step
        if record["kind"] == "eval":
            stays = stays and keeps_evaluation(record["step"])
        if stays and record["kind"] != "start":
            records.append(record)

    start = {"schema": SCHEMA, "kind": "start", **header, "resumed_at": step or None}
    lines = [json.dumps(record) + "\n" for record in [start, *records]]
    write_output(path, "".join(lines))
    return max((record.get("wall_s", 0.0) for record in records), default=0.0)

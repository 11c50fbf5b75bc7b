"""What a run writes down: running sums of a stage, the lines of metrics.jsonl, and the digest of the weights."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localpipe.errors import RunError, UserError
from localpipe.message import dtype_name

SCHEMA = 1
FIRST_STEPS = 5  # left out of every rate: kernels, caches and queues are still filling


@dataclass(frozen=True)
class _Arrival:
    """A loss on its way to the host; `copied` has passed when the host has it, None where it never left."""

    step: int
    loss: Tensor
    samples: int
    copied: torch.cuda.Event | None

    @property
    def has_come(self) -> bool:
        return self.copied is None or self.copied.query()


class Meter:
    """A stage's mean training loss: part of its checkpoint, so that a resumed run reports what an undisturbed one does.

    A loss is looked at when it has come from the device, at least one step later; the device is never waited for but at
    an evaluation, a checkpoint and the end. What is to be told of the losses so far is told when they have come.
    """

    def __init__(self) -> None:
        self.loss_sum = 0.0
        self.samples = 0
        self.busy_s = 0.0
        self._whole_epoch: float | None = None
        self._pending: deque[_Arrival | Callable[[float], None]] = deque()
        self._window: list[tuple[float, int]] = []

    def add(self, step: int, loss: Tensor, samples: int) -> None:
        """Count a training loss; raise RunError when one that has come meanwhile is not finite."""
        while self._pending and (
            not isinstance(first := self._pending[0], _Arrival) or first.has_come
        ):
            self._look()
        self._pending.append(_sent(step, loss, samples))

    def tell(self, told: Callable[[float], None]) -> None:
        """Have `told` called with the mean loss since the last such call, as soon as all losses added so far have come."""
        self._pending.append(told)
        if all(not isinstance(each, _Arrival) or each.copied is None for each in self._pending):
            self.settle()

    def settle(self) -> None:
        """Look at every loss, waiting for the device; raise RunError when one is not finite."""
        while self._pending:
            first = self._pending[0]
            if isinstance(first, _Arrival) and first.copied is not None:
                first.copied.synchronize()
            self._look()

    def _look(self) -> None:
        first = self._pending.popleft()
        if not isinstance(first, _Arrival):
            samples = sum(count for _, count in self._window)
            first(sum(value * count for value, count in self._window) / samples)
            self._window = []
            return
        value = float(first.loss)
        if not math.isfinite(value):
            raise RunError(
                f"the local loss of step {first.step} is {value}; lower optim.lr, or look at the data"
            )
        self.loss_sum += value * first.samples
        self.samples += first.samples
        self._window.append((value, first.samples))

    def mean_loss(self) -> float | None:
        """Return the mean local loss of the last whole epoch, or of the steps so far; None before the first step."""
        self.settle()
        return self.loss_sum / self.samples if self.samples else self._whole_epoch

    def restart(self) -> None:
        """Begin a new epoch."""
        self._whole_epoch = self.mean_loss()
        self.loss_sum, self.samples = 0.0, 0

    def state(self) -> dict[str, float | None]:
        """Return the sums, for a checkpoint."""
        self.settle()
        return {
            "loss_sum": self.loss_sum,
            "samples": self.samples,
            "busy_s": self.busy_s,
            "whole_epoch": self._whole_epoch,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        self.loss_sum, self.samples, self.busy_s = (
            state["loss_sum"],
            state["samples"],
            state["busy_s"],
        )
        self._whole_epoch = state["whole_epoch"]


def _sent(step: int, loss: Tensor, samples: int) -> _Arrival:
    """Start a loss towards the host, behind what its device has been given so far."""
    loss = loss.detach()
    if loss.device.type != "cuda":
        return _Arrival(step, loss, samples, None)
    host = torch.empty(loss.shape, dtype=loss.dtype, pin_memory=True)
    host.copy_(loss, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(loss.device))
    return _Arrival(step, host, samples, copied)


class Pace:
    """A stage's steady speed: time between training steps that nothing but training stood between."""

    def __init__(self) -> None:
        self.steps = self.samples = 0
        self.wall_s = self.compute_s = 0.0
        self._seen = 0
        self._last_end: float | None = None

    def step(self, end: float, compute_s: float, samples: int) -> None:
        """Count a training step that ended at `end`."""
        self._seen += 1
        if self._last_end is not None and self._seen > FIRST_STEPS:
            self.steps += 1
            self.samples += samples
            self.wall_s += end - self._last_end
            self.compute_s += compute_s
        self._last_end = end

    def interrupt(self) -> None:
        """Leave the time up to the next step out: an evaluation or a checkpoint stands between."""
        self._last_end = None


class Recorder:
    """Appends records to metrics.jsonl, one line each, from any number of processes."""

    def __init__(self, path: Path, started: float, elapsed_s: float) -> None:
        self._path, self._started, self._elapsed_s = path, started, elapsed_s

    def write(self, kind: str, **values: Any) -> None:
        """Append one record; `wall_s` counts from the start of the run, earlier sessions included."""
        wall = round(self._elapsed_s + time.time() - self._started, 3)
        append(self._path, {"kind": kind, **values, "wall_s": wall})


def append(path: Path, record: Mapping[str, Any]) -> None:
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


def read(path: Path) -> Iterator[dict[str, Any]]:
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


def begin(path: Path, header: Mapping[str, Any], step: int, keeps: Callable[[int], bool]) -> float:
    """Start metrics.jsonl, or cut off what came after `step`; return the seconds that the kept part covers.

    `keeps` says of a step whether its evaluation stays: the one that a resumed run does again goes, and so does one that
    stood at the end of a shorter run.
    """
    kept = []
    for record in read(path):
        stays = record.get("step", 0) <= step and (
            record["kind"] != "eval" or keeps(record["step"])
        )
        if record["kind"] != "start" and stays:
            kept.append(record)
    lines = [{"schema": SCHEMA, "kind": "start", **header, "resumed_at": step or None}, *kept]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
    return max((record.get("wall_s", 0.0) for record in kept), default=0.0)


def check_folder(where: str, path: Path) -> None:
    """Raise UserError where a file cannot be, because its folder is missing: before hours of work, not after."""
    if path.is_dir():
        raise UserError(f"{where} {path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise UserError(
            f"{where} {path}: there is no folder {path.parent}; make it, or give another file"
        )


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there complete or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RunError(
            f"cannot write {path}: {error.strerror}; free space or choose another run.dir"
        ) from None


def digest_lines(weights: Mapping[str, Tensor]) -> list[str]:
    """Return `name dtype shape sha256` of every tensor; the bytes are contiguous and little-endian."""
    lines = []
    for name, tensor in weights.items():
        data = tensor.detach().cpu().contiguous()
        content = hashlib.sha256(data.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        lines.append(f"{name} {dtype_name(data.dtype)} {list(data.shape)} {content}")
    return lines


def digest(lines: Iterable[str]) -> str:
    """Return the SHA-256 of the lines in byte order, each ended by a newline."""
    ordered = sorted(line.encode() for line in lines)
    return hashlib.sha256(b"".join(line + b"\n" for line in ordered)).hexdigest()

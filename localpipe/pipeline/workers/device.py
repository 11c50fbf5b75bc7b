"""The device of a worker: which one it is, how batches get there, and how long its kernels take."""

from __future__ import annotations

import os
import resource
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from localpipe.config.resolve import MachineFacts
from localpipe.environment import available_cores, local_workers
from localpipe.errors import UserError
from localpipe.pipeline.channels.channel import Inbox
from localpipe.pipeline.channels.message import Message

SHARED = "NCCL_MULTI_RANK_GPU_ENABLE"


def machine_facts(world: int | None = None) -> MachineFacts:
    """Return what this machine decides of a configuration. `world` is torchrun's number of workers."""
    return MachineFacts(
        cores=available_cores(),
        cuda_devices=torch.cuda.device_count() if torch.cuda.is_available() else 0,
        cuda_has_bf16=torch.cuda.is_available()
        and torch.cuda.is_bf16_supported(including_emulation=False),
        world=world,
        local_workers=local_workers(),
    )


def check_devices(device: str, backend: str, local_processes: int) -> None:
    """Raise UserError where this machine lacks what a configuration asks for."""
    if device == "cpu":
        if backend == "nccl":
            raise UserError(
                "config: pipeline.backend is nccl, but the stages run on the CPU; set pipeline.backend=gloo, or run.device=cuda"
            )
        return
    if not torch.cuda.is_available():
        raise UserError(
            "config: run.device is cuda, but torch sees no CUDA device; set run.device=cpu"
        )
    devices = torch.cuda.device_count()
    if local_processes > devices and backend != "gloo" and os.environ.get(SHARED) != "1":
        raise UserError(
            f"config: {local_processes} workers for {devices} CUDA device{'s' if devices > 1 else ''}; set "
            f"pipeline.processes to at most {devices}, or share them: pipeline.backend=gloo, or NCCL 2.30 with {SHARED}=1"
        )


def select_device(name: str, local_rank: int) -> torch.device:
    """Return this worker's device, made current: the CPU, or one GPU, in turn."""
    if name == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


class Upload:
    """An inbox whose messages lie in pinned memory of the host and are copied to a device behind what it is doing."""

    def __init__(self, inbox: Inbox, device: torch.device) -> None:
        self._inbox, self._device = inbox, device

    def receive(self) -> Message:
        message = self._inbox.receive()
        moved: dict[str, Tensor] = {
            name: tensor.to(self._device, non_blocking=True)
            for name, tensor in message.fields.items()
        }
        return Message(message.header, moved)


class Stopwatch:
    """Seconds that a turn's kernels take on a device, known a few turns later, so that nobody is waited for.

    On the CPU the host's own time is the truth, and nothing is measured here. What a stage with replicas waits for in the
    device's own queue, another replica's gradients, counts.
    """

    def __init__(self, device: torch.device) -> None:
        self._on = device.type == "cuda"
        self._spans: deque[tuple[Any, Any]] = deque()
        self._begun: Any = None

    def begin(self) -> None:
        """Mark the beginning of a turn's kernels, behind the wait for its message."""
        if self._on:
            self._begun = _marked()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Leave out what happens inside: while the host waits for another stage, the device idles."""
        begun = self._begun
        self._end()
        yield
        if begun is not None:
            self.begin()

    def lap(self, host_s: float) -> float:
        """Mark the end; return the seconds of what has ended meanwhile, or the host's own."""
        if not self._on:
            return host_s
        self._end()
        seconds = 0.0
        while self._spans and self._spans[0][1].query():
            first, last = self._spans.popleft()
            seconds += first.elapsed_time(last) / 1000
        return seconds

    def _end(self) -> None:
        if self._begun is not None:
            self._spans.append((self._begun, _marked()))
            self._begun = None


def _marked() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def device_time_s() -> float:
    """Return the clock's seconds once this process's GPU, if it uses one, has done all that it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the allocator's peak on a GPU, and this process's resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

"""The device of a worker: its choice, the copy of batches to it, and the time of its kernels."""

from __future__ import annotations

import os
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from localpipe.config.resolve import MachineFacts
from localpipe.config.resolved import Resolved
from localpipe.environment import SHARED_GPU, available_cores, can_share_gpu, local_workers
from localpipe.errors import UserError, first_line
from localpipe.pipeline.channels.channel import Inbox, find_backend
from localpipe.pipeline.channels.message import Message
from localpipe.pipeline.channels.streams import take_stream

EMULATED_GPU = "Emulated GPU"  # the name of the device that tests emulate


def read_machine_facts(world: int | None = None) -> MachineFacts:
    """Return what a configuration's `auto` keys take from this machine.

    `world` is torchrun's number of workers, or None without torchrun. Without a CUDA device
    cuda_devices is 0 and cuda_has_bf16 is False. Emulated bf16 does not count.
    """
    cuda_devices, has_bf16 = 0, False
    if torch.cuda.is_available():
        cuda_devices = torch.cuda.device_count()
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return MachineFacts(
        cores=available_cores(),
        cuda_devices=cuda_devices,
        cuda_has_bf16=has_bf16,
        world=world,
        local_workers=local_workers(),
    )


def describe_memory_error(error: BaseException) -> str | None:
    """Return in one line that memory does not suffice, None for an error of another kind.

    It is the memory of the machine or of a GPU. torch has a class of its own for a GPU alone.
    """
    is_of_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if not is_of_cpu and not isinstance(error, MemoryError | torch.OutOfMemoryError):
        return None
    # The line of torch's allocator begins with a place in its source.
    reason = first_line(error).rpartition("DefaultCPUAllocator: ")[2]
    return (
        f"memory does not suffice ({reason}); "
        "lower pipeline.depth, or begin a new run with a smaller data.batch_size or more stages"
    )


def check_devices(device: str, backend_name: str, local_processes: int | None) -> None:
    """Raise UserError if this machine lacks the devices that a configuration needs.

    device: the type, cpu or cuda. backend_name: a name that does not exist raises UserError too.
    local_processes: the number of workers that see the devices of this process, which only cuda
    limits. None where each worker may see devices of its own, as tasks of SLURM do: workers then
    compare their devices with `check_own_device`.
    """
    backend = find_backend(backend_name)
    if device == "cpu":
        if "cpu" not in backend.device_types:
            other = ", or run.device=cuda" if torch.cuda.is_available() else ""
            raise UserError(
                f"config: pipeline.backend is {backend.name}, but the stages run on the CPU; "
                f"set pipeline.backend=gloo{other}"
            )
        return
    if not torch.cuda.is_available():
        raise UserError(
            "config: run.device is cuda, but torch sees no CUDA device; set run.device=cpu"
        )
    devices = torch.cuda.device_count()
    if local_processes is None or not backend.needs_own_device or can_share_gpu():
        return
    if local_processes > devices:
        plural = "s" if devices > 1 else ""
        raise UserError(
            f"config: {local_processes} workers for {devices} CUDA device{plural}; "
            f"set pipeline.processes to at most {devices}, or share them: "
            f"pipeline.backend=gloo, or NCCL 2.30 with {SHARED_GPU}=1"
        )


def gpu_name(device: str) -> str | None:
    """Return the model of this process's first GPU. device: the type; None unless it is cuda."""
    if device != "cuda":
        return None
    return torch.cuda.get_device_name(0)


def emulated_key(name: str | None) -> dict[str, bool]:
    """Return `emulated: true` for what is made on the GPU that the tests emulate, else nothing.

    Its figures of time say nothing about a GPU. name: of the device, None without one.
    """
    if name == EMULATED_GPU:
        return {"emulated": True}
    return {}


def select_device(name: str, local_rank: int) -> torch.device:
    """Return this worker's device: the CPU, or a GPU by its local rank, made current.

    name: `cpu`, or anything else for a GPU. Local ranks share GPUs in turn. Raises
    ZeroDivisionError if a GPU is needed and there is none.
    """
    if name == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def select_worker_device(config: Resolved, rank: int, local_rank: int) -> torch.device:
    """Return the device of a worker, made current: its own of pipeline.devices, else the next one.

    rank: of the worker. local_rank: its number on its machine, as of `select_device`.
    """
    names = config.pipeline.devices
    if names is None:
        return select_device(config.run.device, local_rank)
    kind, _, number = names[rank].partition(":")
    return select_device(kind, int(number or 0))


def check_listed_devices(names: Sequence[str], backend_name: str) -> None:
    """Raise UserError where this machine lacks one of the workers' own devices.

    names: as of pipeline.devices, of workers on this machine. backend_name: NCCL wants a GPU of
    its own for each worker.
    """
    cores = sorted(os.sched_getaffinity(0))
    gpus = range(torch.cuda.device_count())
    for name in names:
        kind, _, number = name.partition(":")
        here = list(gpus) if kind == "cuda" else cores
        if number and int(number) not in here:
            found = ", ".join(f"{kind}:{index}" for index in here)
            raise UserError(
                f"config: pipeline.devices names {name}, but this machine has {found}; choose "
                "among them"
            )
    needs_own = find_backend(backend_name).needs_own_device and not can_share_gpu()
    shared = [name for name in names if names.count(name) > 1]
    if needs_own and shared and len(names) > 1:
        raise UserError(
            f"config: pipeline.devices names {shared[0]} for several workers, but NCCL wants a GPU "
            f"for each; name others, or share it: pipeline.backend=gloo, or NCCL 2.30 with "
            f"{SHARED_GPU}=1"
        )


def check_own_device(
    store: dist.Store, rank: int, world: int, device: torch.device, backend_name: str
) -> None:
    """Raise UserError, in every worker alike, if two workers would use the same GPU over NCCL.

    Workers are told apart by the UUIDs of their devices. Indices do not tell: SLURM may show each
    task one GPU, which is cuda:0 in all of them. Every worker of a run calls it, because it waits
    for all. It does nothing on the CPU, for one worker, and where a GPU may be shared.
    store: of the run. Raises UserError for an unknown backend_name.
    """
    needs_own = find_backend(backend_name).needs_own_device
    if device.type != "cuda" or world == 1 or not needs_own or can_share_gpu():
        return
    store.set(f"device/{rank}", _device_id(device))
    first_ranks: dict[str, int] = {}
    for other in range(world):
        uuid = store.get(f"device/{other}").decode()
        first = first_ranks.setdefault(uuid, other)
        if first != other:
            raise UserError(
                f"config: ranks {first} and {other} both use GPU {uuid}, expected one GPU for each "
                f"of the {world} workers; start fewer workers, let each see another GPU, or share "
                f"it: pipeline.backend=gloo, or NCCL 2.30 with {SHARED_GPU}=1"
            )


def _device_id(device: torch.device) -> str:
    """Return what tells one GPU from all others, on any machine and under any index."""
    return str(torch.cuda.get_device_properties(device).uuid)


class Upload:
    """An inbox that copies messages from the host's pinned memory to a device.

    The copy has a stream of its own, so that it runs beside the device's present work. The host
    does not wait for it, and the work on the message does.
    """

    def __init__(self, inbox: Inbox, device: torch.device) -> None:
        self._inbox, self._device = inbox, device
        self._copies = take_stream(device)

    def receive(self) -> Message:
        """Return the next message, on the device, with the same header. The tensors are new.

        Use them on the stream that is current now. Waits for the inbox, whose errors pass through.
        """
        message = self._inbox.receive()
        reader = torch.cuda.current_stream(self._device)
        fields: dict[str, Tensor] = {}
        with torch.cuda.stream(self._copies):
            for name, tensor in message.fields.items():
                fields[name] = tensor.to(self._device, non_blocking=True)
            copied = self._copies.record_event()
        reader.wait_event(copied)
        # Their memory belongs to the stream of the copies, and is free after the reader's work.
        for tensor in fields.values():
            tensor.record_stream(reader)
        return Message(message.header, fields)


# Called with the end of a turn, in seconds of the monotonic clock, and its seconds of computing.
ReportTurn = Callable[[float, float], None]
_TURNS_AHEAD = 2  # that the host may enqueue before the device has ended the oldest of them


class Stopwatch:
    """When the turns of a stage end, and the seconds that their kernels take.

    On the CPU both are the host's own, known at once. A GPU computes what the host has enqueued,
    and a host that waits for nobody would only time its own enqueueing. So at the end of a turn it
    waits for the device to end the turn two before, and a turn is reported with the device's times.
    The device always has the next turn in its queue.

    The time that a stage's replica waits in the device's own queue, for another replica's
    gradients, counts as computing.
    """

    def __init__(self, device: torch.device) -> None:
        self._on = device.type == "cuda"
        self._start: Any = None
        self._spans: list[tuple[Any, Any]] = []  # of the current turn
        self._turns: deque[_DeviceTurn] = deque()  # whose end the host has not seen
        # An event, and the time at which it passed. The end of every turn is counted from the last.
        self._last_event: Any = None
        self._last_s = 0.0

    @property
    def runs_ahead(self) -> bool:
        """Whether the host must wait for the device in `finish`."""
        return len(self._turns) >= _TURNS_AHEAD

    def begin(self) -> None:
        """Mark the start of a turn's kernels, after the wait for its message.

        Does nothing on the CPU. The first call on a GPU waits for the device.
        """
        if not self._on:
            return
        self._start = _record_event()
        if self._last_event is None:
            self._last_event = self._start
            self._last_event.synchronize()
            self._last_s = time.monotonic()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out the time inside: while the host waits for another stage, the device idles.

        Does nothing outside of a turn. If the body raises, the turn's time is not resumed.
        """
        start = self._start
        self.stop()
        yield
        if start is not None:
            self.begin()

    def stop(self) -> None:
        """Mark the end of a turn's computing. Does nothing on the CPU and outside of a turn."""
        if self._start is not None:
            self._spans.append((self._start, _record_event()))
            self._start = None

    def finish(self, host_s: float, report: ReportTurn) -> None:
        """End a turn: `report` is called on the CPU at once, with `host_s` as its computing.

        On a GPU the call is made when the device has ended the turn, in a later `finish` or in
        `settle`, and reports are called in their order. It waits for the turn two before.
        """
        if not self._on:
            report(time.monotonic(), host_s)
            return
        self.stop()
        self._turns.append(_DeviceTurn(self._spans, _record_event(), report))
        self._spans = []
        while len(self._turns) > _TURNS_AHEAD:
            self._report_oldest()

    def settle(self) -> None:
        """Wait for the device to end every turn, and report each. Does nothing on the CPU."""
        while self._turns:
            self._report_oldest()

    def _report_oldest(self) -> None:
        turn = self._turns.popleft()
        turn.end.synchronize()
        self._last_s += self._last_event.elapsed_time(turn.end) / 1000
        self._last_event = turn.end
        milliseconds = [first.elapsed_time(last) for first, last in turn.spans]
        turn.report(self._last_s, sum(milliseconds) / 1000)


@dataclass(frozen=True)
class _DeviceTurn:
    """A turn that a device has not ended. spans: the events before and after its computing."""

    spans: list[tuple[Any, Any]]
    end: Any
    report: ReportTurn


def _record_event() -> Any:
    """Return an event on the current stream. Whoever waits for it sleeps and does not poll."""
    event = torch.cuda.Event(enable_timing=True, blocking=True)
    event.record()
    return event


def device_time_s() -> float:
    """Return the clock's seconds once this process's GPU, if it uses one, has no work left.

    Only differences of two results have a meaning. Without a GPU it does not wait.
    """
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the allocator's peak on a GPU, and this process's largest resident set on the CPU.

    Both count from the start of the process, or from the reset of a GPU's statistics.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

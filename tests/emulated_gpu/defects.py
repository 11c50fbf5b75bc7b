"""Planted defects: each takes one wait, one buffer or one order away, and must be reported.

Results seldom show them: on most days the device is fast enough.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from localpipe.data import batches
from localpipe.pipeline.channels import message
from localpipe.pipeline.channels import nccl as nccl_channel
from localpipe.pipeline.channels.message import Message
from localpipe.pipeline.stages import replicas
from localpipe.pipeline.workers import device, meter

# Its functions are replaced, also those that it imports.
nccl: Any = nccl_channel

_DEFECTS: dict[str, Callable[[], None]] = {}


def plant(name: str) -> None:
    """Plant one defect into this process."""
    _DEFECTS[name]()


def defect_names() -> Mapping[str, str]:
    """Return what each defect is, by its name."""
    return {name: (function.__doc__ or "").strip() for name, function in _DEFECTS.items()}


def _defect(function: Callable[[], None]) -> Callable[[], None]:
    _DEFECTS[function.__name__] = function
    return function


class _UnawaitedEvent:
    """An event that streams wait for and the host does not."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def synchronize(self) -> None:
        """Do not wait."""

    def wait(self, stream: Any = None) -> None:
        """Let a stream wait, as the event does."""
        self._event.wait(stream)


@functools.cache
def _other_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


# -- edges --------------------------------------------------------------------------------------


@_defect
def slot_received_too_early() -> None:
    """A receive is posted before its slot has been read."""
    original = nccl.NcclReceiver._post_receive
    nccl.NcclReceiver._post_receive = lambda self, consumed: original(self, None)


@_defect
def slot_sent_too_early() -> None:
    """A slot is filled again while its last message is being sent."""
    nccl.NcclSender._wait_for_transfer = lambda self, slot: None


@_defect
def event_before_transfer() -> None:
    """The event of a transfer is recorded before the transfer."""

    def record(work: Any, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(blocking=True)
        event.record(stream)
        return event

    nccl._record_after = record


@_defect
def header_copied_too_early() -> None:
    """A header is copied to the host without a wait for its transfer."""
    original = nccl.guard

    class _Unawaited:
        def __init__(self, work: Any) -> None:
            self._work = work

        def wait(self) -> None:
            """Do not wait."""

    def guard(neighbour: str, call: Callable[[], Any]) -> Any:
        return _Unawaited(original(neighbour, call))

    nccl.guard = guard


@_defect
def header_read_too_early() -> None:
    """The host reads a header before it was copied."""
    original = nccl.NcclReceiver._post_receive
    nccl.NcclReceiver._post_receive = lambda self, consumed: _UnawaitedEvent(
        original(self, consumed)
    )


@_defect
def one_slot_for_two_messages() -> None:
    """Two messages are received into one slot."""
    original = nccl.NcclReceiver.__init__

    def __init__(self: Any, endpoint: Any) -> None:  # noqa: N807
        original(self, endpoint)
        self._ring = self._ring[:1] * 2

    nccl.NcclReceiver.__init__ = __init__


@_defect
def one_header_for_all_slots() -> None:
    """All slots stage their headers in one place on the host."""
    original = message.Slot.__init__
    shared: list[Tensor] = []

    @functools.wraps(original)
    def __init__(self: Any, *arguments: Any, **options: Any) -> None:  # noqa: N807
        original(self, *arguments, **options)
        shared.append(self._packed_header)
        if self.bytes.is_cuda:
            self._packed_header = shared[0]

    message.Slot.__init__ = __init__  # type: ignore[method-assign]


@_defect
def message_written_on_another_stream() -> None:
    """A message is copied out on a stream that does not wait for the stage."""
    original = nccl.write_message

    def write(*arguments: Any) -> None:
        with torch.cuda.stream(_other_stream()):
            original(*arguments)
        torch.cuda.current_stream().wait_stream(_other_stream())

    nccl.write_message = write


@_defect
def slot_called_free_by_another_stream() -> None:
    """That a slot has been read is said by a stream that does not read it."""
    original = nccl.NcclReceiver.receive

    def receive(self: Any) -> Message:
        with torch.cuda.stream(self._arrivals):
            received: Message = original(self)
            return received

    nccl.NcclReceiver.receive = receive


# -- batches, losses, gradients and graphs ------------------------------------------------------


@_defect
def one_pinned_buffer_for_two_batches() -> None:
    """The loader reads every batch into the same pinned memory."""
    buffers: dict[str, Tensor] = {}

    def pin(self: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        results = {}
        for name, tensor in tensors.items():
            if name not in buffers:
                buffers[name] = torch.empty_like(tensor, pin_memory=True)
            results[name] = buffers[name][: len(tensor)]
            results[name].copy_(tensor)
        return results

    batches.BatchReader._pin = pin  # type: ignore[method-assign]


@_defect
def batch_copied_on_another_stream() -> None:
    """A batch is copied to the device on a stream that nobody waits for."""
    original = device.Upload.receive

    def receive(self: Any) -> Message:
        with torch.cuda.stream(_other_stream()):
            return original(self)

    device.Upload.receive = receive  # type: ignore[method-assign]


@_defect
def loss_read_too_early() -> None:
    """A loss is read before it has come from the device."""
    meter._Arrival.is_on_host = True  # type: ignore[assignment,method-assign]


@_defect
def gradients_used_too_early() -> None:
    """Summed gradients are used without a wait for their collective."""

    def run(self: Any, start: Callable[[], Any]) -> None:
        start()

    replicas.Replicas._run_collective = run  # type: ignore[method-assign]


@_defect
def graph_replayed_on_another_stream() -> None:
    """A graph is replayed on a stream that does not wait for its input."""
    original = torch.cuda.CUDAGraph.replay

    def replay(self: Any) -> None:
        with torch.cuda.stream(_other_stream()):
            original(self)

    torch.cuda.CUDAGraph.replay = replay  # type: ignore[method-assign]


@_defect
def warm_up_not_awaited() -> None:
    """The steps before a capture run on a stream that the stage does not wait for."""

    stream: Any = torch.cuda.Stream
    stream.wait_stream = lambda self, other: None

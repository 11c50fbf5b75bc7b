"""The NCCL back end: edges between two GPUs, each over a two-rank group of its own.

    compute stream ── copy ──▶ ring of depth + 1 ══ NCCL ══▶ two slots ── event ──▶ compute stream
                               (host waits for the slot's                (host waits for the header,
                                last send, depth sends ago)               compute for its message)

The copy into the ring runs on the compute stream and stays on the device. So no other stream ever
reads what the stage may free or overwrite. A receive is posted as soon as the message before the
present one has been consumed: one ahead, never more, since a waiting receive occupies the device.
The host reads 128 bytes of header after the receive. On the slowest stage that wait costs nothing:
the next message arrives while the kernels of the present step run.

One message is one buffer and one transfer. Nothing here has a timeout: the watchdog detects dead
workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from localpipe.pipeline.channels.channel import (
    RECEIVE_SLOTS,
    ChannelBackend,
    Endpoint,
    compare_facts,
    guard,
    read_message,
    write_message,
)
from localpipe.pipeline.channels.groups import connect_nccl, nccl_facts
from localpipe.pipeline.channels.message import Flag, Header, Message, Slot
from localpipe.pipeline.channels.streams import take_stream


class NcclSender:
    """The sending end of an edge between two GPUs.

    The constructor waits for the receiver. It raises RunError if the two ends differ, and UserError
    if torch has no NCCL inside.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        schema, device = endpoint.schema, endpoint.device
        self._neighbour = endpoint.neighbour
        compare_facts(endpoint, "sender", "receiver")
        self._ring = [Slot(schema, device) for _ in range(endpoint.depth + 1)]
        self._transferred: list[torch.cuda.Event | None] = [None] * len(self._ring)
        self._event_stream = take_stream(device)
        self._next = 0
        with endpoint.mark_connect():
            self._group = connect_nccl(endpoint.store, 0, 2, device, is_edge=True)
            _connect(lambda probe: self._group.send([probe], 1, 0), device)

    def send(self, header: Header, fields: Mapping[str, Tensor]) -> None:
        """Copy a message out and wait while `depth` messages are in flight.

        The copy runs on the current stream, and the host waits. Raises RunError if the message does
        not fit. Raises NeighbourLostError if NCCL refuses the send. A receiver that hangs leaves
        the wait without end.
        """
        slot = self._next % len(self._ring)
        self._wait_for_transfer(slot)
        write_message(self._ring[slot], header, fields, self._neighbour)
        work = guard(self._neighbour, lambda: self._group.send([self._ring[slot].bytes], 1, 0))
        self._transferred[slot] = _record_after(work, self._event_stream)
        self._next += 1

    def close(self) -> None:
        """Wait until the receiver has taken every message, without a timeout."""
        for slot in range(len(self._ring)):
            self._wait_for_transfer((self._next + slot) % len(self._ring))

    def _wait_for_transfer(self, slot: int) -> None:
        event, self._transferred[slot] = self._transferred[slot], None
        if event is not None:
            event.synchronize()


class NcclReceiver:
    """The receiving end of an edge between two GPUs.

    The constructor waits for the sender. It raises RunError if the two ends differ, and UserError
    if torch has no NCCL inside.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        schema, device = endpoint.schema, endpoint.device
        self._neighbour, self._device = endpoint.neighbour, device
        compare_facts(endpoint, "receiver", "sender")
        self._ring = [Slot(schema, device) for _ in range(RECEIVE_SLOTS)]
        self._headers = [
            torch.empty_like(slot.header_bytes, device="cpu").pin_memory() for slot in self._ring
        ]
        self._arrivals = take_stream(device)
        self._next = 0
        # No receive is posted before the loop. Other edges are still being made, and their
        # allocations may wait for the whole device, where a posted receive ends with its message.
        self._arrived: torch.cuda.Event | None = None
        with endpoint.mark_connect():
            self._group = connect_nccl(endpoint.store, 1, 2, device, is_edge=True)
            _connect(lambda probe: self._group.recv([probe], 0, 0), device)

    def receive(self) -> Message:
        """Wait for the next message: windows on a slot of the device, valid until the next receive.

        The current stream waits for the transfer. The host waits for the header, without a timeout.
        Call it on the stream that reads the message before. Raises RunError if the message is not
        of this edge, and NeighbourLostError if NCCL refuses the receive.
        """
        # All kernels that read the message before this one are launched: its slot is free after
        # this event.
        consumed = torch.cuda.current_stream(self._device).record_event()
        arrived = self._arrived or self._post_receive(None)
        arrived.synchronize()
        torch.cuda.current_stream(self._device).wait_event(arrived)
        slot = self._next % len(self._ring)
        message = read_message(self._ring[slot], self._neighbour, self._headers[slot])
        self._next += 1
        if not message.header.flags & Flag.STOP:
            self._arrived = self._post_receive(consumed)
        return message

    def _post_receive(self, consumed: torch.cuda.Event | None) -> torch.cuda.Event:
        slot = self._next % len(self._ring)
        with torch.cuda.stream(self._arrivals):
            if consumed is not None:
                self._arrivals.wait_event(consumed)
            work = guard(self._neighbour, lambda: self._group.recv([self._ring[slot].bytes], 0, 0))
            work.wait()  # this stream waits for the transfer; the host goes on
            self._headers[slot].copy_(self._ring[slot].header_bytes, non_blocking=True)
            event = torch.cuda.Event(blocking=True)
            event.record(self._arrivals)
        return event


def _record_after(work: Any, stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Return an event after a transfer, on a stream of its own.

    Waiting for the transfer on the compute stream would serialise the two.
    """
    event = torch.cuda.Event(blocking=True)
    with torch.cuda.stream(stream):
        work.wait()
        event.record(stream)
    return event


def _connect(exchange: Any, device: torch.device) -> None:
    """Exchange one small tensor, so that all edges connect before the loop, in their order."""
    probe = torch.zeros(32, dtype=torch.uint8, device=device)
    exchange(probe).wait()
    torch.cuda.synchronize(device)


def transfer(group: Any, tensor: Tensor, rank: int, sender: int) -> None:
    """Send a tensor from one rank of a two-rank group to the other. Both ranks call this.

    rank, sender: 0 or 1. On the other rank the tensor is filled in place, and has the same shape
    and dtype. Over gloo the host waits, over NCCL only the current stream does. torch's
    RuntimeError passes through.
    """
    if rank == sender:
        work = group.send([tensor], 1 - sender, 0)
    else:
        work = group.recv([tensor], sender, 0)
    work.wait()


NCCL = ChannelBackend(
    name="nccl",
    device_types=("cuda",),
    needs_own_device=True,
    open_sender=NcclSender,
    open_receiver=NcclReceiver,
    state_facts=nccl_facts,
)

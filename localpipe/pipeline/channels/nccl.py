"""The queue between two GPUs: one two-rank NCCL group for a directed edge, fixed rings, and events for accounting.

    compute stream ── copy ──▶ ring of depth + 1 ══ NCCL ══▶ two slots ── event ──▶ compute stream
                               (host waits for the slot's                (host waits for the header,
                                last send, depth sends ago)               compute for its own message)

The copy into the ring runs on the compute stream, a device-to-device copy, so that no other stream ever reads what the
stage may free or overwrite. A receive is posted as soon as the message before the present one has been consumed: one
ahead, never more, since a waiting receive occupies the device. The host reads 128 bytes of header behind the receive; that
wait is behind the present step's kernels on the slowest stage, whose next message has come while it computes.

One message is one buffer and one transfer. Nothing here is ever timed out: liveness is watched apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from localpipe.fields import Schema
from localpipe.pipeline.channels.channel import compare_facts, guard, read_message, write_message
from localpipe.pipeline.channels.groups import connect_nccl
from localpipe.pipeline.channels.message import Flag, Header, Message, Slot


class NcclSender:
    """The sending end of an edge between two GPUs."""

    def __init__(
        self,
        store: dist.Store,
        schema: Schema,
        depth: int,
        peer: str,
        device: torch.device,
        facts: Mapping[str, Any],
    ) -> None:
        self._peer = peer
        compare_facts(store, "sender", "receiver", schema, peer, facts)
        self._group = connect_nccl(store, 0, 2, device)
        self._ring = [Slot(schema, device) for _ in range(depth + 1)]
        self._gone: list[torch.cuda.Event | None] = [None] * len(self._ring)
        self._accounts = torch.cuda.Stream(device)
        self._next = 0
        _connect(lambda probe: self._group.send([probe], 1, 0), device)

    def send(self, header: Header, fields: Mapping[str, Tensor]) -> None:
        slot = self._next % len(self._ring)
        self._finish(slot)
        write_message(self._ring[slot], header, fields, self._peer)
        work = guard(self._peer, lambda: self._group.send([self._ring[slot].bytes], 1, 0))
        self._gone[slot] = _recorded_behind(work, self._accounts)
        self._next += 1

    def close(self) -> None:
        for slot in range(len(self._ring)):
            self._finish((self._next + slot) % len(self._ring))

    def _finish(self, slot: int) -> None:
        event, self._gone[slot] = self._gone[slot], None
        if event is not None:
            event.synchronize()


class NcclReceiver:
    """The receiving end of an edge between two GPUs."""

    def __init__(
        self,
        store: dist.Store,
        schema: Schema,
        peer: str,
        device: torch.device,
        facts: Mapping[str, Any],
    ) -> None:
        self._peer, self._device = peer, device
        compare_facts(store, "receiver", "sender", schema, peer, facts)
        self._group = connect_nccl(store, 1, 2, device)
        self._ring = (Slot(schema, device), Slot(schema, device))
        self._headers = [
            torch.empty_like(slot.header_bytes, device="cpu").pin_memory() for slot in self._ring
        ]
        self._arrivals = torch.cuda.Stream(device)
        self._next = 0
        # Nothing is posted before the loop: other edges are still being made, and what they allocate may wait for the
        # whole device, where a posted receive ends only with its message.
        self._arrived: torch.cuda.Event | None = None
        _connect(lambda probe: self._group.recv([probe], 0, 0), device)

    def receive(self) -> Message:
        # Everything that reads the message before this one has been launched by now, so its slot is free behind this event.
        consumed = torch.cuda.current_stream(self._device).record_event()
        arrived = self._arrived or self._post(None)
        arrived.synchronize()
        torch.cuda.current_stream(self._device).wait_event(arrived)
        slot = self._next % 2
        message = read_message(self._ring[slot], self._peer, self._headers[slot])
        self._next += 1
        if not message.header.flags & Flag.STOP:
            self._arrived = self._post(consumed)
        return message

    def _post(self, free: torch.cuda.Event | None) -> torch.cuda.Event:
        slot = self._next % 2
        with torch.cuda.stream(self._arrivals):
            if free is not None:
                self._arrivals.wait_event(free)
            work = guard(self._peer, lambda: self._group.recv([self._ring[slot].bytes], 0, 0))
            work.wait()  # of this stream for the transfer; the host goes on
            self._headers[slot].copy_(self._ring[slot].header_bytes, non_blocking=True)
            event = torch.cuda.Event(blocking=True)
            event.record(self._arrivals)
        return event


def _recorded_behind(work: Any, stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Return an event behind a transfer, on a stream of its own: waiting for it on the compute stream would serialise."""
    event = torch.cuda.Event(blocking=True)
    with torch.cuda.stream(stream):
        work.wait()
        event.record(stream)
    return event


def _connect(exchange: Any, device: torch.device) -> None:
    """Exchange one small tensor, so that connections are made before the loop, in the order of the edges."""
    probe = torch.zeros(32, dtype=torch.uint8, device=device)
    exchange(probe).wait()
    torch.cuda.synchronize(device)

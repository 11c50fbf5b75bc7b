"""Bounded, ordered, asynchronous queues of messages, one for every directed edge, and their twin inside one process.

    sender                                   receiver
    ring of `depth` slots  ── gloo, FIFO ──▶  two slots: one being read, one receive posted ahead

A send copies the message into the next slot and returns; it waits only where the slot's last message, `depth` sends ago,
has not been taken yet. Edges have no timeout of their own. Nothing here knows of a world group: an edge is made from a
store, a name and a generation number.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from localpipe.errors import RunError
from localpipe.mesh import gloo_group
from localpipe.message import VERSION, Flag, Header, Message, Mismatch, Schema, Slot
from localpipe.peer import guard


class Outbox(Protocol):
    """The sending end of an edge."""

    def send(self, header: Header, fields: Mapping[str, Tensor]) -> None:
        """Copy a message out; wait while `depth` messages are in flight."""

    def close(self) -> None:
        """Wait until everything sent has been taken."""


class Inbox(Protocol):
    """The receiving end of an edge."""

    def receive(self) -> Message:
        """Wait for the next message. Its tensors are read-only and valid until the next receive."""


class MemoryChannel:
    """Both ends inside one process: the same bytes through the same slots, without a wire."""

    def __init__(self, schema: Schema, depth: int, device: torch.device | str = "cpu") -> None:
        self._ring = [Slot(schema, device) for _ in range(depth + 1)]
        self._headers: deque[Header] = deque()
        self._sent = self._received = 0

    def send(self, header: Header, fields: Mapping[str, Tensor]) -> None:
        assert self._sent - self._received < len(self._ring) - 1 or self._received == self._sent, (
            "the reader is behind"
        )
        self._ring[self._sent % len(self._ring)].write(header, fields)
        self._headers.append(header)  # so that nobody waits for a device to read it back
        self._sent += 1

    def receive(self) -> Message:
        assert self._received < self._sent, "stages of one process run in order"
        message = self._ring[self._received % len(self._ring)].message(self._headers.popleft())
        self._received += 1
        return message

    def close(self) -> None:
        """Nothing is ever left in flight."""


class GlooSender:
    """The sending end of an edge between two processes. What comes from a device is copied to the host and waited for."""

    def __init__(
        self,
        store: dist.Store,
        schema: Schema,
        depth: int,
        peer: str,
        local: bool,
        facts: Mapping[str, Any],
    ) -> None:
        self._peer = peer
        shake_hands(store, "sender", "receiver", schema, peer, facts)
        self._group = gloo_group(store, 0, 2, local)
        self._ring = [Slot(schema) for _ in range(depth)]
        # gloo writes to the socket in the thread that sends, until the socket is full: a thread of its own, so that the
        # stage goes on at once. It drops a message whose handle is dropped, so the handles live as long as their slots.
        self._thread = ThreadPoolExecutor(1, "sender")
        self._sending: deque[Future[Any]] = deque()  # one for every message in flight
        self._next = 0

    def send(self, header: Header, fields: Mapping[str, Tensor]) -> None:
        self._finish(len(self._ring) - 1)
        slot = self._ring[self._next % len(self._ring)]
        fill(slot, header, fields, self._peer)
        self._sending.append(self._thread.submit(self._group.send, [slot.bytes], 1, 0))
        self._next += 1

    def close(self) -> None:
        self._finish(0)

    def _finish(self, left: int) -> None:
        """Wait until no more than so many messages are in flight."""
        while len(self._sending) > left:
            work = guard(self._peer, self._sending.popleft().result)
            guard(self._peer, work.wait)


class GlooReceiver:
    """The receiving end of an edge between two processes; messages arrive on the host and go on to `device`."""

    def __init__(
        self,
        store: dist.Store,
        schema: Schema,
        peer: str,
        local: bool,
        facts: Mapping[str, Any],
        device: torch.device | str = "cpu",
    ) -> None:
        self._peer, self._device = peer, torch.device(device)
        shake_hands(store, "receiver", "sender", schema, peer, facts)
        self._group = gloo_group(store, 1, 2, local)
        self._ring = (Slot(schema), Slot(schema))
        self._next = 0
        self._posted = self._post()

    def receive(self) -> Message:
        guard(self._peer, self._posted.wait)
        message = opened(self._ring[self._next % 2], self._peer)
        self._next += 1
        if (
            not message.header.flags & Flag.STOP
        ):  # nothing follows a stop, and gloo cannot take a receive back
            self._posted = self._post()
        return moved(message, self._device)

    def _post(self) -> Any:
        into = self._ring[self._next % 2].bytes
        return guard(self._peer, lambda: self._group.recv([into], 0, 0))


def fill(slot: Slot, header: Header, fields: Mapping[str, Tensor], peer: str) -> None:
    """Copy a message into a slot; what does not fit the edge is told with the receiver's name."""
    try:
        slot.write(header, fields)
    except Mismatch as error:
        raise RunError(f"message to {peer}: {error}") from None


def opened(slot: Slot, peer: str, header_bytes: Tensor | None = None) -> Message:
    """Return the message in a slot; what is not the edge's is told with the sender's name."""
    try:
        return slot.read(header_bytes)
    except Mismatch as error:
        raise RunError(
            f"message from {peer}: {error}; do both run the same version and configuration?"
        ) from None


def moved(message: Message, device: torch.device) -> Message:
    """Return a message on a stage's device; the host waits for the copy, since the slot is filled again."""
    if device.type == "cpu":
        return message
    return Message(
        message.header, {name: tensor.to(device) for name, tensor in message.fields.items()}
    )


def shake_hands(
    store: dist.Store,
    own_side: str,
    other_side: str,
    schema: Schema,
    peer: str,
    facts: Mapping[str, Any],
) -> None:
    """Compare what both ends of an edge believe, field by field, before the first message."""
    fields = {
        f"field {i}": f"{f.name} {list(f.shape)} {f.dtype}" for i, f in enumerate(schema.fields)
    }
    mine = {
        "message version": VERSION,
        "batch": schema.batch,
        **fields,
        "memory format": "contiguous",
        **facts,
    }
    mine = json.loads(json.dumps(mine))
    store.set(own_side, json.dumps(mine))
    theirs = json.loads(store.get(other_side))
    for key in [*mine, *(key for key in theirs if key not in mine)]:
        if mine.get(key) != theirs.get(key):
            raise RunError(
                f"handshake with {peer}: {key} is {theirs.get(key)!r} there, expected {mine.get(key)!r}; "
                "start every worker with the same version and configuration"
            )

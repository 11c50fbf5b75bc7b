"""Outbox and Inbox, their twin inside one process, and what every channel shares: handshake and guard."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from localpipe.errors import PeerLostError, RunError
from localpipe.fields import VERSION, Schema
from localpipe.pipeline.channels.message import Header, Message, Mismatch, Slot


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


def write_message(slot: Slot, header: Header, fields: Mapping[str, Tensor], peer: str) -> None:
    """Copy a message into a slot; what does not fit the edge is told with the receiver's name."""
    try:
        slot.write(header, fields)
    except Mismatch as error:
        raise RunError(f"message to {peer}: {error}") from None


def read_message(slot: Slot, peer: str, header_bytes: Tensor | None = None) -> Message:
    """Return the message in a slot; what is not the edge's is told with the sender's name."""
    try:
        return slot.read(header_bytes)
    except Mismatch as error:
        raise RunError(
            f"message from {peer}: {error}; do both run the same version and configuration?"
        ) from None


def move_to_device(message: Message, device: torch.device) -> Message:
    """Return a message on a stage's device; the host waits for the copy, since the slot is filled again."""
    if device.type == "cpu":
        return message
    return Message(
        message.header, {name: tensor.to(device) for name, tensor in message.fields.items()}
    )


def compare_facts(
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


T = TypeVar("T")
_OWN_DEVICE = (torch.AcceleratorError, torch.OutOfMemoryError)


def guard(peer: str, call: Callable[[], T]) -> T:
    """Run a call to a peer; raise PeerLostError in place of what torch raises when the peer is gone."""
    try:
        return call()
    except _OWN_DEVICE:
        raise
    except RuntimeError as error:
        raise PeerLostError(f"lost {peer}: {str(error).splitlines()[0]}") from None

"""Outbox and Inbox, the channel inside one process, and the spec of a back end.

Every channel between processes uses the same handshake, checks and error translation.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from localpipe.config import registry
from localpipe.errors import NeighbourLostError, RunError, first_line
from localpipe.fields import VERSION, Schema, describe_order
from localpipe.pipeline.channels.message import Header, Message, Mismatch, Slot

RECEIVE_SLOTS = 2  # one message being read, one receive posted ahead


class Outbox(Protocol):
    """The sending end of an edge."""

    def send(self, header: Header, fields: Mapping[str, Tensor]) -> None:
        """Copy a message out and wait while `depth` messages are in flight.

        header.count: the rows of every tensor. fields: tensors by the schema's names, in its
        dtypes. They may change after the return. Others are ignored. Only an evaluation message may
        lack some.
        Raises RunError if the message does not fit the edge. Raises NeighbourLostError if the
        connection is lost, perhaps only in a later call.
        """

    def close(self) -> None:
        """Wait until the receiver has taken every message. A second call returns at once.

        Raises NeighbourLostError if the connection is lost.
        """


class Inbox(Protocol):
    """The receiving end of an edge."""

    def receive(self) -> Message:
        """Wait for the next message. Its tensors are read-only and valid until the next receive.

        The fields have the schema's names and shapes (header.count, *shape). What an evaluation
        message was sent without has undefined values. Do not call it after a message with
        Flag.STOP.
        Raises RunError if the message is not of this edge. Raises NeighbourLostError if the
        connection is lost.
        """


@dataclass(frozen=True)
class Endpoint:
    """What one end of an edge is opened with.

    store: the part of the run's store that belongs to this edge. schema: the fields of a message.
    depth: the most messages in flight. neighbour: the other end's name, for errors. device: where
    the stage computes. is_local: whether both ends are on one machine. facts: JSON values that both
    ends must have in common, beside schema and message version. mark_connect: makes the context in
    which both ends connect, after each has found the other.
    """

    store: dist.Store
    schema: Schema
    depth: int
    neighbour: str
    device: torch.device
    is_local: bool
    facts: Mapping[str, Any]
    mark_connect: Callable[[], AbstractContextManager[None]] = nullcontext


def _state_no_facts() -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True)
class ChannelBackend:
    """How the edges of one back end are opened, and for which stages.

    device_types: types of device that stages may compute on, `cpu` and `cuda`. needs_own_device:
    whether two workers of one machine must have two devices. state_facts: returns JSON values of
    its library, which both ends must have in common. Both other functions wait for the other end
    and return when both are connected. They raise RunError if the two ends differ in schema or
    facts.
    """

    name: str
    device_types: tuple[str, ...]
    needs_own_device: bool
    open_sender: Callable[[Endpoint], Outbox]
    open_receiver: Callable[[Endpoint], Inbox]
    state_facts: Callable[[], Mapping[str, Any]] = _state_no_facts


def find_backend(name: str) -> ChannelBackend:
    """Return the back end of a name, `gloo` or `nccl`. Raises UserError for any other name."""
    backend: ChannelBackend = registry.look_up(registry.BACKENDS, name, "config: pipeline.backend")
    return backend


class MemoryChannel:
    """Both ends inside one process: the same bytes through the same slots, without a transfer.

    It holds at most `depth` messages that were not received. The slots are on `device`.
    """

    def __init__(self, schema: Schema, depth: int, device: torch.device | str = "cpu") -> None:
        self._ring = [Slot(schema, device) for _ in range(depth + 1)]
        self._headers: deque[Header] = deque()
        self._sent = 0
        self._received = 0

    def send(self, header: Header, fields: Mapping[str, Tensor]) -> None:
        """Copy a message into the next slot. It never waits.

        Raises Mismatch if the message does not fit the schema. Raises AssertionError if `depth`
        messages are not received yet.
        """
        in_flight = self._sent - self._received
        assert in_flight < len(self._ring) - 1 or in_flight == 0, "the ring is full"
        self._ring[self._sent % len(self._ring)].write_fields(header, fields)
        # The header is kept on the host, so that no device has to be waited for: neither to read
        # it, nor before the pinned memory that it is copied from is written again.
        self._headers.append(header)
        self._sent += 1

    def receive(self) -> Message:
        """Return the oldest message that was not received yet. It never waits.

        Its header is the object that was sent. Its tensors are windows on the slot, on the
        channel's device. Raises AssertionError if every message was received.
        """
        assert self._received < self._sent, "stages of one process run in order"
        message = self._ring[self._received % len(self._ring)].message(self._headers.popleft())
        self._received += 1
        return message

    def close(self) -> None:
        """Do nothing: no message is ever left in flight."""


def write_message(slot: Slot, header: Header, fields: Mapping[str, Tensor], neighbour: str) -> None:
    """Copy a message into a slot, as `Slot.write` does.

    neighbour: the receiver's name for the error. Raises RunError in place of `Mismatch`.
    """
    try:
        slot.write(header, fields)
    except Mismatch as error:
        raise RunError(f"message to {neighbour}: {error}") from None


def read_message(slot: Slot, neighbour: str, header_bytes: Tensor | None = None) -> Message:
    """Return the message in a slot, as windows on the slot.

    neighbour: the sender's name for the error. header_bytes: a copy of the header on the host, if
    the slot is on a device. Raises RunError if the header is not of this edge.
    """
    try:
        return slot.read(header_bytes)
    except Mismatch as error:
        raise RunError(
            f"message from {neighbour}: {error}; do both run the same version and configuration?"
        ) from None


def move_to_device(message: Message, device: torch.device) -> Message:
    """Return a message on a stage's device: on the CPU the same object, without a copy.

    For a GPU it is a new message with the same header. The host waits for the copy, since the
    message's slot is filled again.
    """
    if device.type == "cpu":
        return message
    fields = {name: tensor.to(device) for name, tensor in message.fields.items()}
    return Message(message.header, fields)


def compare_facts(endpoint: Endpoint, own_side: str, other_side: str) -> None:
    """Exchange schema, message version and facts with the other end. Waits for the other end.

    own_side, other_side: the keys of the two ends in the edge's store, `sender` and `receiver`.
    Values are compared as JSON, and a missing one equals None. Raises RunError for the first fact
    that differs. Raises TypeError if a fact is no JSON value.
    """
    schema = endpoint.schema
    local: dict[str, Any] = {"message version": VERSION, **_state_schema(schema, "")}
    if schema.evaluation is not None:
        local.update(_state_schema(schema.evaluation, "evaluation "))
    local["memory format"] = "contiguous"
    local.update(endpoint.facts)
    exchange_facts(endpoint.store, local, own_side, other_side, endpoint.neighbour)


def _state_schema(schema: Schema, prefix: str) -> dict[str, Any]:
    """Return the batch and the fields of a schema as JSON values, their names after a prefix."""
    facts: dict[str, Any] = {f"{prefix}batch": schema.batch}
    for i, field in enumerate(schema.fields):
        text = f"{field.name} {list(field.shape)} {field.dtype} {describe_order(field)}"
        facts[f"{prefix}field {i}"] = text.rstrip()
    return facts


def exchange_facts(
    store: dist.Store, facts: Mapping[str, Any], own_side: str, other_side: str, neighbour: str
) -> None:
    """Publish facts and compare them with those of another worker. Waits for that worker.

    own_side, other_side: the keys of the two workers in `store`. neighbour: the other's name.
    Errors are those of `compare_facts`.
    """
    # The neighbour's facts arrive as JSON, where a tuple is a list, so both are compared as JSON.
    text = json.dumps(dict(facts))
    local = json.loads(text)
    store.set(own_side, text)
    remote = json.loads(store.get(other_side))

    # The local order first, then what only the neighbour states: another version may send more.
    only_remote = [key for key in remote if key not in local]
    for key in [*local, *only_remote]:
        if local.get(key) != remote.get(key):
            raise RunError(
                f"handshake with {neighbour}: {key} is {remote.get(key)!r} there, "
                f"expected {local.get(key)!r}; "
                "start every worker with the same version and configuration"
            )


T = TypeVar("T")
_DEVICE_ERRORS = (torch.AcceleratorError, torch.OutOfMemoryError)


def guard(neighbour: str, call: Callable[[], T]) -> T:
    """Return the result of a call that communicates with a neighbour.

    Raises NeighbourLostError in place of any RuntimeError, which torch raises when the connection
    is lost. Errors of this process's own device, and errors of other types, pass through.
    """
    try:
        return call()
    except _DEVICE_ERRORS:
        raise
    except RuntimeError as error:
        raise NeighbourLostError(f"lost {neighbour}: {first_line(error)}") from None

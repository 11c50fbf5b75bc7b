"""Edges inside one machine: a ring of messages in shared memory, and two pipes that count them.

    sender ── fills slot n ──▶ ring of depth + 2 ──▶ reads slot n ── receiver
           ── a byte for every message ───────────▶
           ◀── a byte for every request ───────────

Only the two ends are woken: gloo would have a thread at either end, and a byte there and back, for
every message. A pipe ends when its other side does. So a lost neighbour is noticed at once, after
every message that it sent.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from localpipe.errors import NeighbourLostError
from localpipe.fields import Schema
from localpipe.files import PrivateFolder
from localpipe.pipeline.channels.channel import (
    RECEIVE_SLOTS,
    ChannelBackend,
    Endpoint,
    compare_facts,
    move_to_device,
    read_message,
    write_message,
)
from localpipe.pipeline.channels.message import Flag, Header, Message, Slot

SHARED_MEMORY_DIR = "/dev/shm"
_PREFIX = "localpipe-edge-"
_KEY = "ring"  # of the edge's store: the folder and the number of slots, or null
_BYTE = b"\0"
_READ_SIZE = 4096  # the most bytes that one read takes out of a pipe


class NoRoom(Exception):  # noqa: N818 - not an error: gloo carries the edge instead
    """This machine has no room for a ring in shared memory."""


class RingSender:
    """The sending end. A slot is free again when the message after its own has been requested.

    The constructor waits for the receiver. Raises NoRoom if the ring cannot be allocated. The
    receiver then raises it too. Raises RunError if the two ends differ.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._neighbour, self._depth = endpoint.neighbour, endpoint.depth
        schema, slots = endpoint.schema, endpoint.depth + RECEIVE_SLOTS
        compare_facts(endpoint, "sender", "receiver")
        with _create_ring(endpoint.store, schema, slots) as folder:
            self._ring = _map_ring(folder, schema, slots)
            # Each open waits for the other end's, in the same order there. After that the names
            # are not needed, and the context deletes them.
            self._filled = FileIO(folder / "filled", "w")
            self._requests = FileIO(folder / "asked")
        self._sent = 0
        self._received = 0

    def send(self, header: Header, fields: Mapping[str, Tensor]) -> None:
        """Copy a message into the ring and wait while `depth` messages are in flight.

        Raises RunError if the message does not fit, and NeighbourLostError if the receiver's
        process has ended.
        """
        self._wait_until_in_flight(self._depth)
        slot = self._ring[self._sent % len(self._ring)]
        write_message(slot, header, fields, self._neighbour)
        try:
            self._filled.write(_BYTE)
        except OSError as error:
            raise NeighbourLostError(f"lost {self._neighbour}: {error.strerror}") from None
        self._sent += 1

    def close(self) -> None:
        """Wait until the receiver has taken every message but the last.

        The last one stays readable after this process has ended. Raises NeighbourLostError if the
        receiver has ended with more messages left.
        """
        self._wait_until_in_flight(1)

    def _wait_until_in_flight(self, count: int) -> None:
        """Wait until at most `count` messages are not received; the oldest of them is requested."""
        while self._sent - self._received > count:
            self._received += len(_read_pipe(self._requests, self._neighbour, _READ_SIZE))


class RingReceiver:
    """The receiving end. A message is a window on the ring, or a copy on the stage's device.

    The constructor waits for the sender. Raises NoRoom if the sender could not allocate the ring.
    Raises RunError if the two ends differ.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._neighbour, self._device = endpoint.neighbour, endpoint.device
        compare_facts(endpoint, "receiver", "sender")
        ring = json.loads(endpoint.store.get(_KEY))
        if ring is None:
            raise NoRoom
        folder, slots = Path(ring[0]), ring[1]
        self._ring = _map_ring(folder, endpoint.schema, slots)
        self._filled = FileIO(folder / "filled")
        self._requests = FileIO(folder / "asked", "w")
        self._next = 0

    def receive(self) -> Message:
        """Wait for the next message. On the CPU it is valid until the next receive.

        Raises RunError if the message is not of this edge. Raises NeighbourLostError if the sender
        has ended, after every message that it sent was received.
        """
        _read_pipe(self._filled, self._neighbour, 1)
        message = read_message(self._ring[self._next % len(self._ring)], self._neighbour)
        self._next += 1
        if not message.header.flags & Flag.STOP:  # no message follows a stop
            # The messages of a lost sender are still good. The receive after them raises.
            with contextlib.suppress(BrokenPipeError):
                self._requests.write(_BYTE)
        return move_to_device(message, self._device)


# Both functions raise NoRoom where this machine has no room for the ring.
SHARED_MEMORY = ChannelBackend(
    name="shared memory",
    device_types=("cpu", "cuda"),
    needs_own_device=False,
    open_sender=RingSender,
    open_receiver=RingReceiver,
)


@contextlib.contextmanager
def _create_ring(store: dist.Store, schema: Schema, slots: int) -> Iterator[Path]:
    """Create a ring and its pipes in a folder that is deleted at the end of the context.

    The receiver reads the folder from the store.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(PrivateFolder(Path(SHARED_MEMORY_DIR), _PREFIX))
            with open(folder / "slots", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, slots * schema.nbytes)
            for name in ("filled", "asked"):
                os.mkfifo(folder / name, 0o600)
        except OSError:
            store.set(_KEY, json.dumps(None))
            raise NoRoom from None
        store.set(_KEY, json.dumps([str(folder), slots]))
        yield folder


def _map_ring(folder: Path, schema: Schema, slots: int) -> list[Slot]:
    size = slots * schema.nbytes
    memory = torch.from_file(str(folder / "slots"), shared=True, size=size, dtype=torch.uint8)
    return [Slot(schema, memory=part) for part in memory.split(schema.nbytes)]


def _read_pipe(pipe: FileIO, neighbour: str, size: int) -> bytes:
    """Wait for bytes of a pipe and return at most `size` of them."""
    content = pipe.read(size)
    if not content:
        raise NeighbourLostError(f"lost {neighbour}: its end of the pipe is closed")
    return content

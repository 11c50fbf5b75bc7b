"""The queue between two processes of one machine: a ring of messages in shared memory, and two pipes that count them.

    sender ── fills slot n ──▶ ring of depth + 2 ──▶ reads slot n ── receiver
           ── a byte for every message ──────────▶
           ◀── a byte for every one asked for ────

Nothing but the two ends is ever woken: gloo would have a thread at either end, and a byte there and back, for each message.
A pipe ends when its other side does, so a neighbour that is gone is noticed at once, behind everything that it sent.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from localpipe.errors import PeerLostError
from localpipe.fields import Schema
from localpipe.files import PrivateFolder
from localpipe.pipeline.channels.channel import (
    Inbox,
    Outbox,
    compare_facts,
    move_to_device,
    read_message,
    write_message,
)
from localpipe.pipeline.channels.gloo import GlooReceiver, GlooSender
from localpipe.pipeline.channels.message import Flag, Header, Message, Slot

SHARED = "/dev/shm"
_PREFIX = "localpipe-edge-"
_KEY = "ring"  # of the edge's store: the folder, or null
_BYTE = b"\0"
_MANY = 4096  # bytes that are taken out of a pipe at once


class NoRoom(Exception):  # noqa: N818 - no error: gloo carries the edge then
    """This machine has no room for a ring in shared memory."""


class RingSender:
    """The sending end. A slot is free again when the message behind the one in it has been asked for."""

    def __init__(
        self, store: dist.Store, schema: Schema, depth: int, peer: str, facts: Mapping[str, Any]
    ) -> None:
        self._peer, self._depth = peer, depth
        compare_facts(store, "sender", "receiver", schema, peer, facts)
        with _lent(store, schema, depth + 2) as folder:
            self._ring = _mapped(folder, schema, depth + 2)
            # Each open waits for the other end's, in the same order there; then the names may go.
            self._filled = FileIO(folder / "filled", "w")
            self._asked = FileIO(folder / "asked")
        self._sent = self._received = 0

    def send(self, header: Header, fields: Mapping[str, Tensor]) -> None:
        self._wait(self._depth)
        write_message(self._ring[self._sent % len(self._ring)], header, fields, self._peer)
        try:
            self._filled.write(_BYTE)
        except OSError as error:
            raise PeerLostError(f"lost {self._peer}: {error.strerror}") from None
        self._sent += 1

    def close(self) -> None:
        self._wait(1)

    def _wait(self, most: int) -> None:
        """Wait until no more than so many messages have not been received; the oldest of them has been asked for."""
        while self._sent - self._received > most:
            self._received += len(_taken(self._asked, self._peer, _MANY))


class RingReceiver:
    """The receiving end. What is received is a window on the ring, or a copy on the stage's `device`."""

    def __init__(
        self,
        store: dist.Store,
        schema: Schema,
        peer: str,
        facts: Mapping[str, Any],
        device: torch.device | str = "cpu",
    ) -> None:
        self._peer, self._device = peer, torch.device(device)
        compare_facts(store, "receiver", "sender", schema, peer, facts)
        told = json.loads(store.get(_KEY))
        if told is None:
            raise NoRoom
        folder, slots = Path(told[0]), told[1]
        self._ring = _mapped(folder, schema, slots)
        self._filled = FileIO(folder / "filled")
        self._asked = FileIO(folder / "asked", "w")
        self._next = 0

    def receive(self) -> Message:
        _taken(self._filled, self._peer, 1)
        message = read_message(self._ring[self._next % len(self._ring)], self._peer)
        self._next += 1
        if not message.header.flags & Flag.STOP:  # nothing follows a stop
            # What a sender that is gone left behind is still good; the receive behind it tells.
            with contextlib.suppress(BrokenPipeError):
                self._asked.write(_BYTE)
        return move_to_device(message, self._device)


def open_sender(
    store: dist.Store, schema: Schema, depth: int, peer: str, facts: Mapping[str, Any]
) -> Outbox:
    """Return the sending end of an edge on one machine: a ring, or gloo where there is no room for one."""
    try:
        return RingSender(store, schema, depth, peer, facts)
    except NoRoom:
        return GlooSender(store, schema, depth, peer, True, facts)


def open_receiver(
    store: dist.Store,
    schema: Schema,
    peer: str,
    facts: Mapping[str, Any],
    device: torch.device | str = "cpu",
) -> Inbox:
    """Return the receiving end of an edge on one machine: a ring, or gloo where there is no room for one."""
    try:
        return RingReceiver(store, schema, peer, facts, device)
    except NoRoom:
        return GlooReceiver(store, schema, peer, True, facts, device)


@contextlib.contextmanager
def _lent(store: dist.Store, schema: Schema, slots: int) -> Iterator[Path]:
    """Make a ring and its pipes in a folder that the receiver is told, and that is gone behind the context."""
    with contextlib.ExitStack() as kept:
        try:
            folder = kept.enter_context(PrivateFolder(Path(SHARED), _PREFIX))
            with open(folder / "slots", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, slots * schema.nbytes)
            for name in ("filled", "asked"):
                os.mkfifo(folder / name, 0o600)
        except OSError:
            store.set(_KEY, json.dumps(None))
            raise NoRoom from None
        store.set(_KEY, json.dumps([str(folder), slots]))
        yield folder


def _mapped(folder: Path, schema: Schema, slots: int) -> list[Slot]:
    memory = torch.from_file(
        str(folder / "slots"), shared=True, size=slots * schema.nbytes, dtype=torch.uint8
    )
    return [Slot(schema, memory=part) for part in memory.split(schema.nbytes)]


def _taken(pipe: FileIO, peer: str, most: int) -> bytes:
    """Wait for bytes of a pipe and return them, `most` at once."""
    some = pipe.read(most)
    if not some:
        raise PeerLostError(f"lost {peer}: its end of the pipe is closed")
    return some

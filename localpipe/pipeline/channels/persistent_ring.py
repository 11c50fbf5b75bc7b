"""Edges that outlive their ends: rings of messages in shared memory, made and kept by the launcher.

    sender    writes slot n mod R,   then published = n + 1,  then wakes the receiver
    receiver  begins message n:           taken = n + 1,      then wakes the sender
    receiver  its snapshot covers n:      saved = n + 1,      then wakes the sender

Messages are numbered from 0. The three counts stand in the ring, and each has one writer. A slot
is used again only when the receiver's snapshot covers its message, and at most `depth` messages are
not taken. So whichever end dies, its replacement finds what it needs: a receiver reads again from
its snapshot on, and a sender computes again what is published already, and does not write it.

A wake-up says nothing but "look at the counts": one too many is harmless, and a process that was
killed before it woke its neighbour is made good for by its replacement, which wakes both.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from localpipe.errors import RunError
from localpipe.fields import Schema
from localpipe.pipeline.channels.channel import move_to_device, read_message, write_message
from localpipe.pipeline.channels.message import Header, Kind, Message, Slot

_COUNTS_BYTES = 4096  # before the slots, a page of its own
_PUBLISHED, _TAKEN, _SAVED, _DIGEST = 0, 8, 16, 24  # in words of 8 bytes; a cache line for each
_READ_SIZE = 4096  # the most wake-ups that one read takes out of a pipe
_FILE, _TO_SENDER, _TO_RECEIVER = "ring", "to_sender", "to_receiver"


def ring_bytes(schema: Schema, slots: int) -> int:
    """Return the bytes of shared memory of a ring."""
    return _COUNTS_BYTES + slots * schema.nbytes


def create_ring(folder: Path, schema: Schema, slots: int) -> None:
    """Make a ring and its two wake-up pipes in a new folder, with all counts 0.

    Raises OSError if the folder is there, or without room for the ring.
    """
    folder.mkdir()
    size = ring_bytes(schema, slots)
    with open(folder / _FILE, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    _map(folder, size)[1][_DIGEST] = schema.digest
    for name in (_TO_SENDER, _TO_RECEIVER):
        os.mkfifo(folder / name, 0o600)


def _map(folder: Path, size: int) -> tuple[Tensor, np.ndarray[tuple[int], np.dtype[np.uint64]]]:
    """Return the memory of a ring, and the words of its first page."""
    memory = torch.from_file(str(folder / _FILE), shared=True, size=size, dtype=torch.uint8)
    return memory, memory[:_COUNTS_BYTES].numpy().view(np.uint64)


class PersistentRing:
    """One end's view of a ring: its slots and its counts.

    folder: that of `create_ring`, with the same schema and slots. neighbour: the other end's name.
    Raises RunError if the ring was made for another schema.
    """

    def __init__(self, folder: Path, schema: Schema, slots: int, neighbour: str) -> None:
        # The counts are aligned words. A store to one is whole, and x86-64 keeps the order of
        # stores, so that a reader of `published` finds the message. Elsewhere the copy of a
        # message and the wake-up's system call lie between.
        memory, self._words = _map(folder, ring_bytes(schema, slots))
        if int(self._words[_DIGEST]) != schema.digest:
            raise RunError(
                f"handshake with {neighbour}: the ring is of other messages than this worker's; "
                "start every worker with the same version and configuration"
            )
        parts = memory[_COUNTS_BYTES:].split(schema.nbytes)
        self._slots = [Slot(schema, memory=part) for part in parts]
        self.neighbour = neighbour

    @property
    def slots(self) -> int:
        """How many messages the ring holds."""
        return len(self._slots)

    def slot(self, number: int) -> Slot:
        """Return the slot of a message."""
        return self._slots[number % len(self._slots)]

    @property
    def published(self) -> int:
        """How many messages the sender has written."""
        return int(self._words[_PUBLISHED])

    @published.setter
    def published(self, count: int) -> None:
        self._words[_PUBLISHED] = count

    @property
    def taken(self) -> int:
        """How many messages the receiver has begun."""
        return int(self._words[_TAKEN])

    @taken.setter
    def taken(self, count: int) -> None:
        self._words[_TAKEN] = count

    @property
    def saved(self) -> int:
        """How many messages the receiver's snapshot covers."""
        return int(self._words[_SAVED])

    @saved.setter
    def saved(self, count: int) -> None:
        self._words[_SAVED] = count

    def read(self, number: int) -> Message:
        """Return a message that is in the ring, as windows on its slot.

        Raises RunError if the slot holds none of this edge, or another number.
        """
        message = read_message(self.slot(number), self.neighbour)
        if message.header.number != number:
            raise RunError(
                f"message from {self.neighbour}: number is {message.header.number}, "
                f"expected {number}; do both run the same version and configuration?"
            )
        return message


class WakePipe:
    """One direction of wake-ups between two ends: a named pipe that nobody ever closes for good."""

    def __init__(self, path: Path) -> None:
        # Opened for both directions, the pipe has no end of file and no broken end.
        self._reader = os.open(path, os.O_RDWR)
        self._writer = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def wake(self) -> None:
        """Let the next `wait` of the other end return. It never waits."""
        with contextlib.suppress(BlockingIOError):  # it is full, so the other end will wake
            os.write(self._writer, b"\0")

    def wait(self) -> None:
        """Wait for at least one wake-up, and forget all that have come."""
        os.read(self._reader, _READ_SIZE)


class PersistentSender:
    """The sending end of a ring. What is published already is not written again.

    start: the number of the first message, which this process's snapshot says. depth: the most
    messages that are not taken. compares: whether messages that are computed again are compared
    with those in the ring, for tests.
    """

    def __init__(
        self, folder: Path, ring: PersistentRing, depth: int, start: int, compares: bool = False
    ) -> None:
        self.ring = ring
        self._depth, self._next, self._compares = depth, start, compares
        self._from_receiver = WakePipe(folder / _TO_SENDER)
        self._to_receiver = WakePipe(folder / _TO_RECEIVER)
        self._to_receiver.wake()  # for a predecessor that was killed before it did

    def send(self, header: Header, fields: Mapping[str, Tensor]) -> None:
        """Number a message and copy it into the ring. Wait for a slot that is free.

        Raises RunError if the message does not fit, or, where messages are compared, if it differs
        from the one that was published.
        """
        ring, number = self.ring, self._next
        header = replace(header, number=number)
        self._next += 1
        if number < ring.published:
            if self._compares:
                _compare(ring, header, fields)
            return
        while number - ring.taken >= self._depth or number - ring.saved >= ring.slots:
            self._from_receiver.wait()
        write_message(ring.slot(number), header, fields, ring.neighbour)
        ring.published = number + 1
        self._to_receiver.wake()

    @property
    def next_number(self) -> int:
        """The number of the next message."""
        return self._next

    def published_flags(self, number: int) -> int | None:
        """Return the flags of a message that is published, None for one that is not."""
        if number >= self.ring.published:
            return None
        return self.ring.read(number).header.flags

    def close(self) -> None:
        """Do nothing: the ring stays when its sender has ended."""


class PersistentReceiver:
    """The receiving end of a ring. On the CPU a message is a window on the ring.

    start: the number of the first message, which this process's snapshot says. copied: the names of
    fields that the stage may write into. It gets copies of them, since a replacement reads the ring
    again.
    """

    def __init__(
        self,
        folder: Path,
        ring: PersistentRing,
        device: torch.device,
        start: int,
        copied: Collection[str] = (),
    ) -> None:
        self.ring = ring
        self._device, self._next, self._copied = device, start, copied
        self._to_sender = WakePipe(folder / _TO_SENDER)
        self._from_sender = WakePipe(folder / _TO_RECEIVER)
        self.save(start)  # for a predecessor that was killed after its snapshot

    def receive(self) -> Message:
        """Wait for the next message. It is valid until the next receive.

        Raises RunError if the message is not of this edge.
        """
        ring, number = self.ring, self._next
        while ring.published <= number:
            self._from_sender.wait()
        message = ring.read(number)
        self._next += 1
        if ring.taken < self._next:
            ring.taken = self._next
            self._to_sender.wake()
        return self._own(message)

    @property
    def next_number(self) -> int:
        """The number of the next message."""
        return self._next

    def save(self, count: int) -> None:
        """Tell the sender that a snapshot covers so many messages, and wake it."""
        self.ring.saved = count
        self._to_sender.wake()

    def _own(self, message: Message) -> Message:
        """Return the message on the stage's device, where it may write into it."""
        if self._device.type != "cpu":
            return move_to_device(message, self._device)
        fields = dict(message.fields)
        for name in self._copied:
            fields[name] = fields[name].clone()
        return Message(message.header, fields)


def _compare(ring: PersistentRing, header: Header, fields: Mapping[str, Tensor]) -> None:
    """Raise RunError if a message that was computed again is not the one in the ring."""
    published = ring.read(header.number)
    different = [] if published.header == header else ["header"]
    if header.kind is not Kind.EMPTY:
        for field in ring.slot(0).schema.fields:
            name = field.name
            if name in fields and not _same_bytes(fields[name], published.fields[name]):
                different.append(name)
    if different:
        raise RunError(
            f"message {header.number} to {ring.neighbour}, of step {header.step}: "
            f"{', '.join(different)} computed again is not what was sent; "
            "is the code of this run deterministic?"
        )


def _same_bytes(tensor: Tensor, other: Tensor) -> bool:
    tensor, other = tensor.detach().cpu().contiguous(), other.contiguous()
    if tensor.dtype != other.dtype or tensor.shape != other.shape:
        return False
    return torch.equal(tensor.view(torch.uint8), other.view(torch.uint8))

"""Rings that outlive their ends: numbers, counts, wake-ups, and ends that begin again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from localpipe.errors import RunError
from localpipe.fields import Field, Schema
from localpipe.pipeline.channels.message import Flag, Header, Kind
from localpipe.pipeline.channels.persistent_ring import (
    PersistentReceiver,
    PersistentRing,
    PersistentSender,
    create_ring,
    ring_bytes,
)

SCHEMA = Schema((Field("h.0", (3,), "float32"), Field("target", (), "int64")), 4)
SLOTS = 6
CPU = torch.device("cpu")


class Edge:
    """A ring in a folder, whose ends are opened as often as a test likes."""

    def __init__(self, folder: Path, depth: int = 2) -> None:
        self.folder, self.depth = folder / "edge", depth
        create_ring(self.folder, SCHEMA, SLOTS)

    def ring(self) -> PersistentRing:
        return PersistentRing(self.folder, SCHEMA, SLOTS, "stage 1 (rank 1)")

    def sender(self, start: int = 0, compares: bool = False) -> PersistentSender:
        return PersistentSender(self.folder, self.ring(), self.depth, start, compares)

    def receiver(self, start: int = 0, copied: tuple[str, ...] = ()) -> PersistentReceiver:
        return PersistentReceiver(self.folder, self.ring(), CPU, start, copied)


def values(number: int) -> dict[str, Tensor]:
    return {"h.0": torch.full((4, 3), float(number)), "target": torch.full((4,), number)}


def header(number: int, flags: int = Flag.NONE) -> Header:
    return Header(Kind.TRAIN, number + 1, 1, count=4, flags=flags)


def send(sender: PersistentSender, *numbers: int) -> None:
    for number in numbers:
        sender.send(header(number), values(number))


def receive(receiver: PersistentReceiver, *numbers: int) -> None:
    for number in numbers:
        message = receiver.receive()
        assert message.header.number == number and message.header.step == number + 1
        assert torch.equal(message.fields["h.0"], values(number)["h.0"])


def is_waiting(call: Callable[[], object]) -> threading.Thread:
    """Start a call in a thread and return it, after it has been seen to wait."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    return thread


def test_messages_are_numbered_and_arrive_in_order(tmp_path: Path) -> None:
    edge = Edge(tmp_path)
    sender, receiver = edge.sender(), edge.receiver()
    for number in range(5):
        send(sender, number)
        receive(receiver, number)
    ring = edge.ring()
    assert (ring.published, ring.taken, ring.saved) == (5, 5, 0)


def test_a_send_waits_while_depth_messages_are_not_taken(tmp_path: Path) -> None:
    edge = Edge(tmp_path)
    sender, receiver = edge.sender(), edge.receiver()
    send(sender, 0, 1)
    waiting = is_waiting(lambda: send(sender, 2))
    receive(receiver, 0)
    waiting.join(10)
    assert not waiting.is_alive() and edge.ring().published == 3


def test_a_slot_is_used_again_when_a_snapshot_covers_it(tmp_path: Path) -> None:
    edge = Edge(tmp_path)
    sender, receiver = edge.sender(), edge.receiver()
    for number in range(SLOTS):
        send(sender, number)
        receive(receiver, number)
    waiting = is_waiting(lambda: send(sender, SLOTS))
    receiver.save(1)
    waiting.join(10)
    assert not waiting.is_alive()
    receive(receiver, SLOTS)


def test_a_receive_waits_for_a_message(tmp_path: Path) -> None:
    edge = Edge(tmp_path)
    receiver = edge.receiver()
    waiting = is_waiting(lambda: receive(receiver, 0))
    send(edge.sender(), 0)
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_wake_up_too_many_is_harmless(tmp_path: Path) -> None:
    edge = Edge(tmp_path)
    receiver = edge.receiver()
    waiting = is_waiting(lambda: receive(receiver, 0))
    edge.sender()  # wakes the receiver, as every sender that opens its end
    waiting.join(0.1)
    assert waiting.is_alive()
    send(edge.sender(), 0)
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_pipe_full_of_wake_ups_holds_nobody_up(tmp_path: Path) -> None:
    edge = Edge(tmp_path, depth=1)
    sender, receiver = edge.sender(), edge.receiver()
    for _ in range(70_000):  # more than the pipe holds
        receiver.save(0)
    for number in range(3):
        send(sender, number)
        receive(receiver, number)


def test_a_new_receiver_reads_again_from_its_snapshot_on(tmp_path: Path) -> None:
    edge = Edge(tmp_path)
    sender, receiver = edge.sender(), edge.receiver()
    for number in range(5):
        send(sender, number)
        receive(receiver, number)
    again, ring = edge.receiver(2), edge.ring()
    receive(again, 2)
    assert ring.taken == 5
    receive(again, 3, 4)
    assert (ring.published, ring.taken, ring.saved) == (5, 5, 2)


def test_a_new_sender_writes_nothing_that_is_published(tmp_path: Path) -> None:
    edge = Edge(tmp_path)
    sender, receiver = edge.sender(), edge.receiver()
    send(sender, 0, 1)
    again = edge.sender(0)
    again.send(header(0), values(7))  # it would be noticed
    send(again, 1)
    receive(receiver, 0, 1)
    send(again, 2)
    receive(receiver, 2)


def test_a_message_that_was_half_written_is_written_again(tmp_path: Path) -> None:
    edge = Edge(tmp_path)
    edge.ring().slot(0).tensors["h.0"].fill_(9)
    send(edge.sender(), 0)
    receive(edge.receiver(), 0)


def test_both_ends_may_begin_again(tmp_path: Path) -> None:
    edge = Edge(tmp_path)
    sender, receiver = edge.sender(), edge.receiver()
    for number in range(4):
        send(sender, number)
        receive(receiver, number)
    receiver.save(3)
    sender, receiver = edge.sender(2), edge.receiver(3)
    send(sender, 2, 3, 4)
    receive(receiver, 3, 4)


def test_flags_of_published_messages_can_be_read(tmp_path: Path) -> None:
    edge = Edge(tmp_path)
    sender = edge.sender()
    sender.send(header(0, Flag.SAVE_AFTER), values(0))
    sender.send(header(1), values(1))
    again = edge.sender(0)
    flags = [again.published_flags(number) for number in range(3)]
    assert flags == [Flag.SAVE_AFTER, Flag.NONE, None]


def test_what_a_stage_may_write_into_is_its_own(tmp_path: Path) -> None:
    edge = Edge(tmp_path)
    send(edge.sender(), 0)
    fields = edge.receiver(copied=("h.0",)).receive().fields
    fields["h.0"].fill_(9)
    receive(edge.receiver(), 0)


@pytest.mark.parametrize(
    ("again", "words"),
    [
        ((header(0), values(7)), "h.0, target"),
        ((header(0, Flag.SAVE_AFTER), values(0)), "header"),
    ],
)
def test_a_message_computed_again_is_compared_where_that_is_asked_for(
    tmp_path: Path, again: tuple[Header, dict[str, Tensor]], words: str
) -> None:
    edge = Edge(tmp_path)
    send(edge.sender(), 0)
    send(edge.sender(compares=True), 0)
    with pytest.raises(RunError, match=f"message 0 to stage 1 .*: {words} computed again"):
        edge.sender(compares=True).send(*again)


def test_a_ring_of_other_messages_is_refused(tmp_path: Path) -> None:
    edge = Edge(tmp_path)
    other = Schema(SCHEMA.fields, 3)
    with pytest.raises(RunError, match=r"handshake with stage 0 \(rank 0\): the ring is of other"):
        PersistentRing(edge.folder, other, SLOTS, "stage 0 (rank 0)")


def test_a_message_in_the_wrong_place_is_refused(tmp_path: Path) -> None:
    edge = Edge(tmp_path)
    send(edge.sender(), 0)
    ring = edge.ring()
    ring.published = SLOTS + 1
    with pytest.raises(RunError, match=f"number is 0, expected {SLOTS}"):
        edge.receiver(SLOTS).receive()


def test_a_ring_has_the_bytes_that_are_planned(tmp_path: Path) -> None:
    edge = Edge(tmp_path)
    assert (edge.folder / "ring").stat().st_size == ring_bytes(SCHEMA, SLOTS)


def test_a_new_sender_wakes_for_one_that_was_killed_before_it_did(tmp_path: Path) -> None:
    edge = Edge(tmp_path)
    receiver = edge.receiver()
    waiting = is_waiting(lambda: receive(receiver, 0))
    send(edge.sender(), 0)
    waiting.join(10)
    waiting = is_waiting(lambda: receive(receiver, 1))
    ring = edge.ring()
    ring.slot(1).write(Header(Kind.TRAIN, 2, 1, count=4, number=1), values(1))
    ring.published = 2
    edge.sender(1)
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_new_receiver_wakes_for_one_that_was_killed_before_it_did(tmp_path: Path) -> None:
    edge = Edge(tmp_path, depth=1)
    sender = edge.sender()
    send(sender, 0)
    waiting = is_waiting(lambda: send(sender, 1))
    edge.ring().taken = 1
    edge.receiver(1)
    waiting.join(10)
    assert not waiting.is_alive()

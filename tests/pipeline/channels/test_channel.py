"""Edges between two threads of one process over a file store, and their twin in memory."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from localpipe.errors import NeighbourLostError, RunError
from localpipe.fields import Field, Schema
from localpipe.pipeline.channels import shared_memory
from localpipe.pipeline.channels.channel import Endpoint, Inbox, MemoryChannel, Outbox
from localpipe.pipeline.channels.gloo import GLOO
from localpipe.pipeline.channels.message import Flag, Header, Kind, Message, Slot
from localpipe.pipeline.workers.mesh import open_file_store
from tests import ROOT

SCHEMA = Schema(
    (Field("h.0", (3, 2), "float32"), Field("image", (5,), "uint8"), Field("target", (), "int64")),
    4,
)
SENDER, RECEIVER = "stage 0 (rank 0)", "stage 1 (rank 1)"
FACTS = {"localpipe": "1", "depth": 2}
PATIENCE_S = 60  # for what must happen
GRACE_S = 0.25  # for what must not


class Thread(threading.Thread):
    """Runs a function and keeps what it returned or raised."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self.result: Any = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._work()
        except Exception as error:
            self.error = error.with_traceback(None)  # a traceback would keep the channel alive
        del self._work

    def ended(self) -> Thread:
        self.join(PATIENCE_S)
        assert not self.is_alive()
        return self


class Sending(Thread):
    """Sends messages and counts those whose send has returned."""

    def __init__(self, sender: Outbox, messages: list[Message]) -> None:
        self.sent = 0
        self._changed = threading.Condition()
        super().__init__(lambda: self._send(sender, messages))

    def _send(self, sender: Outbox, messages: list[Message]) -> None:
        for message in messages:
            sender.send(message.header, message.fields)
            with self._changed:
                self.sent += 1
                self._changed.notify_all()

    def reaches(self, count: int) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.sent >= count, PATIENCE_S)


def endpoint(
    folder: Path,
    neighbour: str,
    schema: Schema = SCHEMA,
    depth: int = 2,
    facts: Mapping[str, Any] = FACTS,
) -> Endpoint:
    """Return one end of an edge inside this machine, with a store of its own."""
    cpu = torch.device("cpu")
    return Endpoint(open_file_store(folder), schema, depth, neighbour, cpu, True, facts)


def shake(folder: Path, sends: dict[str, Any], receives: dict[str, Any]) -> tuple[Thread, Thread]:
    """Make both ends of an edge at once, each in its own thread and with its own store."""
    sender = Thread(lambda: GLOO.open_sender(endpoint(folder, RECEIVER, **sends)))
    receiver = Thread(lambda: GLOO.open_receiver(endpoint(folder, SENDER, **receives)))
    return sender.ended(), receiver.ended()


@pytest.fixture(params=["shared memory", "gloo"], autouse=True)
def carried(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let edges find room in shared memory, or none."""
    if request.param == "gloo":
        monkeypatch.setattr(shared_memory, "SHARED_MEMORY_DIR", "/dev/null/no room")
    return str(request.param)


def joined(folder: Path, depth: int = 2, schema: Schema = SCHEMA) -> tuple[Any, Any]:
    common = {"schema": schema, "facts": {**FACTS, "depth": depth}}
    sender, receiver = shake(folder, {**common, "depth": depth}, common)
    assert sender.error is None and receiver.error is None
    return sender.result, receiver.result


def fields(count: int, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    h = torch.randn(count, 3, 2, generator=generator)
    if count:
        h[0, 0] = torch.tensor([float("nan"), -0.0])
    image = torch.randint(0, 256, (count, 5), generator=generator).to(torch.uint8)
    return {"h.0": h, "image": image, "target": torch.arange(count) + step}


def message(step: int, count: int = 4, kind: Kind = Kind.TRAIN, flags: int = Flag.NONE) -> Message:
    return Message(Header(kind, step, 1, count, flags, step - 1), fields(count, step))


def run_messages() -> list[Message]:
    """Return messages of every kind: full and short batches, evaluation, flags, last a stop."""
    return [
        *[message(step, 4 if step % 3 else 2) for step in range(1, 12)],
        message(12, 1, flags=Flag.SAVE_AFTER),
        message(12, 4, Kind.TEST),
        message(12, 3, Kind.TEST, Flag.END_EVAL),
        message(12, 2, Kind.VALIDATION),
        message(13),
        Message(Header(Kind.EMPTY, 13, 1, 0, Flag.STOP, 12), {}),
    ]


def raw(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    return {
        name: tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in tensors.items()
    }


def taken(inbox: Inbox) -> Iterator[tuple[Header, dict[str, bytes]]]:
    """Yield what arrives, copied out before the next receive, up to the stop."""
    while True:
        arrived = inbox.receive()
        yield arrived.header, raw(arrived.fields)
        if arrived.header.flags & Flag.STOP:
            return


def all_taken(inbox: Inbox) -> list[tuple[Header, dict[str, bytes]]]:
    """Return everything up to the stop. Edges have no timeout, so a test has one."""
    reading = Thread(lambda: list(taken(inbox))).ended()
    assert reading.error is None
    messages: list[tuple[Header, dict[str, bytes]]] = reading.result
    return messages


def receive(inbox: Inbox) -> Message:
    reading = Thread(inbox.receive).ended()
    if reading.error is not None:
        raise reading.error
    message: Message = reading.result
    return message


def expected() -> list[tuple[Header, dict[str, bytes]]]:
    nothing = {field.name: b"" for field in SCHEMA.fields}
    return [(sent.header, raw(sent.fields) or nothing) for sent in run_messages()]


# --- Order and bytes


@pytest.mark.parametrize("depth", [1, 2, 8])
def test_messages_arrive_in_order_and_bit_for_bit(tmp_path: Path, depth: int) -> None:
    sender, receiver = joined(tmp_path, depth)
    sending = Sending(sender, run_messages())
    assert all_taken(receiver) == expected()
    assert sending.ended().error is None
    sender.close()


@pytest.mark.parametrize("depth", [1, 2, 8])
def test_memory_channel_carries_the_bytes_that_edges_carry(tmp_path: Path, depth: int) -> None:
    sender, receiver = joined(tmp_path, depth)
    sending = Sending(sender, run_messages())
    memory = MemoryChannel(SCHEMA, depth)

    def through_memory() -> Iterator[tuple[Header, dict[str, bytes]]]:
        for sent in run_messages():
            memory.send(sent.header, sent.fields)
            yield next(taken(memory))

    assert list(through_memory()) == all_taken(receiver)
    sending.ended()


def test_memory_channel_holds_depth_messages_in_order() -> None:
    memory = MemoryChannel(SCHEMA, 3)
    for step in (1, 2, 3):
        memory.send(message(step).header, fields(4, step))
    assert [memory.receive().header.step for _ in range(3)] == [1, 2, 3]


def test_message_in_memory_stays_as_it_is_until_the_next_receive() -> None:
    memory = MemoryChannel(SCHEMA, 1)
    memory.send(message(1).header, fields(4, 1))
    first = memory.receive()
    memory.send(message(2).header, fields(4, 2))
    assert raw(first.fields) == raw(fields(4, 1))


def test_tensors_may_be_written_over_as_soon_as_send_has_returned(tmp_path: Path) -> None:
    sender, receiver = joined(tmp_path, 8)
    buffer = fields(4, 0)
    for step in range(1, 9):
        for name, tensor in fields(4, step).items():
            buffer[name].copy_(tensor)
        sender.send(message(step).header, buffer)
    for tensor in buffer.values():
        tensor.zero_()
    for step in range(1, 9):
        assert raw(receive(receiver).fields) == raw(fields(4, step))


def test_received_message_stays_as_it_is_until_the_next_receive(tmp_path: Path) -> None:
    sender, receiver = joined(tmp_path, 2)
    sending = Sending(sender, [message(step) for step in range(1, 7)])
    for step in range(1, 7):
        arrived = receive(receiver)
        assert sending.reaches(
            min(step + 3, 6)
        )  # the next one has been posted and may have come in behind it
        assert raw(arrived.fields) == raw(fields(4, step))
    sending.ended()


def test_edges_need_no_world_group(tmp_path: Path) -> None:
    joined(tmp_path)
    assert not dist.is_initialized()


def test_edge_without_room_in_shared_memory_goes_over_gloo(tmp_path: Path, carried: str) -> None:
    sender, receiver = joined(tmp_path)
    sender._ring[0].bytes.fill_(7)
    assert bool((receiver._ring[0].bytes == 7).all()) == (carried == "shared memory")


def test_nothing_is_left_in_shared_memory(tmp_path: Path) -> None:
    before = set(Path("/dev/shm").iterdir())
    joined(tmp_path)
    assert set(Path("/dev/shm").iterdir()) == before


# --- Bounds


@pytest.mark.parametrize("depth", [1, 2, 8])
def test_send_waits_when_depth_messages_are_in_flight(tmp_path: Path, depth: int) -> None:
    sender, receiver = joined(tmp_path, depth)
    total = depth + 4
    sending = Sending(sender, [message(step) for step in range(total)])
    ahead = depth + 1  # depth in flight, and the one that the receiver has asked for already
    for received in range(total - ahead):
        assert sending.reaches(ahead + received)
        time.sleep(GRACE_S)
        assert sending.sent == ahead + received and sending.is_alive()
        assert receive(receiver).header.step == received
    for step in range(total - ahead, total):
        assert receive(receiver).header.step == step
    assert sending.ended().error is None


def test_close_waits_until_everything_sent_has_been_taken(tmp_path: Path) -> None:
    sender, receiver = joined(tmp_path, 2)
    for step in (1, 2, 3):
        sender.send(message(step).header, fields(4, step))
    closing = Thread(sender.close)
    time.sleep(GRACE_S)
    assert closing.is_alive()
    assert [receive(receiver).header.step for _ in range(3)] == [1, 2, 3]
    assert closing.ended().error is None


def test_receive_waits_for_a_message(tmp_path: Path) -> None:
    sender, receiver = joined(tmp_path)
    receiving = Thread(lambda: receiver.receive().header.step)
    time.sleep(GRACE_S)
    assert receiving.is_alive()
    sender.send(message(5).header, fields(4, 5))
    assert receiving.ended().result == 5


def test_no_receive_is_posted_behind_a_stop(tmp_path: Path) -> None:
    sender, receiver = joined(tmp_path, 1)
    sender.send(Header(Kind.EMPTY, 1, 1, 0, Flag.STOP), {})
    assert receive(receiver).header.flags == Flag.STOP
    # Were a receive posted, it would take the first of these and let the second one go.
    sending = Sending(sender, [message(2), message(3)])
    assert sending.reaches(1)
    time.sleep(GRACE_S)
    assert sending.sent == 1 and sending.is_alive()


# --- Handshake


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"schema": Schema(SCHEMA.fields, 8)}, ["batch is ", "4", "8"]),
        (
            {"schema": Schema((Field("h.0", (3, 2), "float16"), *SCHEMA.fields[1:]), 4)},
            ["h.0", "float16", "float32"],
        ),
        (
            {"schema": Schema((Field("h.0", (2, 3), "float32"), *SCHEMA.fields[1:]), 4)},
            ["h.0", "[3, 2]", "[2, 3]"],
        ),
        (
            {"schema": Schema((Field("h.1", (3, 2), "float32"), *SCHEMA.fields[1:]), 4)},
            ["h.0", "h.1"],
        ),
        (
            {"schema": Schema((SCHEMA.fields[1], SCHEMA.fields[0], SCHEMA.fields[2]), 4)},
            ["h.0", "image"],
        ),
        ({"schema": Schema(SCHEMA.fields, 4, SCHEMA)}, ["evaluation batch is ", "4", "None"]),
        ({"facts": {**FACTS, "localpipe": "2"}}, ["localpipe is ", "'1'", "'2'"]),
        ({"facts": {**FACTS, "depth": 3}}, ["depth is ", "2", "3"]),
        ({"facts": {"localpipe": "1"}}, ["depth is ", "2", "None"]),
    ],
    ids=["batch", "dtype", "shape", "name", "order", "evaluation", "version", "depth", "unsaid"],
)
def test_handshake_that_differs_raises_on_both_sides_and_says_in_what(
    tmp_path: Path, change: dict[str, Any], names: list[str]
) -> None:
    common: dict[str, Any] = {"schema": SCHEMA, "facts": FACTS}
    for folder, sender_change, receiver_change in (
        ("sender", change, {}),
        ("receiver", {}, change),
    ):
        (tmp_path / folder).mkdir()
        ends = shake(
            tmp_path / folder,
            {**common, **sender_change, "depth": 2},
            {**common, **receiver_change},
        )
        for end, neighbour in zip(ends, (RECEIVER, SENDER), strict=True):
            assert type(end.error) is RunError
            assert str(end.error).startswith(f"handshake with {neighbour}: ")
            assert all(name in str(end.error) for name in names) and "\n" not in str(end.error)


def test_message_of_another_schema_is_refused_by_the_receiver(tmp_path: Path) -> None:
    sender, receiver = joined(tmp_path)
    stray = Schema((Field("h.9", (3, 2), "float32"), *SCHEMA.fields[1:]), 4)
    assert stray.nbytes == SCHEMA.nbytes
    sender._ring = [
        Slot(stray, memory=slot.bytes) for slot in sender._ring
    ]  # nothing that a handshake would have let through
    sender.send(message(1).header, {**fields(4, 1), "h.9": fields(4, 1)["h.0"]})
    with pytest.raises(RunError, match="message from stage 0 .*schema digest"):
        receive(receiver)


# --- A neighbour that goes away


def test_send_names_a_receiver_that_is_gone(tmp_path: Path) -> None:
    sender, receiver = joined(tmp_path, 1)
    sending = Sending(sender, [message(step) for step in range(9)])
    assert sending.reaches(1)
    del receiver
    gc.collect()
    error = sending.ended().error
    assert isinstance(error, NeighbourLostError) and str(error).startswith(f"lost {RECEIVER}: ")
    assert "\n" not in str(error)


def test_receive_names_a_sender_that_is_gone(tmp_path: Path) -> None:
    sender, receiver = joined(tmp_path, 1)
    receiving = Thread(receiver.receive)
    del sender
    gc.collect()
    error = receiving.ended().error
    assert isinstance(error, NeighbourLostError) and str(error).startswith(f"lost {SENDER}: ")


SENDER_PROCESS = """
import os, signal, sys
from pathlib import Path
from localpipe.pipeline.channels.gloo import GLOO
from tests.pipeline.channels.test_channel import RECEIVER, endpoint, fields, message
sender = GLOO.open_sender(endpoint(Path(sys.argv[1]), RECEIVER))
sender.send(message(1).header, fields(4, 1))
sender.close()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_process_that_was_killed_is_named_after_its_messages_are_in(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SENDER_PROCESS, str(tmp_path)], cwd=ROOT
    ) as process:
        try:
            receiver = GLOO.open_receiver(endpoint(tmp_path, SENDER))
            assert raw(receive(receiver).fields) == raw(fields(4, 1))
            with pytest.raises(NeighbourLostError, match="lost stage 0"):
                receive(receiver)
        finally:
            process.kill()

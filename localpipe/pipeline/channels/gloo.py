"""The gloo back end: edges between processes, over shared memory inside one machine."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from torch import Tensor

from localpipe.pipeline.channels.channel import (
    RECEIVE_SLOTS,
    ChannelBackend,
    Endpoint,
    Inbox,
    Outbox,
    compare_facts,
    guard,
    move_to_device,
    read_message,
    write_message,
)
from localpipe.pipeline.channels.groups import connect_gloo
from localpipe.pipeline.channels.message import Flag, Header, Message, Slot
from localpipe.pipeline.channels.shared_memory import SHARED_MEMORY, NoRoom


class GlooSender:
    """The sending end of an edge over gloo.

    What comes from a device is copied to the host, and the host waits for that copy. The
    constructor waits for the receiver. It raises RunError if the two ends differ, or without a
    route to the receiver.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._neighbour = endpoint.neighbour
        compare_facts(endpoint, "sender", "receiver")
        with endpoint.mark_connect():
            self._group = connect_gloo(endpoint.store, 0, 2, endpoint.is_local)
        self._ring = [Slot(endpoint.schema) for _ in range(endpoint.depth)]
        # gloo writes to the socket in the thread that sends, until the socket is full. It gets a
        # thread of its own, so that the stage goes on at once. gloo drops a message whose handle is
        # dropped, so the handles live as long as their slots.
        self._thread = ThreadPoolExecutor(1, "sender")
        self._sending: deque[Future[Any]] = deque()  # one for every message in flight
        self._next = 0

    def send(self, header: Header, fields: Mapping[str, Tensor]) -> None:
        """Copy a message out and wait while `depth` messages are in flight.

        Raises RunError if the message does not fit. A lost connection raises NeighbourLostError
        when the wait reaches the failed message, so in a later call.
        """
        self._wait_until_in_flight(len(self._ring) - 1)
        slot = self._ring[self._next % len(self._ring)]
        write_message(slot, header, fields, self._neighbour)
        self._sending.append(self._thread.submit(self._group.send, [slot.bytes], 1, 0))
        self._next += 1

    def close(self) -> None:
        """Wait until the receiver has taken every message.

        Raises NeighbourLostError if the connection is lost.
        """
        self._wait_until_in_flight(0)

    def _wait_until_in_flight(self, count: int) -> None:
        """Wait until at most `count` messages are in flight."""
        while len(self._sending) > count:
            work = guard(self._neighbour, self._sending.popleft().result)
            guard(self._neighbour, work.wait)


class GlooReceiver:
    """The receiving end of an edge over gloo.

    Messages arrive on the host and are copied to the stage's device. The constructor waits for the
    sender. It raises RunError if the two ends differ, or without a route to the sender.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._neighbour, self._device = endpoint.neighbour, endpoint.device
        compare_facts(endpoint, "receiver", "sender")
        with endpoint.mark_connect():
            self._group = connect_gloo(endpoint.store, 1, 2, endpoint.is_local)
        self._ring = [Slot(endpoint.schema) for _ in range(RECEIVE_SLOTS)]
        self._next = 0
        self._work = self._post_receive()

    def receive(self) -> Message:
        """Wait for the next message. On the CPU it is valid until the next receive.

        There it is a window on a slot, and on a GPU a copy. Raises RunError if the message is not
        of this edge, and NeighbourLostError if the sender is lost.
        """
        guard(self._neighbour, self._work.wait)
        message = read_message(self._ring[self._next % len(self._ring)], self._neighbour)
        self._next += 1
        # No message follows a stop, and gloo cannot cancel a receive.
        if not message.header.flags & Flag.STOP:
            self._work = self._post_receive()
        return move_to_device(message, self._device)

    def _post_receive(self) -> Any:
        buffer = self._ring[self._next % len(self._ring)].bytes
        return guard(self._neighbour, lambda: self._group.recv([buffer], 0, 0))


def open_sender(endpoint: Endpoint) -> Outbox:
    """Return the sending end of an edge, after the receiver has opened its end.

    It is a RingSender if both ends are on one machine and shared memory has room for the ring, else
    a GlooSender. Raises RunError if the two ends differ.
    """
    if endpoint.is_local:
        with suppress(NoRoom):
            return SHARED_MEMORY.open_sender(endpoint)
    return GlooSender(endpoint)


def open_receiver(endpoint: Endpoint) -> Inbox:
    """Return the receiving end of an edge, over what the sending end has chosen.

    It is a RingReceiver or a GlooReceiver. It waits for the sender. Raises RunError if the two ends
    differ.
    """
    if endpoint.is_local:
        with suppress(NoRoom):
            return SHARED_MEMORY.open_receiver(endpoint)
    return GlooReceiver(endpoint)


GLOO = ChannelBackend(
    name="gloo",
    device_types=("cpu", "cuda"),
    needs_own_device=False,
    open_sender=open_sender,
    open_receiver=open_receiver,
)

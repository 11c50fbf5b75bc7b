"""The channel between two processes over gloo."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from localpipe.fields import Schema
from localpipe.pipeline.channels.channel import (
    compare_facts,
    guard,
    move_to_device,
    read_message,
    write_message,
)
from localpipe.pipeline.channels.groups import connect_gloo
from localpipe.pipeline.channels.message import Flag, Header, Message, Slot


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
        compare_facts(store, "sender", "receiver", schema, peer, facts)
        self._group = connect_gloo(store, 0, 2, local)
        self._ring = [Slot(schema) for _ in range(depth)]
        # gloo writes to the socket in the thread that sends, until the socket is full: a thread of its own, so that the
        # stage goes on at once. It drops a message whose handle is dropped, so the handles live as long as their slots.
        self._thread = ThreadPoolExecutor(1, "sender")
        self._sending: deque[Future[Any]] = deque()  # one for every message in flight
        self._next = 0

    def send(self, header: Header, fields: Mapping[str, Tensor]) -> None:
        self._finish(len(self._ring) - 1)
        slot = self._ring[self._next % len(self._ring)]
        write_message(slot, header, fields, self._peer)
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
        compare_facts(store, "receiver", "sender", schema, peer, facts)
        self._group = connect_gloo(store, 1, 2, local)
        self._ring = (Slot(schema), Slot(schema))
        self._next = 0
        self._posted = self._post()

    def receive(self) -> Message:
        guard(self._peer, self._posted.wait)
        message = read_message(self._ring[self._next % 2], self._peer)
        self._next += 1
        if (
            not message.header.flags & Flag.STOP
        ):  # nothing follows a stop, and gloo cannot take a receive back
            self._posted = self._post()
        return move_to_device(message, self._device)

    def _post(self) -> Any:
        into = self._ring[self._next % 2].bytes
        return guard(self._peer, lambda: self._group.recv([into], 0, 0))

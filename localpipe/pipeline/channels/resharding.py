"""Edges between stages that have different numbers of replicas: one end splits a message by rows, the other joins them.

A batch of n rows: replica r of R holds rows r * n / R .. (r + 1) * n / R, at every stage. An edge carries what its two ends
have in common. Evaluation goes through the first replicas alone, whole; what carries flags only goes everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from localpipe.errors import RunError
from localpipe.pipeline.channels.channel import Inbox, Outbox
from localpipe.pipeline.channels.message import (
    Header,
    Kind,
    Message,
    overlapping_rows,
    replica_rows,
)


def neighbour_replicas(replica: int, replicas: int, others: int) -> list[int]:
    """Return which of a neighbour's replicas share rows with one replica of a stage."""
    return [
        s
        for s in range(others)
        if s * replicas < (replica + 1) * others and replica * others < (s + 1) * replicas
    ]


class RowScatter:
    """Sends to each of several replicas its rows of a message. `to` maps a receiver's number to its edge."""

    def __init__(self, to: Mapping[int, Outbox], replica: int, replicas: int, others: int) -> None:
        self._to, self._replica, self._replicas, self._others = to, replica, replicas, others

    def send(self, header: Header, fields: Mapping[str, Tensor]) -> None:
        if header.kind.evaluates:
            self._to[0].send(header, fields)
            return
        mine = replica_rows(header.whole, self._replica, self._replicas)
        for number, outbox in self._to.items():
            rows = overlapping_rows(mine, replica_rows(header.whole, number, self._others))
            part = {
                name: tensor[rows.start - mine.start : rows.stop - mine.start]
                for name, tensor in fields.items()
            }
            outbox.send(replace(header, count=rows.stop - rows.start), part)

    def close(self) -> None:
        for outbox in self._to.values():
            outbox.close()


class RowGather:
    """Joins what several replicas send, in their order, to the rows of one."""

    def __init__(self, inboxes: Sequence[Inbox]) -> None:
        self._inboxes = inboxes

    def receive(self) -> Message:
        first = self._inboxes[0].receive()
        if first.header.kind.evaluates:
            return first
        parts = [first, *(inbox.receive() for inbox in self._inboxes[1:])]
        for part in parts[1:]:
            told = replace(part.header, count=first.header.count, saved=first.header.saved)
            if told != first.header:
                raise RunError(
                    f"message is {part.header}, while another replica's is {first.header}"
                )
        if first.header.kind is Kind.EMPTY:
            return first
        fields = {name: torch.cat([part.fields[name] for part in parts]) for name in first.fields}
        return Message(
            replace(first.header, count=sum(part.header.count for part in parts)), fields
        )

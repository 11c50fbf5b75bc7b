"""Edges between stages with different numbers of replicas: a message is split and joined by rows.

A batch of n rows: replica r of R has rows r * n / R .. (r + 1) * n / R, at every stage. An edge
carries the rows that its two ends have in common. Evaluation messages go through the first replicas
only, with all rows. A message without tensors goes to every replica.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from localpipe.errors import RunError
from localpipe.fields import Schema
from localpipe.pipeline.channels.channel import Inbox, Outbox
from localpipe.pipeline.channels.message import (
    Header,
    Kind,
    Message,
    join_rows,
    overlapping_rows,
    replica_rows,
)


def neighbour_replicas(replica: int, replicas: int, neighbours: int) -> list[int]:
    """Return which of a neighbouring stage's replicas share rows with one replica of a stage.

    replica: its index, from 0. replicas: the number of replicas of the stage. neighbours: that of
    the neighbouring stage. The indices ascend, and there is at least one.
    """
    # Replica r has the part r / R .. (r + 1) / R of the rows. Both bounds are compared as integers.
    start, end = replica * neighbours, (replica + 1) * neighbours
    indices = range(neighbours)
    return [i for i in indices if i * replicas < end and start < (i + 1) * replicas]


class RowScatter:
    """Sends to each of several replicas its rows of a message.

    outboxes: the edge to each receiving replica that shares rows, by its index. replica, replicas:
    the sender's index and number. receivers: the number of replicas of the next stage.
    """

    def __init__(
        self, outboxes: Mapping[int, Outbox], replica: int, replicas: int, receivers: int
    ) -> None:
        self._outboxes = outboxes
        self._replica, self._replicas, self._receivers = replica, replicas, receivers

    def send(self, header: Header, fields: Mapping[str, Tensor]) -> None:
        """Send each replica its rows, and wait while an edge has `depth` messages in flight.

        fields: tensors with this replica's header.count rows. Every receiver's header has its own
        count. An evaluation message goes to receiver 0 only, and raises KeyError where there is no
        edge to it. The edges' errors pass through.
        """
        if header.kind.is_evaluation:
            self._outboxes[0].send(header, fields)
            return
        local_rows = replica_rows(header.total_count, self._replica, self._replicas)
        for index, outbox in self._outboxes.items():
            neighbour_rows = replica_rows(header.total_count, index, self._receivers)
            rows = overlapping_rows(local_rows, neighbour_rows)
            start, end = rows.start - local_rows.start, rows.stop - local_rows.start
            part = {name: tensor[start:end] for name, tensor in fields.items()}
            outbox.send(replace(header, count=end - start), part)

    def close(self) -> None:
        """Wait until every receiver has taken every message. The edges' errors pass through."""
        for outbox in self._outboxes.values():
            outbox.close()


class RowGather:
    """Joins the rows that several replicas send, in their order.

    inboxes: one for each sending replica, by ascending index. At least one. schema: that of the
    edges, by which the joined rows lie in memory. Fields that it lacks are contiguous, and without
    it all are.
    """

    def __init__(self, inboxes: Sequence[Inbox], schema: Schema | None = None) -> None:
        self._inboxes = inboxes
        self._fields = {}
        if schema is not None:
            self._fields = {field.name: field for field in schema.fields}

    def receive(self) -> Message:
        """Wait for the next message of every replica. Return their joined rows as new tensors.

        The header is the first replica's, with the sum of the counts. An evaluation message is read
        from the first replica only. That message, and one of kind EMPTY, is the first replica's
        own.
        Raises RunError if the headers differ in more than count and saved. The edges' errors pass
        through.
        """
        first = self._inboxes[0].receive()
        if first.header.kind.is_evaluation:
            return first
        parts = [first]
        for inbox in self._inboxes[1:]:
            parts.append(inbox.receive())
        for part in parts[1:]:
            _check_headers(first.header, part.header)
        if first.header.kind is Kind.EMPTY:
            return first
        fields = {}
        for name in first.fields:
            rows = [part.fields[name] for part in parts]
            if name in self._fields:
                fields[name] = join_rows(self._fields[name], rows)
            else:
                fields[name] = torch.cat(rows)
        count = sum(part.header.count for part in parts)
        return Message(replace(first.header, count=count), fields)


def _check_headers(first: Header, header: Header) -> None:
    """Raise RunError if two replicas' headers differ in more than their rows and saved steps."""
    if replace(header, count=first.count, saved=first.saved) != first:
        raise RunError(f"message is {header}, while another replica's is {first}")

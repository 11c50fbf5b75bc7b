"""Tensors whose order in memory the edge fixes: the same strides and bytes on every way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from localpipe.errors import RunError
from localpipe.fields import Field, Schema, ordered_strides
from localpipe.pipeline.channels.channel import MemoryChannel
from localpipe.pipeline.channels.message import (
    Header,
    Kind,
    Message,
    Slot,
    empty_rows,
    join_rows,
    replica_rows,
)
from localpipe.pipeline.channels.resharding import RowGather, RowScatter, neighbour_replicas
from localpipe.pipeline.stages.codecs import CODECS
from tests.pipeline.channels.test_channel import FACTS, carried, joined, receive, shake

__all__ = ["carried"]

PERMUTED = Field("h.0", (3, 4, 5), "float32", (1, 2, 0))
PLAIN = replace(PERMUTED, order=())
SCHEMA = Schema((PERMUTED, Field("h.0.1", (2, 3), "bool", (1, 0)), Field("n", (2,), "int64")), 4)


def content(count: int) -> dict[str, Tensor]:
    """Return contiguous tensors of a message."""
    return {
        "h.0": torch.randn(count, 3, 4, 5),
        "h.0.1": torch.randn(count, 2, 3) > 0,
        "n": torch.arange(2 * count).view(count, 2),
    }


def check(message: Message, fields: dict[str, Tensor]) -> None:
    """Assert that a message has these values, and every field the strides of its order."""
    for field in SCHEMA.fields:
        tensor = message.fields[field.name]
        assert torch.equal(tensor, fields[field.name])
        assert tensor.stride() == field.strides


@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5), (1, 3, 1), (0, 3)])
def test_strides_without_an_order_are_those_of_a_contiguous_tensor(shape: tuple[int, ...]) -> None:
    assert ordered_strides(shape, ()) == torch.empty(2, *shape).stride()


def test_channels_innermost_are_torchs_channels_last() -> None:
    x = torch.empty(2, 3, 4, 5, memory_format=torch.channels_last)
    assert x.stride() == PERMUTED.strides == empty_rows(PERMUTED, 2).stride()


def test_the_bytes_of_a_slot_are_in_the_order(carried: str) -> None:
    slot, fields = Slot(SCHEMA), content(4)
    slot.write(Header(Kind.TRAIN, 1, 1, 4), fields)
    start = SCHEMA.offsets[0]
    written = slot.bytes[start : start + 4 * PERMUTED.nbytes].view(torch.float32)
    assert torch.equal(written, fields["h.0"].permute(0, 2, 3, 1).flatten())


@pytest.mark.parametrize("count", [4, 2])
def test_a_message_arrives_with_its_strides(tmp_path: Path, count: int) -> None:
    sender, receiver = joined(tmp_path, schema=SCHEMA)
    fields = content(count)
    sender.send(Header(Kind.TRAIN, 1, 1, count), fields)
    check(receive(receiver), fields)


@pytest.mark.parametrize("count", [4, 2])
def test_the_twin_in_memory_has_the_same_strides(count: int) -> None:
    channel, fields = MemoryChannel(SCHEMA, 1), content(count)
    channel.send(Header(Kind.TRAIN, 1, 1, count), fields)
    check(channel.receive(), fields)


def test_an_order_changes_the_digest_of_a_schema_and_no_order_does_not() -> None:
    assert Schema((PERMUTED,), 4).digest != Schema((PLAIN,), 4).digest
    target = Field("target", (), "int64")
    # Recorded with version 3 of the message, which has no text of an order for such fields.
    assert Schema((PLAIN, target), 4).digest == 15444759636692896142


def test_neighbours_compare_orders(tmp_path: Path) -> None:
    common: dict[str, Any] = {"facts": FACTS}
    ends = shake(
        tmp_path,
        {**common, "schema": Schema((PERMUTED,), 4), "depth": 2},
        {**common, "schema": Schema((PLAIN,), 4)},
    )
    for end in ends:
        assert type(end.error) is RunError
        assert "order[1, 2, 0]" in str(end.error) and "\n" not in str(end.error)


@pytest.mark.parametrize("codec", CODECS.values(), ids=str)
def test_codecs_keep_the_strides(codec: Any) -> None:
    x = empty_rows(PERMUTED, 4, "cpu").normal_()
    field = Field(PERMUTED.name, PERMUTED.shape, "float32", PERMUTED.order)
    encoded = codec.encode(field, x)
    assert codec.decode(field, encoded).stride() == x.stride()
    if len(encoded) == 1:
        assert encoded[field.name].stride() == x.stride()


class _Tray:
    """Both ends of an edge in memory, for several messages."""

    def __init__(self, schema: Schema) -> None:
        self._channel = MemoryChannel(schema, 4)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)


@pytest.mark.parametrize("rows", [12, 7])
def test_rows_of_several_replicas_are_joined_in_the_order(rows: int) -> None:
    schema = Schema(SCHEMA.fields, rows)
    edges = {(r, s): _Tray(schema) for r in range(2) for s in neighbour_replicas(r, 2, 3)}
    fields = content(rows)
    for r in range(2):
        part = replica_rows(rows, r, 2)
        out = RowScatter({s: edges[r, s] for s in neighbour_replicas(r, 2, 3)}, r, 2, 3)
        header = Header(Kind.TRAIN, 1, 1, part.stop - part.start, batch=rows)
        out.send(header, {name: tensor[part] for name, tensor in fields.items()})
    for s in range(3):
        inboxes = [edges[r, s] for r in neighbour_replicas(s, 3, 2)]
        part = replica_rows(rows, s, 3)
        got = RowGather(inboxes, schema).receive()
        check(got, {name: tensor[part] for name, tensor in fields.items()})


def test_a_replica_without_rows_adds_none() -> None:
    x = empty_rows(PERMUTED, 2, "cpu").normal_()
    joined_rows = join_rows(PERMUTED, [x, empty_rows(PERMUTED, 0, "cpu")])
    assert torch.equal(joined_rows, x) and joined_rows.stride() == x.stride()

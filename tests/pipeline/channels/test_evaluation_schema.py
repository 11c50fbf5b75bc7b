"""Edges whose evaluation messages have samples of another shape: one buffer, two schemas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from localpipe.fields import Field, Schema
from localpipe.pipeline.channels.channel import MemoryChannel
from localpipe.pipeline.channels.message import Header, Kind, Mismatch, Slot

SMALL = Schema((Field("h.0", (2, 3), "float32"), Field("target", (2,), "uint8")), 4)
LARGE = Schema((Field("h.0", (5, 9), "float32"), Field("target", (5,), "uint8")), 3)
BOTH = replace(SMALL, evaluation=LARGE)


def draw(schema: Schema, rows: int) -> dict[str, torch.Tensor]:
    h, target = schema.fields
    return {
        "h.0": torch.randn(rows, *h.shape),
        "target": torch.randint(0, 9, (rows, *target.shape), dtype=torch.uint8),
    }


def test_a_buffer_holds_the_larger_message() -> None:
    assert BOTH.nbytes == LARGE.nbytes > SMALL.nbytes
    assert replace(LARGE, evaluation=SMALL).nbytes == LARGE.nbytes


def test_digests_tell_the_schemas_of_evaluations_apart() -> None:
    others = [
        SMALL,
        replace(BOTH, evaluation=SMALL),
        replace(BOTH, evaluation=replace(LARGE, batch=2)),
    ]
    assert len({schema.digest for schema in [BOTH, *others]}) == 4


@pytest.mark.parametrize("rows", [1, 3])
def test_every_kind_of_message_comes_back_as_it_was(rows: int) -> None:
    slot, channel = Slot(BOTH), MemoryChannel(BOTH, 1)
    for kind, schema in ((Kind.TRAIN, SMALL), (Kind.TEST, LARGE), (Kind.VALIDATION, LARGE)):
        header, fields = Header(kind, 1, 1, rows), draw(schema, rows)
        slot.write(header, fields)
        channel.send(header, fields)
        for message in (slot.read(), channel.receive()):
            assert message.header == header
            for name, tensor in fields.items():
                assert torch.equal(message.fields[name], tensor)


def test_a_message_of_the_other_kind_does_not_fit() -> None:
    slot = Slot(BOTH)
    with pytest.raises(Mismatch, match=r"h.0 is \(1, 5, 9\) .* carries \(1, 2, 3\)"):
        slot.write(Header(Kind.TRAIN, 1, 1, 1), draw(LARGE, 1))
    with pytest.raises(Mismatch, match="sample count is 4, the edge holds at most 3"):
        slot.write(Header(Kind.TEST, 1, 1, 4), draw(LARGE, 4))

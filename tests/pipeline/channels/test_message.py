"""The byte buffer of an edge: layout, header, shorter batches, refusals.

Views of one buffer do not disturb each other.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from localpipe.fields import ALIGNMENT, VERSION, Field, Schema
from localpipe.pipeline.channels.message import _HEADER, Flag, Header, Kind, Mismatch, Slot

FIELDS = (
    Field("h.0", (3, 5), "float32"),
    Field("half", (7,), "float16"),
    Field("brain", (2, 2, 2), "bfloat16"),
    Field("image", (1, 3, 3), "uint8"),
    Field("target", (), "int64"),
)
SCHEMA = Schema(FIELDS, 4)


def content(count: int = 4, fields: tuple[Field, ...] = FIELDS) -> dict[str, Tensor]:
    """Return random tensors for the fields, (count, *shape) each."""
    made = {}
    for field in fields:
        dtype = getattr(torch, field.dtype)
        shape = (count, *field.shape)
        whole = torch.randint(0, 256, shape).to(dtype)
        made[field.name] = torch.randn(shape).to(dtype) if dtype.is_floating_point else whole
    return made


def header(count: int = 4, kind: Kind = Kind.TRAIN) -> Header:
    return Header(kind, 7, 2, count)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# --- Layout


@pytest.mark.parametrize("batch", [1, 4, 33])
def test_fields_lie_aligned_behind_the_header_and_do_not_overlap(batch: int) -> None:
    schema = Schema(FIELDS, batch)
    starts = schema.offsets
    ends = [start + field.nbytes * batch for start, field in zip(starts, FIELDS, strict=True)]
    assert all(start % ALIGNMENT == 0 for start in starts)
    assert starts[0] >= _HEADER.size
    assert all(end <= following for end, following in zip(ends, starts[1:], strict=False))
    assert ends[-1] <= schema.nbytes and schema.nbytes % ALIGNMENT == 0


def test_bytes_of_a_field_are_those_of_its_samples() -> None:
    assert [field.nbytes for field in FIELDS] == [60, 14, 16, 9, 8]


def test_tensors_lie_in_the_buffer_where_the_schema_says() -> None:
    slot, fields = Slot(SCHEMA), content()
    slot.write(header(), fields)
    buffer = slot.bytes.numpy().tobytes()
    for field, start in zip(FIELDS, SCHEMA.offsets, strict=True):
        assert buffer[start : start + field.nbytes * 4] == raw(fields[field.name])


def test_buffer_has_one_size_however_few_samples_it_carries() -> None:
    slot = Slot(SCHEMA)
    sizes = set()
    for count in (4, 1, 0):
        slot.write(header(count), content(count))
        sizes.add(slot.bytes.numel())
    assert sizes == {SCHEMA.nbytes}


def test_schema_without_fields_is_a_header_alone() -> None:
    slot = Slot(Schema((), 4))
    slot.write(header(0, Kind.EMPTY), {})
    assert slot.bytes.numel() == ALIGNMENT
    assert slot.read().header == header(0, Kind.EMPTY) and slot.read().fields == {}


# --- Round trip


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("flags", [Flag.NONE, Flag.SAVE_AFTER, Flag.END_EVAL | Flag.STOP, 7])
@pytest.mark.parametrize(
    ("step", "epoch", "saved"), [(0, 0, -1), (2**40, 2**31, 2**39), (417, 3, 0)]
)
def test_header_reads_back_as_written(
    kind: Kind, flags: int, step: int, epoch: int, saved: int
) -> None:
    slot = Slot(SCHEMA)
    written = Header(kind, step, epoch, 2, flags, saved, part=3, samples=11)
    slot.write(written, content(2))
    found = slot.read().header
    assert found == written
    assert isinstance(found.kind, Kind)


@pytest.mark.parametrize("count", [4, 3, 1])
def test_tensors_read_back_bit_for_bit(count: int) -> None:
    slot, fields = Slot(SCHEMA), content(count)
    fields["h.0"][0, 0, :2] = torch.tensor([float("nan"), -0.0])
    slot.write(header(count), fields)
    found = slot.read().fields
    assert list(found) == [field.name for field in FIELDS]
    for name, tensor in fields.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype
        assert raw(found[name]) == raw(tensor)


def test_shorter_batch_fills_fewer_samples_and_leaves_the_others_alone() -> None:
    slot, full, short = Slot(SCHEMA), content(4), content(2)
    slot.write(header(4), full)
    slot.write(header(2), short)
    assert len(slot.read().fields["h.0"]) == 2
    assert torch.equal(slot.tensors["h.0"][:2], short["h.0"])
    assert torch.equal(slot.tensors["h.0"][2:], full["h.0"][2:])


def test_message_without_samples_needs_no_tensors() -> None:
    slot = Slot(SCHEMA)
    slot.write(Header(Kind.EMPTY, 9, 1, 0, Flag.STOP), {})
    message = slot.read()
    assert message.header.flags == Flag.STOP
    assert all(len(tensor) == 0 for tensor in message.fields.values())


def test_write_copies_so_that_the_sender_may_go_on() -> None:
    slot, fields = Slot(SCHEMA), content()
    before = fields["h.0"].clone()
    slot.write(header(), fields)
    fields["h.0"].zero_()
    assert torch.equal(slot.read().fields["h.0"], before)


def test_tensor_of_another_memory_format_arrives_contiguous() -> None:
    schema = Schema((Field("h.0", (3, 4, 5), "float32"),), 2)
    slot, h = Slot(schema), torch.randn(2, 3, 4, 5)
    slot.write(header(2), {"h.0": h.to(memory_format=torch.channels_last)})
    found = slot.read().fields["h.0"]
    assert torch.equal(found, h) and found.is_contiguous()


def test_no_graph_crosses_a_boundary() -> None:
    slot, fields = Slot(SCHEMA), content()
    slot.write(header(), {**fields, "h.0": fields["h.0"].requires_grad_()})
    assert not slot.read().fields["h.0"].requires_grad


def test_tensors_beyond_the_schema_stay_behind() -> None:
    slot = Slot(Schema(FIELDS[:1], 4))
    slot.write(header(), content())
    assert list(slot.read().fields) == ["h.0"]


# --- Refusals


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("h.0", torch.zeros(4, 5, 3)),
        ("h.0", torch.zeros(4, 15)),
        ("h.0", torch.zeros(3, 3, 5)),
        ("h.0", torch.zeros(4, 3, 5, dtype=torch.float64)),
        ("half", torch.zeros(4, 7)),
        ("target", torch.zeros(4, 1, dtype=torch.int64)),
        ("target", torch.zeros(4, dtype=torch.int32)),
    ],
)
def test_tensor_of_another_shape_or_dtype_is_refused_by_name(name: str, tensor: Tensor) -> None:
    with pytest.raises(Mismatch, match=f"^{name} is ") as caught:
        Slot(SCHEMA).write(header(), {**content(), name: tensor})
    assert str(tuple(tensor.shape)) in str(caught.value) and str(tensor.dtype) in str(caught.value)


@pytest.mark.parametrize(
    "other",
    [
        Schema((Field("h.1", (3, 5), "float32"), *FIELDS[1:]), 4),
        Schema((Field("h.0", (5, 3), "float32"), *FIELDS[1:]), 4),
        Schema((Field("h.0", (3, 5), "float16"), *FIELDS[1:]), 4),
        Schema((*FIELDS[1:], FIELDS[0]), 4),
        Schema(FIELDS[:-1], 4),
        Schema(FIELDS, 5),
    ],
    ids=["name", "shape", "dtype", "order", "fewer", "batch"],
)
def test_digest_differs_with_everything_a_schema_says(other: Schema) -> None:
    assert other.digest != SCHEMA.digest
    assert Schema(tuple(FIELDS), 4).digest == SCHEMA.digest


def test_digest_tells_names_and_shapes_apart_that_read_alike() -> None:
    def digest(*fields: Field) -> int:
        return Schema(fields, 4).digest

    assert digest(Field("a", (11,), "uint8")) != digest(Field("a", (1, 1), "uint8"))
    assert digest(Field("a1", (), "uint8")) != digest(Field("a", (1,), "uint8"))


def foreign(start: int, written: bytes) -> Slot:
    """Return a slot with a good message of which some header bytes were written over."""
    slot = Slot(SCHEMA)
    slot.write(header(), content())
    slot.bytes[start : start + len(written)] = torch.frombuffer(
        bytearray(written), dtype=torch.uint8
    )
    return slot


def test_buffer_with_another_magic_is_refused() -> None:
    with pytest.raises(Mismatch, match="magic"):
        foreign(0, b"what").read()


def test_buffer_that_was_never_written_is_refused() -> None:
    with pytest.raises(Mismatch, match="magic"):
        Slot(SCHEMA).read()


def test_buffer_of_another_version_is_refused() -> None:
    with pytest.raises(Mismatch, match=f"message version is 99, expected {VERSION}"):
        foreign(4, b"\x63\x00").read()


def test_buffer_of_another_schema_is_refused() -> None:
    other = Slot(Schema((Field("h.1", (3, 5), "float32"), *FIELDS[1:]), 4))
    other.write(header(), content(4, other.schema.fields))
    slot = Slot(SCHEMA)
    slot.bytes.copy_(other.bytes)
    with pytest.raises(Mismatch, match="schema digest"):
        slot.read()


def forged(kind: int, count: int) -> Slot:
    packed = _HEADER.pack(b"lpip", VERSION, kind, 0, 1, 1, count, -1, SCHEMA.digest, 0, 0, 0, 0)
    return foreign(0, packed)


def test_more_samples_than_the_buffer_holds_are_refused() -> None:
    assert forged(0, 4).read().header.count == 4
    with pytest.raises(Mismatch, match="sample count is 5, the edge holds at most 4"):
        forged(0, 5).read()


def test_kind_that_does_not_exist_is_refused() -> None:
    with pytest.raises(Mismatch, match="kind"):
        forged(200, 4).read()


# --- Windows


@pytest.mark.parametrize("count", [4, 3])
def test_write_into_one_field_in_place_leaves_the_others_fit_for_backward(count: int) -> None:
    slot, fields = Slot(SCHEMA), content(count)
    slot.write(header(count), fields)
    found = slot.read().fields
    weight = torch.ones(3, 5, requires_grad=True)
    loss = (weight * found["h.0"]).sum()  # saves h.0 for backward
    version = found["h.0"]._version
    found["half"].add_(1)
    found["target"].zero_()
    assert torch.equal(found["h.0"], fields["h.0"]) and found["h.0"]._version == version
    assert not torch.equal(found["half"], fields["half"])
    loss.backward()
    assert weight.grad is not None
    assert torch.allclose(weight.grad, fields["h.0"].sum(0))


@pytest.mark.parametrize("count", [4, 3])
def test_write_into_a_saved_field_itself_is_still_caught_by_autograd(count: int) -> None:
    slot = Slot(SCHEMA)
    slot.write(header(count), content(count))
    found = slot.read().fields
    loss = (torch.ones(3, 5, requires_grad=True) * found["h.0"]).sum()
    found["h.0"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_every_field_has_its_own_room() -> None:
    slot, fields = Slot(SCHEMA), content()
    slot.write(header(), fields)
    for name, tensor in slot.tensors.items():
        tensor.fill_(1)
        for other in fields.keys() - {name}:
            assert torch.equal(slot.tensors[other], fields[other])
        tensor.copy_(fields[name])

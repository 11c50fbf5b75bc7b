"""The message that crosses an edge: one byte buffer of fixed size, a header, then the tensors.

    | header, 128 bytes | pad | h.0: batch x shape | pad | target: batch x shape | ...

A shorter batch fills fewer samples of the same buffer. The header states how many, so no size is
ever negotiated.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from localpipe.fields import VERSION, Field, Schema

_MAGIC = b"lpip"
_HEADER = struct.Struct("<4sHBBQIIqQIIIQ")


class Kind(enum.IntEnum):
    """What a stage does with a message."""

    TRAIN = 0
    TEST = 1
    VALIDATION = 2
    EMPTY = 3  # carries flags only

    @property
    def is_evaluation(self) -> bool:
        """Whether a stage computes its metric and does not train: for TEST and VALIDATION."""
        return self in (Kind.TEST, Kind.VALIDATION)


_KINDS = frozenset(Kind)


class Flag:
    """Bits of a header's flags, which travel with the batches instead of control messages.

    SAVE_AFTER: write a checkpoint after this message. END_EVAL: the last message of an evaluation's
    split. STOP: the last message of all. MORE: see below. They are plain numbers. Every stage reads
    them in every step, and the arithmetic of an enum would be a measurable part of a step.
    """

    NONE = 0
    SAVE_AFTER = 1
    END_EVAL = 2
    STOP = 4
    MORE = 8  # another message of the same step follows; the update waits for it


@dataclass(frozen=True)
class Header:
    """The header of a message.

    step, epoch: counted from 1. Step 0 is before the first one. count: samples of the message that
    this replica has. saved: the newest step that the sender and all stages before it have on disk,
    or -1. A step may have several messages: part counts them from 0, and samples are the step's in
    all of them (0: in this one only). batch: samples of the message over all replicas (0: all of
    them are here). number: of the message on its edge, counted from 0 with run.recover, else 0.
    """

    kind: Kind
    step: int
    epoch: int
    count: int
    flags: int = Flag.NONE
    saved: int = -1
    part: int = 0
    samples: int = 0
    batch: int = 0
    number: int = 0

    @property
    def total_count(self) -> int:
        """Samples of the message over all replicas: `batch`, or `count` where batch is 0."""
        return self.batch or self.count

    @property
    def weight(self) -> float:
        """The fraction of its step's samples that this replica's message has, count / samples.

        It is 1.0 where samples is 0.
        """
        if not self.samples:
            return 1.0
        return self.count / self.samples

    @property
    def ends_step(self) -> bool:
        """Whether Flag.MORE is not set. The update follows such a training message."""
        return not self.flags & Flag.MORE


@dataclass(frozen=True)
class Message:
    """A header and its tensors by name, (count, *shape) each. A message of kind EMPTY has no rows.

    The tensors are valid until the next receive on the same channel. They are read-only.
    """

    header: Header
    fields: Mapping[str, Tensor]


class Mismatch(Exception):  # noqa: N818 - always caught and raised again with the neighbour's name
    """A buffer or a message does not fit the edge."""


class Slot:
    """One message buffer: `bytes` is what travels, `tensors` are typed windows on the same memory.

    memory: uint8, schema.nbytes elements on `device`. It is used in place. None stands for new
    zeros. The tensors have the shape (schema.batch, *shape). They lie in memory as their field's
    order says. Where evaluation messages have a schema of their own, they have windows of their own
    on the same memory.

    Every window is a tensor of its own over the shared storage, not a view. A block may therefore
    write into its input in place without marking the other fields as modified.
    """

    def __init__(
        self, schema: Schema, device: torch.device | str = "cpu", memory: Tensor | None = None
    ) -> None:
        self.schema = schema
        if memory is None:
            memory = torch.zeros(schema.nbytes, dtype=torch.uint8, device=device)
        self.bytes = memory
        self.header_bytes = memory[: _HEADER.size]
        # The header of a slot on a GPU is packed on the host, so that the GPU is not waited for.
        self._packed_header = self.header_bytes
        if torch.device(device).type == "cuda":
            self._packed_header = torch.zeros(_HEADER.size, dtype=torch.uint8, pin_memory=True)
        self.tensors = _open_windows(schema, memory, device)
        self._evaluation_tensors = self.tensors
        if schema.evaluation is not None:
            self._evaluation_tensors = _open_windows(schema.evaluation, memory, device)

    def write(self, header: Header, fields: Mapping[str, Tensor]) -> None:
        """Copy a message in. Only the first header.count rows of every tensor change.

        fields: tensors with the schema's names, shapes and dtypes, and header.count rows. Others
        are ignored. Without rows none is read. An evaluation message may lack some, whose windows
        keep their values.
        Raises Mismatch if the message does not fit. Some fields may be written by then. Raises
        struct.error if a header's number is out of its range.
        """
        self.write_fields(header, fields)
        self._write_header(header)

    def write_fields(self, header: Header, fields: Mapping[str, Tensor]) -> None:
        """Copy a message in as `write` does, without the bytes of its header."""
        self._check_count(header)
        if header.count == 0:
            return
        for field in self.schema.choose(header.kind.is_evaluation).fields:
            if field.name in fields:
                self._write_field(field, fields[field.name], header)
            elif not header.kind.is_evaluation:  # gradients travel with training batches only
                raise Mismatch(f"{field.name} is missing, the edge carries it")

    def _check_count(self, header: Header) -> None:
        batch = self.schema.choose(header.kind.is_evaluation).batch
        if header.count > batch:
            raise Mismatch(f"sample count is {header.count}, the edge holds at most {batch}")

    def _find_windows(self, header: Header) -> dict[str, Tensor]:
        if header.kind.is_evaluation:
            return self._evaluation_tensors
        return self.tensors

    def _write_header(self, header: Header) -> None:
        _HEADER.pack_into(
            self._packed_header.numpy().data,
            0,
            _MAGIC,
            VERSION,
            header.kind,
            header.flags,
            header.step,
            header.epoch,
            header.count,
            header.saved,
            self.schema.digest,
            header.part,
            header.samples,
            header.batch,
            header.number,
        )
        if self._packed_header is not self.header_bytes:
            self.header_bytes.copy_(self._packed_header, non_blocking=True)

    def _write_field(self, field: Field, tensor: Tensor, header: Header) -> None:
        count = header.count
        window = self._find_windows(header)[field.name]
        expected = (count, *field.shape)
        if tuple(tensor.shape) != expected or tensor.dtype != window.dtype:
            raise Mismatch(
                f"{field.name} is {tuple(tensor.shape)} {tensor.dtype}, "
                f"the edge carries {expected} {window.dtype}"
            )
        if count < len(window):
            window = window[:count]
        window.copy_(tensor.detach())

    def read(self, header_bytes: Tensor | None = None) -> Message:
        """Check the header and return the message, as windows on this buffer for all of its fields.

        header_bytes: a copy of the header on the host. Without it the slot's own is read, and a GPU
        is waited for. Raises Mismatch if magic, version, schema or kind differ, or if the count
        exceeds the batch.
        """
        if header_bytes is None:
            header_bytes = self.header_bytes
        values = _HEADER.unpack_from(header_bytes.cpu().numpy().data)
        magic, version, kind, flags, step, epoch, count, saved, digest = values[:9]
        part, samples, batch, number = values[9:]
        _check_equal("magic", magic, _MAGIC)
        _check_equal("message version", version, VERSION)
        _check_equal("schema digest", digest, self.schema.digest)
        if kind not in _KINDS:
            numbers = ", ".join(str(int(number)) for number in Kind)
            raise Mismatch(f"message kind is {kind}, expected one of {numbers}")
        header = Header(Kind(kind), step, epoch, count, flags, saved, part, samples, batch, number)
        self._check_count(header)
        return self.message(header)

    def message(self, header: Header) -> Message:
        """Return the message that was written with a header, as windows on this buffer, unchecked.

        The fields are all of the schema's, (header.count, *shape) each.
        """
        windows = self._find_windows(header)
        if header.count == self.schema.choose(header.kind.is_evaluation).batch:
            return Message(header, dict(windows))
        fields = {name: tensor[: header.count] for name, tensor in windows.items()}
        return Message(header, fields)


def _open_windows(schema: Schema, memory: Tensor, device: torch.device | str) -> dict[str, Tensor]:
    """Return a tensor (batch, *shape) for every field of a schema, on the memory of a slot."""
    storage, start = memory.untyped_storage(), memory.storage_offset()
    windows = {}
    for field, offset in zip(schema.fields, schema.offsets, strict=True):
        dtype = getattr(torch, field.dtype)
        shape = (schema.batch, *field.shape)
        window = torch.empty(0, dtype=dtype, device=device)
        window.set_(storage, (start + offset) // dtype.itemsize, shape, field.strides)
        windows[field.name] = window
    return windows


def empty_rows(field: Field, rows: int, device: torch.device | str = "meta") -> Tensor:
    """Return a tensor (rows, *shape) without values, in the dtype and the order of a field."""
    dtype = getattr(torch, field.dtype)
    return torch.empty_strided((rows, *field.shape), field.strides, dtype=dtype, device=device)


def join_rows(field: Field, parts: Sequence[Tensor]) -> Tensor:
    """Return the rows of several tensors of a field after each other, a new tensor in its order.

    parts: at least one. Each is (rows, *shape) and may have no rows.
    """
    if not field.order:
        return torch.cat(list(parts))
    rows = sum(len(part) for part in parts)
    joined = empty_rows(field, rows, parts[0].device)
    torch.cat(list(parts), out=joined)
    return joined


def _check_equal(name: str, value: object, expected: object) -> None:
    if value != expected:
        raise Mismatch(f"{name} is {value!r}, expected {expected!r}")


def replica_rows(rows: int, replica: int, replicas: int) -> slice:
    """Return the rows of a batch of `rows` that one replica of a stage has: consecutive ones.

    replica: the index, from 0. replicas: their number, at least 1. Sizes differ by at most one, and
    the slice may be empty. Together the slices of all replicas cover the batch once.
    """
    return slice(replica * rows // replicas, (replica + 1) * rows // replicas)


def overlapping_rows(a: slice, b: slice) -> slice:
    """Return the rows that two replicas of neighbouring stages share.

    Both slices have integer bounds. Without common rows the result is an empty slice, whose start
    and stop are equal.
    """
    start = max(a.start, b.start)
    return slice(start, max(start, min(a.stop, b.stop)))

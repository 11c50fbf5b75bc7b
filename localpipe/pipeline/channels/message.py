"""What crosses an edge: one byte buffer of a fixed size, a header and then the tensors of a schema.

    | header, 128 bytes | pad | h.0: batch x shape | pad | target: batch x shape | ...

A shorter batch fills fewer samples of the same buffer. The header says how many, so nothing is ever negotiated.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from localpipe.fields import VERSION, Schema

_MAGIC = b"lpip"
_HEADER = struct.Struct("<4sHBBQIIqQIII")


class Kind(enum.IntEnum):
    """What a message asks of a stage."""

    TRAIN = 0
    TEST = 1
    VALIDATION = 2
    EMPTY = 3  # carries flags only

    @property
    def evaluates(self) -> bool:
        """Whether a stage only judges this message."""
        return self in (Kind.TEST, Kind.VALIDATION)


_KINDS = frozenset(Kind)


class Flag:
    """Marks that travel with the batches, in place of control messages: bits of a header's flags.

    Plain numbers: every stage asks for them in every step, and an enum's own arithmetic would be a part of what a step costs.
    """

    NONE = 0
    SAVE_AFTER = 1
    END_EVAL = 2
    STOP = 4
    MORE = 8  # of the same step follows; the update waits for it


@dataclass(frozen=True)
class Header:
    """What a message says of itself. `saved` is the newest step that the sender and all before it have on disk, or -1.

    A step may take several messages: `part` counts them from 0, `samples` are the step's in all of them (0: in this one).
    `batch` are the message's over all replicas, of which `count` are here (0: all).
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

    @property
    def whole(self) -> int:
        """The message's samples over all replicas."""
        return self.batch or self.count

    @property
    def share(self) -> float:
        """This message's part of its step's samples, 0..1."""
        return self.count / self.samples if self.samples else 1.0

    @property
    def ends_step(self) -> bool:
        """Whether the update follows this message."""
        return not self.flags & Flag.MORE


@dataclass(frozen=True)
class Message:
    """A header and its tensors, (count, *shape) each. Valid until the next receive on the same channel."""

    header: Header
    fields: Mapping[str, Tensor]


class Mismatch(Exception):  # noqa: N818 - it is caught and told as a sentence, never shown
    """A buffer does not hold what its reader expects."""


class Slot:
    """One message buffer: `bytes` is what travels, `tensors` are typed windows on the same memory.

    Every window is a tensor of its own over the shared storage, not a view, so that a block which writes into its
    input in place never marks the other fields as modified.
    """

    def __init__(
        self, schema: Schema, device: torch.device | str = "cpu", memory: Tensor | None = None
    ) -> None:
        self.schema = schema
        self.bytes = (
            torch.zeros(schema.nbytes, dtype=torch.uint8, device=device)
            if memory is None
            else memory
        )
        self.header_bytes = self.bytes[: _HEADER.size]
        # A header that is on its way to a device is written on the host, where nobody has to be waited for.
        on_device = torch.device(device).type == "cuda"
        self._staged = (
            torch.zeros(_HEADER.size, dtype=torch.uint8, pin_memory=True)
            if on_device
            else self.header_bytes
        )
        storage, begin = self.bytes.untyped_storage(), self.bytes.storage_offset()
        self.tensors: dict[str, Tensor] = {}
        for field, offset in zip(schema.fields, schema.offsets, strict=True):
            dtype = getattr(torch, field.dtype)
            shape = (schema.batch, *field.shape)
            window = torch.empty(0, dtype=dtype, device=device)
            stride = torch.empty(shape, device="meta").stride()
            self.tensors[field.name] = window.set_(
                storage, (begin + offset) // dtype.itemsize, shape, stride
            )

    def write(self, header: Header, fields: Mapping[str, Tensor]) -> None:
        """Copy a message in. Tensors must have the schema's names, shapes and dtypes, and header.count samples."""
        if header.count > self.schema.batch:
            raise Mismatch(
                f"sample count is {header.count}, the edge holds at most {self.schema.batch}"
            )
        _HEADER.pack_into(
            self._staged.numpy().data,
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
        )
        if self._staged is not self.header_bytes:
            self.header_bytes.copy_(self._staged, non_blocking=True)
        if header.count == 0:
            return
        full = header.count == self.schema.batch
        for field in self.schema.fields:
            if header.kind.evaluates and field.name not in fields:
                continue  # gradients travel with training batches only
            if field.name not in fields:
                raise Mismatch(f"{field.name} is missing, the edge carries it")
            tensor, window = fields[field.name], self.tensors[field.name]
            expected = (header.count, *field.shape)
            if tuple(tensor.shape) != expected or tensor.dtype != window.dtype:
                raise Mismatch(
                    f"{field.name} is {tuple(tensor.shape)} {tensor.dtype}, the edge carries {expected} {window.dtype}"
                )
            (window if full else window[: header.count]).copy_(tensor.detach())

    def read(self, header_bytes: Tensor | None = None) -> Message:
        """Check the header and return the message, as windows on this buffer; a copy of the header may be on the host."""
        packed = self.header_bytes if header_bytes is None else header_bytes
        magic, version, kind, flags, step, epoch, count, saved, digest, part, samples, batch = (
            _HEADER.unpack_from(packed.cpu().numpy().data)
        )
        for what, got, expected in (
            ("magic", magic, _MAGIC),
            ("message version", version, VERSION),
            ("schema digest", digest, self.schema.digest),
        ):
            if got != expected:
                raise Mismatch(f"{what} is {got!r}, expected {expected!r}")
        if kind not in _KINDS:
            raise Mismatch(
                f"message kind is {kind}, expected one of {', '.join(str(int(k)) for k in Kind)}"
            )
        if count > self.schema.batch:
            raise Mismatch(f"sample count is {count}, the edge holds at most {self.schema.batch}")
        return self.message(
            Header(Kind(kind), step, epoch, count, flags, saved, part, samples, batch)
        )

    def message(self, header: Header) -> Message:
        """Return the message that was written with a header, as windows on this buffer."""
        full = header.count == self.schema.batch
        return Message(
            header, {name: t if full else t[: header.count] for name, t in self.tensors.items()}
        )


def replica_rows(rows: int, replica: int, replicas: int) -> slice:
    """Return the rows of a batch that one replica of a stage holds."""
    return slice(replica * rows // replicas, (replica + 1) * rows // replicas)


def overlapping_rows(a: slice, b: slice) -> slice:
    """Return the rows that two replicas of neighbouring stages have in common, empty where there are none."""
    start = max(a.start, b.start)
    return slice(start, max(start, min(a.stop, b.stop)))

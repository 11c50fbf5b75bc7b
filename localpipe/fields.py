"""Names, shapes and dtypes of the tensors that cross an edge, and their offsets in a message.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

IMAGE = "image"  # the field of inputs that are images of bytes
INPUT = "input"  # the field of other inputs
VERSION = 3  # of the header and of the order of fields
ALIGNMENT = 128
# Bytes of one element, for every dtype that may cross an edge.
ITEM_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


@dataclass(frozen=True)
class Field:
    """One named tensor of a message, (B, *shape); `dtype` is torch's name without `torch.`.

    The dtypes that may cross an edge are the keys of ITEM_BYTES. order: the dimensions of `shape`
    from the outermost to the innermost in memory, as (1, 2, 0) for (C, H, W) whose channels are
    innermost. The batch is always outermost. () is a contiguous tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    order: tuple[int, ...] = ()

    @property
    def strides(self) -> tuple[int, ...]:
        """The numbers between neighbours along the batch and every dimension of `shape`.

        Raises IndexError or KeyError if `order` does not name every dimension once.
        """
        return ordered_strides(self.shape, self.order)

    @property
    def nbytes(self) -> int:
        """Bytes of one sample. Raises KeyError for a dtype that may not cross an edge."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Schema:
    """The fields of an edge and the largest batch they hold, in samples.

    evaluation: the same of evaluation messages, where their samples have other shapes, else None.
    Both lie in one buffer, which holds the larger of the two.
    """

    fields: tuple[Field, ...]
    batch: int
    evaluation: Schema | None = None

    def choose(self, is_evaluation: bool) -> Schema:
        """Return the schema of evaluation messages, or that of all others."""
        if is_evaluation and self.evaluation is not None:
            return self.evaluation
        return self

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Aligned byte offset of every field, in order; the first field follows the header.

        It is empty without fields. Raises KeyError for a dtype that may not cross an edge.
        """
        offsets = [ALIGNMENT]
        for field in self.fields:
            offsets.append(_align(offsets[-1] + field.nbytes * self.batch))
        return tuple(offsets[:-1])

    @cached_property
    def nbytes(self) -> int:
        """Bytes of a whole message with the largest batch, header and padding included.

        It is the larger number where evaluation messages differ. Raises KeyError for a dtype that
        may not cross an edge.
        """
        nbytes = ALIGNMENT
        if self.fields:
            nbytes = _align(self.offsets[-1] + self.fields[-1].nbytes * self.batch)
        if self.evaluation is not None:
            nbytes = max(nbytes, self.evaluation.nbytes)
        return nbytes

    def has(self, name: str) -> bool:
        """Return whether there is a field of this name."""
        return any(field.name == name for field in self.fields)

    @cached_property
    def digest(self) -> int:
        """64 bits that differ when a name, a shape, a dtype, an order or the batch differs.

        It is not negative, and the same in every process. The order of the fields and the message
        version count too, and so does the schema of evaluation messages.
        """
        texts = []
        for field in self.fields:
            texts.append(f"{field.name}{list(field.shape)}{field.dtype}{describe_order(field)}")
        fields = " ".join(texts)
        text = f"{VERSION} {self.batch} {fields}"
        if self.evaluation is not None:
            text += f" evaluation {self.evaluation.digest}"
        content = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(content, "little")


def ordered_strides(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a dense tensor (B, *shape) by an order in memory, in elements.

    order: as of a Field, () for a contiguous tensor. The first stride is the batch's. A dimension
    without elements counts as one. Raises IndexError or KeyError if `order` does not name every
    dimension of `shape` once.
    """
    strides = {}
    stride = 1
    for dim in reversed(order or range(len(shape))):
        strides[dim] = stride
        stride *= max(shape[dim], 1)
    return (stride, *[strides[dim] for dim in range(len(shape))])


def describe_order(field: Field) -> str:
    """Return the order of a field as text, `` where the field is contiguous, else `order[1, 2, 0]`.

    Digests and handshakes compare it.
    """
    return f"order{list(field.order)}" if field.order else ""


def dtype_name(dtype: object) -> str:
    """Return torch's name of a dtype without `torch.`. Another object gives its text."""
    return str(dtype).removeprefix("torch.")


def _align(offset: int) -> int:
    """Round up to a multiple of ALIGNMENT."""
    return -(-offset // ALIGNMENT) * ALIGNMENT

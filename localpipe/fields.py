"""Field and Schema: the names, shapes and dtypes of the tensors that cross an edge. Imports no torch."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

VERSION = 2  # of the header and of the order of fields
ALIGNMENT = 128
# Bytes of a number of every dtype that may cross an edge.
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "uint8": 1}


@dataclass(frozen=True)
class Field:
    """One named tensor of a message, (B, *shape); `dtype` is torch's name without the `torch.`."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of one sample."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Schema:
    """The fields of an edge and the largest batch they hold."""

    fields: tuple[Field, ...]
    batch: int

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Byte offset of every field, aligned, behind the header."""
        ends = [ALIGNMENT]
        for field in self.fields:
            ends.append(_align(ends[-1] + field.nbytes * self.batch))
        return tuple(ends[:-1])

    @cached_property
    def nbytes(self) -> int:
        """Bytes of a whole message."""
        last = self.fields[-1].nbytes * self.batch if self.fields else 0
        return _align((self.offsets[-1] if self.fields else ALIGNMENT) + last)

    def has(self, name: str) -> bool:
        """Return whether a field is among them."""
        return any(field.name == name for field in self.fields)

    @cached_property
    def digest(self) -> int:
        """64 bits that differ when a name, a shape, a dtype, the order or the batch differs."""
        text = f"{VERSION} {self.batch} " + " ".join(
            f"{f.name}{list(f.shape)}{f.dtype}" for f in self.fields
        )
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def dtype_name(dtype: object) -> str:
    """Return torch's name of a dtype without the `torch.`."""
    return str(dtype).removeprefix("torch.")


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT

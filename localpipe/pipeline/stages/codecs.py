"""The coding of floating-point tensors that cross a boundary. A codec is one entry of CODECS."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from localpipe.fields import Field

GROUP = 64  # numbers that share a scale


class Codec(Protocol):
    """The coding of activations, contexts and gradients between two stages.

    A field is given as the stages compute with it: (B, *shape) in fp32. It crosses as one tensor or
    several, each of them with a row for every sample, so that replicas can exchange rows.
    """

    @property
    def name(self) -> str:
        """The value of `pipeline.wire_dtype`."""

    def coded_fields(self, field: Field) -> tuple[Field, ...]:
        """Return the fields that cross for an fp32 field. The first one has its name."""

    def encode(self, field: Field, tensor: Tensor) -> dict[str, Tensor]:
        """Return a tensor as it crosses the boundary, by the names of `coded_fields`.

        Runs in the sending stage. tensor: (B, *field.shape), fp32. A result may be the same tensor.
        """

    def decode(self, field: Field, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return a received tensor, (B, *field.shape) in fp32. Runs in the receiving stage.

        tensors: those of `coded_fields` by name, others are ignored. The result may be one of them.
        """


@dataclass(frozen=True)
class CastCodec:
    """A codec that rounds to another floating-point dtype. An fp32 tensor crosses unchanged.

    name: the value of `pipeline.wire_dtype`. dtype: torch's name without `torch.`.
    """

    name: str
    dtype: str

    def coded_fields(self, field: Field) -> tuple[Field, ...]:
        """Return the field in the codec's dtype."""
        return (Field(field.name, field.shape, self.dtype, field.order),)

    def encode(self, field: Field, tensor: Tensor) -> dict[str, Tensor]:
        """Return the tensor in the codec's dtype under the field's name. The shape stays the same.

        It is the same tensor where it has that dtype. What float16 cannot hold becomes infinite.
        """
        dtype: torch.dtype = getattr(torch, self.dtype)
        return {field.name: tensor.to(dtype)}

    def decode(self, field: Field, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor in fp32. The shape stays the same.

        An fp32 tensor is returned itself.
        """
        return tensors[field.name].float()


@dataclass(frozen=True)
class GroupCodec:
    """A codec of small whole numbers, and a scale for every 64 neighbours of a sample.

        sample, in the order of its field:  | 64 numbers | 64 numbers | ... | 1..64 |
        codes:  x / scale, rounded half to even           scale: max |x| of a group / limit

    A scale of 0 decodes to 0. A group that holds a number that is not finite decodes to NaN
    throughout. Decoding makes a new tensor.

    name: the value of `pipeline.wire_dtype`. bits: 8, or 4, where a byte holds two codes.
    """

    name: str
    bits: int

    @property
    def limit(self) -> int:
        """The largest code, 127 or 7. The smallest one is its negative."""
        return int(2 ** (self.bits - 1)) - 1

    def coded_fields(self, field: Field) -> tuple[Field, ...]:
        """Return the fields of the codes, under the field's name, and of the scales."""
        numbers = math.prod(field.shape)
        groups = -(-numbers // GROUP)
        codes = Field(field.name, (numbers,), "int8")
        if self.bits == 4:
            codes = Field(field.name, (-(-numbers // 2),), "uint8")
        return codes, Field(scale_field(field.name), (groups,), "float32")

    def encode(self, field: Field, tensor: Tensor) -> dict[str, Tensor]:
        """Return codes and scales, new tensors. The same code runs on every device."""
        numbers = _flatten(field, tensor)
        scale = numbers.new_empty(len(numbers), -(-numbers.shape[1] // GROUP))
        for part, part_scale in _pair_groups(numbers, scale):
            part_scale.copy_(part.abs().amax(-1, keepdim=True))
        scale.masked_fill_(~scale.isfinite(), math.nan).div_(self.limit)

        # A divisor of 1 where no code counts: the scale is 0 or NaN.
        divisor = scale.masked_fill(~(scale > 0), 1.0)
        codes = torch.empty_like(numbers)
        for (part, part_divisor), (part_codes, _) in zip(
            _pair_groups(numbers, divisor), _pair_groups(codes, divisor), strict=True
        ):
            torch.div(part, part_divisor, out=part_codes)
        # A scale below the normal numbers is inexact, and its codes could exceed the limit.
        codes.round_().nan_to_num_(nan=0.0).clamp_(-self.limit, self.limit)
        packed = codes.to(torch.int8)
        if self.bits == 4:
            packed = _pack_pairs(packed)
        return {field.name: packed, scale_field(field.name): scale}

    def decode(self, field: Field, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return a new fp32 tensor, which lies in memory as the field says."""
        codes, scale = tensors[field.name], tensors[scale_field(field.name)]
        if self.bits == 4:
            codes = _unpack_pairs(codes, math.prod(field.shape))
        numbers = codes.to(torch.float32)
        for part, part_scale in _pair_groups(numbers, scale):
            part.mul_(part_scale)
        return _unflatten(field, numbers)


def scale_field(name: str) -> str:
    """Return the name of the scales of a coded field, as `h.0.scale`."""
    return f"{name}.scale"


def _pair_groups(numbers: Tensor, scale: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return windows on whole groups and on the short last one, each beside its scales.

    numbers: (B, N). scale: (B, groups). The windows are (B, groups, 64) with (B, groups, 1), and
    (B, 1..63) with (B, 1). Either may be missing.
    """
    groups, rest = divmod(numbers.shape[1], GROUP)
    pairs = []
    if groups:
        whole = numbers[:, : groups * GROUP].unflatten(1, (groups, GROUP))
        pairs.append((whole, scale[:, :groups].unsqueeze(-1)))
    if rest:
        pairs.append((numbers[:, groups * GROUP :], scale[:, groups:]))
    return pairs


def _pack_pairs(codes: Tensor) -> Tensor:
    """Return int4 codes of int8, (B, N), two a byte of uint8: (B, N / 2 rounded up).

    A nibble is a code + 8. The first of two is the low one. The last byte of an odd N has a code 0.
    """
    if codes.shape[1] % 2:
        codes = F.pad(codes, (0, 1))
    # Two neighbouring bytes are one little-endian number: 0x0B0A becomes 0xBA.
    pairs = (codes + 8).view(torch.int16)
    return (pairs | pairs >> 4).bitwise_and_(0xFF).to(torch.uint8)


def _unpack_pairs(packed: Tensor, count: int) -> Tensor:
    """Return the int8 codes that `_pack_pairs` packed, (B, count)."""
    pairs = packed.to(torch.int16)
    pairs = (pairs | pairs << 4).bitwise_and_(0x0F0F)
    codes = pairs.view(torch.int8).sub_(8)
    return codes[:, :count]


def _flatten(field: Field, tensor: Tensor) -> Tensor:
    """Return samples as rows, (B, numbers), in the field's order in memory. It may be a view."""
    order = field.order or range(len(field.shape))
    arranged = tensor.permute(0, *[dim + 1 for dim in order])
    return arranged.reshape(len(tensor), math.prod(field.shape))


def _unflatten(field: Field, numbers: Tensor) -> Tensor:
    """Return rows of `_flatten` as (B, *shape), a view that lies in memory as the field says."""
    order = field.order or tuple(range(len(field.shape)))
    arranged = numbers.reshape(len(numbers), *[field.shape[dim] for dim in order])
    return arranged.permute(0, *[order.index(dim) + 1 for dim in range(len(order))])


# `pipeline.wire_dtype` -> codec.
CODECS: Mapping[str, Codec] = {
    "fp32": CastCodec("fp32", "float32"),
    "bf16": CastCodec("bf16", "bfloat16"),
    "fp16": CastCodec("fp16", "float16"),
    "int8": GroupCodec("int8", 8),
    "int4": GroupCodec("int4", 4),
}
FP32 = CODECS["fp32"]

"""The coding of floating-point tensors that cross a boundary. A codec is one entry of CODECS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Codec(Protocol):
    """The coding of activations, contexts and gradients between two stages."""

    @property
    def name(self) -> str:
        """The value of `pipeline.wire_dtype`."""

    @property
    def dtype(self) -> str:
        """The dtype that crosses, torch's name without the `torch.`."""

    def encode(self, tensor: Tensor) -> Tensor:
        """Return an fp32 tensor as it crosses the boundary. Runs in the sending stage.

        The result may be the same tensor.
        """

    def decode(self, tensor: Tensor) -> Tensor:
        """Return a received tensor as fp32. Runs in the receiving stage.

        The result may be the same tensor.
        """


@dataclass(frozen=True)
class CastCodec:
    """A codec that rounds to another floating-point dtype. An fp32 tensor crosses unchanged.

    name: the value of `pipeline.wire_dtype`. dtype: torch's name without `torch.`.
    """

    name: str
    dtype: str

    def encode(self, tensor: Tensor) -> Tensor:
        """Return the tensor in the codec's dtype. The shape stays the same.

        It is the same tensor where it has that dtype. What float16 cannot hold becomes infinite.
        """
        dtype: torch.dtype = getattr(torch, self.dtype)
        return tensor.to(dtype)

    def decode(self, tensor: Tensor) -> Tensor:
        """Return the tensor in fp32. The shape stays the same.

        An fp32 tensor is returned itself.
        """
        return tensor.float()


# `pipeline.wire_dtype` -> codec.
CODECS: Mapping[str, Codec] = {
    "fp32": CastCodec("fp32", "float32"),
    "bf16": CastCodec("bf16", "bfloat16"),
    "fp16": CastCodec("fp16", "float16"),
}

"""The weights of a stage as lines and as a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from localpipe.fields import dtype_name


def weight_lines(weights: Mapping[str, Tensor]) -> list[str]:
    """Return `name dtype shape sha256` of every tensor; the bytes are contiguous and little-endian."""
    lines = []
    for name, tensor in weights.items():
        data = tensor.detach().cpu().contiguous()
        content = hashlib.sha256(data.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        lines.append(f"{name} {dtype_name(data.dtype)} {list(data.shape)} {content}")
    return lines


def weights_digest(lines: Iterable[str]) -> str:
    """Return the SHA-256 of the lines in byte order, each ended by a newline."""
    ordered = sorted(line.encode() for line in lines)
    return hashlib.sha256(b"".join(line + b"\n" for line in ordered)).hexdigest()

"""Floating-point operations, as torch counts them, attention's on the CPU included."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def count_flops() -> FlopCounterMode:
    """Return a context that counts silently what runs inside."""
    return FlopCounterMode(display=False, custom_mapping=_FUSED)


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Return the operations of the scores and of the mixing of values."""
    return int(sdpa_flop_count(query, key, value))


def _backward(
    out: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    """Return the operations of the backward pass, which computes the scores once more."""
    return int(sdpa_backward_flop_count(out, query, key, value))


# torch counts attention's kernels on CUDA; this one, which stands for all of them in a plan, in its newest versions alone.
_FUSED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}

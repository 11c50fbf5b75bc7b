"""Floating-point operations, as torch counts them, attention on the CPU included."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def count_flops() -> FlopCounterMode:
    """Return a context that counts the operations inside and prints nothing.

    It is torch's FlopCounterMode: read `get_total_flops()`, where one multiply-accumulate counts as
    2. Enter it once.
    """
    return FlopCounterMode(display=False, custom_mapping=_FUSED)


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Return the operations of the scores and of the weighted sum of values."""
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    """Return the operations of the backward pass, which computes the scores once more."""
    return int(sdpa_backward_flop_count(grad, query, key, value))


# torch counts the attention kernels of CUDA. This one stands for all of them in a plan, and only
# the newest versions of torch count it.
_FUSED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}

"""In which numbers a stage computes, and in which they travel: what a device can do, and the flags of the process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from localpipe.config.resolved import Resolved
from localpipe.methods.objective import _kind

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def set_precision_flags(config: Resolved) -> None:
    """Set this process's flags: tf32 only where it is asked for, autotuning only where bits need not repeat."""
    if config.run.device != "cuda":
        return
    tf32 = config.run.precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32  # torch's own default is True
    torch.backends.cudnn.benchmark = not config.run.deterministic


def autocast_context(
    config: Resolved, device: torch.device
) -> Callable[[], AbstractContextManager[object]]:
    """Return what makes the context that a stage's networks run in: autocast for bf16 and fp16, else nothing."""
    dtype = _AUTOCAST.get(config.run.precision)
    return nullcontext if dtype is None else partial(torch.autocast, _kind(device), dtype)


def build_scaler(config: Resolved, device: torch.device) -> torch.amp.GradScaler | None:
    """Return the loss scale of one stage for fp16, or None."""
    if config.run.precision != "fp16" or device.type == "meta":
        return None
    return torch.amp.GradScaler(device.type)

"""The precision of a stage's arithmetic: autocast, loss scale and the flags of the process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

from localpipe.config.resolved import Resolved
from localpipe.methods.objective import autocast_device_type

_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def set_precision_flags(config: Resolved) -> None:
    """Set this process's CUDA flags: tf32 and cuDNN's autotuning.

    tf32 is on only with run.precision=tf32. Autotuning is on only where bits need not repeat.
    Without run.device=cuda it does nothing.
    """
    if config.run.device != "cuda":
        return
    uses_tf32 = config.run.precision == "tf32"
    if uses_tf32:
        torch.set_float32_matmul_precision("high")
    else:
        torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = uses_tf32  # torch's own default is True
    torch.backends.cudnn.benchmark = not config.run.deterministic


def autocast_context(
    config: Resolved, device: torch.device
) -> Callable[[], AbstractContextManager[object]]:
    """Return a function that makes the context of a stage's networks: autocast for bf16 and fp16.

    In other precisions the context does nothing. Call the function for every use.
    """
    dtype = _AUTOCAST_DTYPES.get(config.run.precision)
    if dtype is None:
        return nullcontext
    return partial(torch.autocast, autocast_device_type(device), dtype)


def build_scaler(config: Resolved, device: torch.device) -> torch.amp.GradScaler | None:
    """Return the loss scale of one stage for fp16, or None for other precisions.

    On the meta device it is None too.
    """
    if config.run.precision != "fp16" or device.type == "meta":
        return None
    return torch.amp.GradScaler(device.type)

"""Every stage's own optimizer, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from localpipe.sections import Optim

_WARMUP_START = 0.01
_WAYS = (
    "lr",
    "foreach",
    "fused",
    "capturable",
)  # of an optimizer's settings, those that its device decides


@dataclass(frozen=True)
class Schedule:
    """The learning rate of a run of `epochs` epochs of `steps_per_epoch` steps, whatever `max_steps` cuts off."""

    optim: Optim
    steps_per_epoch: int

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 1."""
        optim = self.optim
        assert optim.lr != "auto" and optim.warmup_epochs != "auto", "resolved before a run"
        peak, epochs, warmup = optim.lr, optim.epochs, optim.warmup_epochs
        epoch = (step - 1) // self.steps_per_epoch + 1
        if optim.schedule == "cosine_epoch":
            return _cosine_epoch(peak, epoch, epochs, warmup)
        ramp = warmup * self.steps_per_epoch
        if step <= ramp:
            return peak * step / ramp
        if optim.schedule == "cosine_epoch_from_0":
            # The papers' rate on ImageNet (InfoPro, AugLocal; released code): epochs counted from 0, so the last one moves.
            return _half_cosine(peak, (epoch - 1 - warmup) / max(epochs - warmup, 1))
        if optim.schedule == "cosine_step":
            progress = (step - 1 - ramp) / max(epochs * self.steps_per_epoch - ramp, 1)
            return _half_cosine(peak, progress)
        if optim.schedule == "step":
            return float(peak * 0.1 ** ((epoch > epochs // 2) + (epoch > epochs * 3 // 4)))
        return peak


def _half_cosine(peak: float, progress: float) -> float:
    return 0.5 * peak * (1 + math.cos(math.pi * progress))


def _cosine_epoch(peak: float, epoch: int, epochs: int, warmup: float) -> float:
    """Return the papers' rate of an epoch, counted from 1 (InfoPro, ContSup, AugLocal; released code).

    Half a cosine that is exactly 0 in the last epoch, blended over the first `warmup` epochs with a rate of 0.01.
    """
    rate = 0.5 * peak * (1 + math.cos(math.pi * epoch / epochs))
    if epoch > warmup:
        return rate
    return rate * (epoch - 1) / warmup + _WARMUP_START * (warmup + 1 - epoch) / warmup


def auto_warmup(epochs: int) -> int:
    """Return the published 10 warm-up epochs of 160, and fewer for shorter runs."""
    return min(10, epochs // 16)


def build(
    optim: Optim, parameters: Iterable[Tensor], captured: bool = False
) -> torch.optim.Optimizer | None:
    """Return the optimizer of one stage, or None where the stage has nothing to train.

    One kernel a step on CUDA, one call on the CPU (the bits of a loop over the parameters). Where the step is `captured`
    the learning rate is a tensor of the device.
    """
    parameters = list(parameters)
    if not parameters:
        return None
    device = parameters[0].device
    captured = captured and device.type == "cuda"
    rate: Any = torch.zeros((), device=device) if captured else 0.0
    way: dict[str, Any] = {"fused": True} if device.type == "cuda" else {"foreach": True}
    if optim.name == "adamw":
        return torch.optim.AdamW(
            parameters, lr=rate, weight_decay=optim.weight_decay, capturable=captured, **way
        )
    sgd = torch.optim.SGD(
        parameters,
        lr=rate,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
        **way,
    )
    if way.get("fused") and optim.momentum:
        # torch leaves them as they were found in memory where the first step of a loss scale is skipped.
        for parameter in parameters:
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate, in place where it is a tensor that a captured step reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def load_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take over a checkpoint's state; how the optimizer runs stays as it was built for this device."""
    own = optimizer.param_groups
    groups = [
        {**saved, **{key: mine[key] for key in _WAYS if key in mine}}
        for saved, mine in zip(state["param_groups"], own, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})

"""The optimizer of a stage: how it is built, driven and restored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from localpipe.config.keys import Optim

_WAYS = (
    "lr",
    "foreach",
    "fused",
    "capturable",
)  # of an optimizer's settings, those that its device decides


def build_optimizer(
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


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take over a checkpoint's state; how the optimizer runs stays as it was built for this device."""
    own = optimizer.param_groups
    groups = [
        {**saved, **{key: mine[key] for key in _WAYS if key in mine}}
        for saved, mine in zip(state["param_groups"], own, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})

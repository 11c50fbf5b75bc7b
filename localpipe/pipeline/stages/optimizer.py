"""The optimizer of a stage: which there are, how one is built, driven and restored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from localpipe.config import registry
from localpipe.config.keys import Optim

# The settings of an optimizer that depend on its device, not on the configuration.
_DEVICE_SETTINGS = ("lr", "foreach", "fused", "capturable")


@dataclass(frozen=True)
class OptimizerSpec:
    """One kind of optimizer.

    `build` gets the keys of `optim`, at least one parameter and whether the step is captured.
    `keys` are the configuration keys of `optim` that the optimizer reads. `states_per_parameter`
    returns how many tensors of a parameter's size the optimizer keeps, for counts of memory.
    """

    build: Callable[[Optim, Sequence[Tensor], bool], torch.optim.Optimizer]
    keys: tuple[str, ...]
    states_per_parameter: Callable[[Optim], int]


def find_optimizer(optim: Optim) -> OptimizerSpec:
    """Return the optimizer that `optim.name` stands for. Raises UserError for an unknown name."""
    spec: OptimizerSpec = registry.look_up(registry.OPTIMIZERS, optim.name, "config: optim.name")
    return spec


def build_optimizer(
    optim: Optim, parameters: Iterable[Tensor], captured: bool = False
) -> torch.optim.Optimizer | None:
    """Return the optimizer of one stage, or None where the stage has nothing to train.

    Parameters without requires_grad are left out.
    With `captured`, the learning rate of parameters on a CUDA device is a 0-dim tensor. The rate is
    0 until `set_rate`. Raises UserError for an unknown optim.name, if there are parameters.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    if not parameters:
        return None
    is_captured = captured and parameters[0].is_cuda
    return find_optimizer(optim).build(optim, parameters, is_captured)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group, in place where it is a tensor for a captured step."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a checkpoint's state. The settings that depend on the device stay as they are.

    state: of the optimizer's state_dict, which does not change. Raises ValueError if its groups or
    parameters differ in number, KeyError without `param_groups`, TypeError for None.
    """
    groups = []
    for saved, current in zip(state["param_groups"], optimizer.param_groups, strict=True):
        group = dict(saved)
        for setting in _DEVICE_SETTINGS:
            if setting in current:
                group[setting] = current[setting]
        groups.append(group)
    optimizer.load_state_dict({**state, "param_groups": groups})


def _initial_rate(device: torch.device, is_captured: bool) -> Any:
    if is_captured:
        return torch.zeros((), device=device)
    return 0.0


def _kernel_settings(device: torch.device) -> dict[str, Any]:
    """Return the settings for one kernel a step on CUDA, and one call a step on the CPU.

    The call computes the same bits as a loop over the parameters.
    """
    if device.type == "cuda":
        return {"fused": True}
    return {"foreach": True}


def _build_sgd(
    optim: Optim, parameters: Sequence[Tensor], is_captured: bool
) -> torch.optim.Optimizer:
    device = parameters[0].device
    optimizer = torch.optim.SGD(
        parameters,
        lr=_initial_rate(device, is_captured),
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        weight_decay=optim.weight_decay,
        **_kernel_settings(device),
    )
    if device.type == "cuda" and optim.momentum:
        # Where a loss scale skips the first step, torch leaves fused momentum uninitialised.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _count_sgd_states(optim: Optim) -> int:
    return int(optim.momentum > 0)


def _build_adamw(
    optim: Optim, parameters: Sequence[Tensor], is_captured: bool
) -> torch.optim.Optimizer:
    device = parameters[0].device
    return torch.optim.AdamW(
        parameters,
        lr=_initial_rate(device, is_captured),
        weight_decay=optim.weight_decay,
        capturable=is_captured,
        **_kernel_settings(device),
    )


def _count_adamw_states(optim: Optim) -> int:
    return 2


SGD = OptimizerSpec(
    build=_build_sgd,
    keys=("lr", "momentum", "nesterov", "weight_decay"),
    states_per_parameter=_count_sgd_states,
)
ADAMW = OptimizerSpec(
    build=_build_adamw,
    keys=("lr", "weight_decay"),
    states_per_parameter=_count_adamw_states,
)

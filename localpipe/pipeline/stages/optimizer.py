"""The optimizer of a stage: which there are, how one is built, driven and restored.

And what belongs to its update: clipped gradients and a moving average of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import get_ema_multi_avg_fn

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


class WeightAverage:
    """An exponential moving average of parameters, from the values that they have now.

    After every update a value is decay * value + (1 - decay) * parameter. decay: 0..1. The values
    stay at their addresses, as a captured step needs them to.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self._move = get_ema_multi_avg_fn(decay)
        self._parameters = list(parameters)
        self._values = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again with the values that the parameters have now."""
        torch._foreach_copy_(self._values, self._parameters)

    def update(self) -> None:
        """Move the values towards the parameters. It does not wait for a device."""
        self._move(self._values, self._parameters, None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the parameters the average's values inside the context.

        Only storages are exchanged, so the parameters have their own bits again afterwards.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for parameter, value in zip(self._parameters, self._values, strict=True):
            parameter.data, value.data = value.data, parameter.data


class Update:
    """The end of a step: clipped gradients, one step of the optimizer, and the moving average.

    `average` is None without optim.ema. parameters: those that the optimizer trains.
    """

    def __init__(
        self, optim: Optim, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        self.optimizer = optimizer
        self.average: WeightAverage | None = None
        if optim.ema is not None:
            self.average = WeightAverage(parameters, optim.ema)
        self._parameters = parameters
        self._clip = optim.clip

    def run(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Update the weights by the gradients, at the rate that is set. Nothing waits for CUDA.

        scaler: the loss scale that the gradients have. It is divided out before they are clipped.
        Where gradients overflowed, it skips the optimizer's step, and the average counts the
        weights as they are.
        """
        if self._clip is not None:
            if scaler is not None:
                scaler.unscale_(self.optimizer)
            clip_grad_norm_(self._parameters, self._clip)
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        if self.average is not None:
            self.average.update()


def build_update(
    optim: Optim, parameters: Iterable[Tensor], captured: bool = False
) -> Update | None:
    """Return the update of one stage, or None where the stage has nothing to train.

    The arguments and the error are those of `build_optimizer`.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = build_optimizer(optim, parameters, captured)
    if optimizer is None:
        return None
    return Update(optim, parameters, optimizer)


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


def _group_parameters(optim: Optim, parameters: Sequence[Tensor]) -> Any:
    """Return the groups by `optim.decay`: one, or the matrices and the rest without decay."""
    if optim.decay == "all":
        return parameters
    matrices = [parameter for parameter in parameters if parameter.dim() >= 2]
    rest = [parameter for parameter in parameters if parameter.dim() < 2]
    groups: list[dict[str, Any]] = []
    if matrices:
        groups.append({"params": matrices})
    if rest:
        groups.append({"params": rest, "weight_decay": 0.0})
    return groups


def _build_sgd(
    optim: Optim, parameters: Sequence[Tensor], is_captured: bool
) -> torch.optim.Optimizer:
    device = parameters[0].device
    optimizer = torch.optim.SGD(
        _group_parameters(optim, parameters),
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
        _group_parameters(optim, parameters),
        lr=_initial_rate(device, is_captured),
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        capturable=is_captured,
        **_kernel_settings(device),
    )


def _count_adamw_states(optim: Optim) -> int:
    return 2


SGD = OptimizerSpec(
    build=_build_sgd,
    keys=("lr", "momentum", "nesterov", "weight_decay", "decay"),
    states_per_parameter=_count_sgd_states,
)
ADAMW = OptimizerSpec(
    build=_build_adamw,
    keys=("lr", "betas", "eps", "weight_decay", "decay"),
    states_per_parameter=_count_adamw_states,
)

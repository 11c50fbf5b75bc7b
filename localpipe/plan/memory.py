"""The memory of a worker by kind, from counts alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from localpipe.config.resolved import Resolved
from localpipe.pipeline.channels.channel import RECEIVE_SLOTS
from localpipe.pipeline.stages.optimizer import find_optimizer
from localpipe.pipeline.stages.stage_plan import StagePlan
from localpipe.plan.costs import StageCost

_FLOAT = 4  # bytes: weights, gradients and optimizer state are fp32


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one worker by kind.

    `activations_bytes` are what autograd holds for a message. `buffers_bytes` are the messages in
    flight: `depth` sent, two received.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    buffers_bytes: int

    @property
    def total_bytes(self) -> int:
        """The bytes of all kinds together."""
        return sum(asdict(self).values())


def parameter_memory(params: int, config: Resolved, frozen: int = 0) -> MemoryUse:
    """Return the memory of `params` fp32 parameters, with their gradients and optimizer state.

    A moving average of the parameters counts as optimizer state. frozen: those of them that are not
    trained, and have weights alone. Activations and buffers are 0.
    """
    states = find_optimizer(config.optim).states_per_parameter(config.optim)
    states += int(config.optim.ema is not None)
    trained_bytes = (params - frozen) * _FLOAT
    return MemoryUse(params * _FLOAT, trained_bytes, states * trained_bytes, 0, 0)


def worker_memory(
    plans: Sequence[StagePlan], costs: Sequence[StageCost], config: Resolved, replicas: int = 1
) -> MemoryUse:
    """Return the memory of a worker that hosts consecutive stages of one replica.

    plans, costs: of these stages alone, at least one. Its boundaries to neighbours are edges. Its
    stages run in turn, so that only the largest one's activations are held at a time. A message is
    a batch, or one of the `optim.accumulate` that make one. replicas: each has its part of the
    message, rounded up, and of the buffers.
    """
    params = sum(cost.params + cost.aux_params + cost.context_params for cost in costs)
    fixed = parameter_memory(params, config, sum(cost.frozen_params for cost in costs))
    samples = _ceil_div(config.data.batch_size // config.optim.accumulate, replicas)
    activations = max(cost.activation_bytes_per_sample for cost in costs) * samples

    # Messages: two slots to receive, `depth` to send, and rings between the worker's own stages.
    depth = config.pipeline.depth
    buffers = 0
    if not plans[0].is_first:
        buffers += RECEIVE_SLOTS * plans[0].receives.nbytes
    if plans[-1].sends is not None:
        buffers += depth * plans[-1].sends.nbytes
    for plan in plans[:-1]:
        if plan.sends is not None:
            buffers += (depth + 1) * plan.sends.nbytes
    return MemoryUse(
        fixed.weights_bytes,
        fixed.gradients_bytes,
        fixed.optimizer_bytes,
        activations,
        _ceil_div(buffers, replicas),
    )


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)

"""What a stage keeps in memory, by kind, from counts alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from localpipe.config.resolved import Resolved
from localpipe.pipeline.stages.stage_plan import StagePlan
from localpipe.plan.costs import StageCost

_FLOAT = 4  # weights, gradients and optimizer state are fp32
RECEIVE_SLOTS = 2  # one message being read, one receive posted ahead


@dataclass(frozen=True)
class MemoryUse:
    """Bytes by kind. `buffers_bytes` are the messages in flight: `depth` on the way out, two on the way in."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    buffers_bytes: int

    @property
    def total_bytes(self) -> int:
        """All kinds together."""
        return sum(asdict(self).values())


def parameter_memory(params: int, config: Resolved) -> MemoryUse:
    """Return the memory of parameters alone: themselves, their gradients, their optimizer's state."""
    states = 2 if config.optim.name == "adamw" else int(config.optim.momentum > 0)
    return MemoryUse(params * _FLOAT, params * _FLOAT, states * params * _FLOAT, 0, 0)


def worker_memory(
    plans: Sequence[StagePlan], costs: Sequence[StageCost], config: Resolved, replicas: int = 1
) -> MemoryUse:
    """Return the memory of a worker that hosts consecutive stages of one replica, each boundary to a neighbour an edge.

    Its stages run in turn, so that only the largest one's activations are there at a time.
    """
    fixed = parameter_memory(
        sum(cost.params + cost.aux_params + cost.context_params for cost in costs), config
    )
    inner = [plan.sends.nbytes for plan in plans[:-1] if plan.sends is not None]
    into = 0 if plans[0].is_first else plans[0].receives.nbytes
    out = plans[-1].sends.nbytes if plans[-1].sends is not None else 0
    depth = config.pipeline.depth
    buffers = RECEIVE_SLOTS * into + depth * out + (depth + 1) * sum(inner)
    samples = -(-config.data.batch_size // replicas)
    held = max(cost.activation_bytes_per_sample for cost in costs) * samples
    return MemoryUse(
        fixed.weights_bytes,
        fixed.gradients_bytes,
        fixed.optimizer_bytes,
        held,
        -(-buffers // replicas),
    )

"""What a stage keeps in memory, by kind, from counts alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from localpipe.layout import narrow
from localpipe.partition import StagePlan
from localpipe.planner import StageCost
from localpipe.sections import Config

_FLOAT = 4  # weights, gradients and optimizer state are fp32
RECEIVE_SLOTS = 2  # one message being read, one receive posted ahead


@dataclass(frozen=True)
class Memory:
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


def of_parameters(params: int, config: Config) -> Memory:
    """Return the memory of parameters alone: themselves, their gradients, their optimizer's state."""
    states = 2 if config.optim.name == "adamw" else int(config.optim.momentum > 0)
    return Memory(params * _FLOAT, params * _FLOAT, states * params * _FLOAT, 0, 0)


def of_worker(
    plans: Sequence[StagePlan], costs: Sequence[StageCost], config: Config, replicas: int = 1
) -> Memory:
    """Return the memory of a worker that hosts consecutive stages of one replica, each boundary to a neighbour an edge.

    Its stages run in turn, so that only the largest one's activations are there at a time.
    """
    fixed = of_parameters(
        sum(cost.params + cost.aux_params + cost.context_params for cost in costs), config
    )
    inner = [plan.sends.nbytes for plan in plans[:-1] if plan.sends is not None]
    into = 0 if plans[0].is_first else plans[0].receives.nbytes
    out = plans[-1].sends.nbytes if plans[-1].sends is not None else 0
    depth = config.pipeline.depth
    buffers = RECEIVE_SLOTS * into + depth * out + (depth + 1) * sum(inner)
    samples = -(-config.data.batch_size // replicas)
    held = max(cost.activation_bytes_per_sample for cost in costs) * samples
    return Memory(
        fixed.weights_bytes,
        fixed.gradients_bytes,
        fixed.optimizer_bytes,
        held,
        -(-buffers // replicas),
    )


def as_json(memory: Memory) -> dict[str, Any]:
    """Return the kinds and their sum."""
    return {**asdict(memory), "total_bytes": memory.total_bytes}


def added(
    shown: dict[str, Any], plans: Sequence[StagePlan], costs: Sequence[StageCost], config: Config
) -> dict[str, Any]:
    """Return a plan's JSON with `memory` by kind beside every stage, each stage a worker of its own."""
    uses = [
        as_json(of_worker([plan], [cost], config)) for plan, cost in zip(plans, costs, strict=True)
    ]
    stages = [{**stage, "memory": use} for stage, use in zip(shown["stages"], uses, strict=True)]
    return {**shown, "stages": stages}


def spoken(nbytes: float) -> str:
    """Return a size in the unit that suits it."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if nbytes >= size:
            return f"{nbytes / size:,.1f} {unit}"
    return f"{nbytes / 1024:,.1f} KiB"


def table(plans: Sequence[StagePlan], costs: Sequence[StageCost], config: Config) -> Table:
    """Return every stage's memory by kind, for a person, each stage a worker of its own."""
    kinds = [kind.removesuffix("_bytes") for kind in Memory.__dataclass_fields__]
    shown = narrow(
        f"memory of a worker at batch {config.data.batch_size}", ("stage", *kinds, "all")
    )
    for plan, cost in zip(plans, costs, strict=True):
        use = of_worker([plan], [cost], config)
        shown.add_row(
            str(plan.stage),
            *(spoken(nbytes) for nbytes in (*asdict(use).values(), use.total_bytes)),
        )
    return shown

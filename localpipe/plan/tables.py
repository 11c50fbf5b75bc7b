"""Plans, predictions and memory as tables for a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from localpipe.config.resolved import Resolved
from localpipe.pipeline.stages.stage_plan import StagePlan
from localpipe.plan.costs import StageCost
from localpipe.plan.memory import MemoryUse, worker_memory
from localpipe.plan.predict import Prediction


def plan_json(
    plans: Sequence[StagePlan],
    costs: Sequence[StageCost],
    predicted: Prediction | None = None,
    others: Mapping[str, Prediction] | None = None,
) -> dict[str, Any]:
    """Return the plan as the mapping that `plan --json` prints; `others` are predictions of other cuts, by name."""
    stages = []
    for plan, cost in zip(plans, costs, strict=True):
        sends = [] if plan.sends is None else [asdict(field) for field in plan.sends.fields]
        figures = asdict(cost)
        figures.pop("train_macs")
        stages.append(
            {
                "stage": plan.stage,
                "blocks": list(plan.blocks),
                **figures,
                "sends": sends,
                "train_macs": cost.train_macs,
            }
        )
    totals = {key: sum(stage[key] for stage in stages) for key in asdict(costs[0])}
    totals["activation_bytes_per_sample"] = max(cost.activation_bytes_per_sample for cost in costs)
    totals["message_bytes"] = sum(plan.sends.nbytes for plan in plans if plan.sends is not None)
    told = None if predicted is None else {**asdict(predicted), "balance": predicted.balance}
    if told is not None:
        told["others"] = {
            name: {**asdict(p), "balance": p.balance} for name, p in (others or {}).items()
        }
    return {"schema": 1, "stages": stages, "totals": totals, "predicted": told}


def prediction_table(found: Mapping[str, Prediction]) -> Table:
    """Return predictions of cuts, by name, as a table for a person."""
    names = ("cut", "slowest\nstage, ms", "balance", "samples/s", "efficiency", "stages end at")
    shown = narrow_table("predicted", names, wraps="stages end at", left="stages end at")
    for name, one in found.items():
        shown.add_row(
            name,
            f"{1000 * max(one.stage_s):.2f}",
            f"{one.balance:.3f}",
            f"{one.samples_per_s:.1f}",
            "" if one.efficiency is None else f"{one.efficiency:.3f}",
            " ".join(map(str, one.cuts)),
        )
    return shown


def plan_table(plans: Sequence[StagePlan], costs: Sequence[StageCost]) -> Table:
    """Return the plan as a table for a person."""
    names = ("stage", "params", "MMACs", "aux params", "aux MMACs", "KiB saved", "blocks")
    shown = narrow_table(f"{len(plans)} stages", names, wraps="blocks", left="blocks")

    def row(stage: str, blocks: str, some: Sequence[StageCost]) -> None:
        saved = max(cost.activation_bytes_per_sample for cost in some) / 1024
        shown.add_row(
            stage,
            f"{sum(c.params for c in some):,}",
            f"{sum(c.macs for c in some) / 1e6:.2f}",
            f"{sum(c.aux_params for c in some):,}",
            f"{sum(c.aux_macs for c in some) / 1e6:.2f}",
            f"{saved:,.0f}",
            blocks,
        )

    for plan, cost in zip(plans, costs, strict=True):
        first, last = plan.blocks[0], plan.blocks[-1]
        row(
            str(plan.stage),
            first if first == last else f"{first}..{last} ({len(plan.blocks)})",
            [cost],
        )
    shown.add_section()
    row("all", "KiB: the largest", costs)
    return shown


def describe_crossings(plans: Sequence[StagePlan]) -> list[str]:
    """Return a line for every boundary: which tensors cross it, and how many bytes a sample has."""
    lines = []
    for plan in plans:
        if plan.sends is not None:
            fields = plan.sends.fields
            words = [
                " ".join([f.name, *(["x".join(map(str, f.shape))] if f.shape else []), f.dtype])
                for f in fields
            ]
            size = sum(field.nbytes for field in fields) / 1024
            lines.append(
                f"{plan.stage} -> {plan.stage + 1}: {', '.join(words)} ({size:,.1f} KiB a sample)"
            )
    return lines


def memory_json(memory: MemoryUse) -> dict[str, Any]:
    """Return the kinds and their sum."""
    return {**asdict(memory), "total_bytes": memory.total_bytes}


def add_memory(
    shown: dict[str, Any], plans: Sequence[StagePlan], costs: Sequence[StageCost], config: Resolved
) -> dict[str, Any]:
    """Return a plan's JSON with `memory` by kind beside every stage, each stage a worker of its own."""
    uses = [
        memory_json(worker_memory([plan], [cost], config))
        for plan, cost in zip(plans, costs, strict=True)
    ]
    stages = [{**stage, "memory": use} for stage, use in zip(shown["stages"], uses, strict=True)]
    return {**shown, "stages": stages}


def format_bytes(nbytes: float) -> str:
    """Return a size in the unit that suits it."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if nbytes >= size:
            return f"{nbytes / size:,.1f} {unit}"
    return f"{nbytes / 1024:,.1f} KiB"


def memory_table(plans: Sequence[StagePlan], costs: Sequence[StageCost], config: Resolved) -> Table:
    """Return every stage's memory by kind, for a person, each stage a worker of its own."""
    kinds = [kind.removesuffix("_bytes") for kind in MemoryUse.__dataclass_fields__]
    shown = narrow_table(
        f"memory of a worker at batch {config.data.batch_size}", ("stage", *kinds, "all")
    )
    for plan, cost in zip(plans, costs, strict=True):
        use = worker_memory([plan], [cost], config)
        shown.add_row(
            str(plan.stage),
            *(format_bytes(nbytes) for nbytes in (*asdict(use).values(), use.total_bytes)),
        )
    return shown


def narrow_table(
    title: str, columns: Sequence[str], wraps: str | None = None, left: str | None = None
) -> Table:
    """Return an empty table whose figures are never cut short; only the column `wraps` gives way.

    The first column and `left` are left-justified, the others hold figures.
    """
    shown = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False
    )
    for index, name in enumerate(columns):
        justify = "left" if index == 0 or name == left else "right"
        shown.add_column(name, justify=justify, no_wrap=name != wraps, overflow="fold")  # type: ignore[arg-type]
    return shown

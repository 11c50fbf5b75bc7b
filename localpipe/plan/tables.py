"""Plans, predictions and memory, as tables for a terminal and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from localpipe.config.resolved import Resolved
from localpipe.fields import Field
from localpipe.networks.blueprint import PLAIN_LAYOUTS
from localpipe.pipeline.stages.stage_plan import StagePlan
from localpipe.plan.costs import StageCost
from localpipe.plan.formats import format_bytes
from localpipe.plan.memory import (
    Back,
    MemoryUse,
    list_back,
    recovery_memory,
    snapshot_memory,
    worker_memory,
)
from localpipe.plan.predict import Prediction

_KIB = 2**10


def plan_json(
    plans: Sequence[StagePlan],
    costs: Sequence[StageCost],
    predicted: Prediction | None = None,
    others: Mapping[str, Prediction] | None = None,
) -> dict[str, Any]:
    """Return the plan as the mapping that `plan --json` prints.

    Keys: `schema`, `stages`, `totals`, `predicted`. plans, costs: of all stages, at least one.
    `others` are predictions of other cuts, by name. Where `predicted` is None they are ignored, and
    the key's value is None. `totals` are sums, but the largest stage's activation bytes. Stages and
    totals have `frozen_params` only where some are frozen, and `copied_params` and `shared_bytes`
    only with `method.feedback`. Raises ValueError if plans and costs differ in number.
    """
    unused_keys = []
    for key in ("frozen_params", "copied_params", "shared_bytes"):
        if not any(getattr(cost, key) for cost in costs):
            unused_keys.append(key)
    stages = []
    for plan, cost in zip(plans, costs, strict=True):
        stages.append(_stage_json(plan, cost, unused_keys))

    totals = _sum_costs(costs, unused_keys)
    totals["message_bytes"] = sum(plan.sends.nbytes for plan in plans if plan.sends is not None)

    prediction = None
    if predicted is not None:
        prediction = _prediction_json(predicted)
        prediction["others"] = {}
        for name, other_cut in (others or {}).items():
            prediction["others"][name] = _prediction_json(other_cut)
    return {"schema": 1, "stages": stages, "totals": totals, "predicted": prediction}


def _stage_json(plan: StagePlan, cost: StageCost, unused_keys: Sequence[str]) -> dict[str, Any]:
    figures = asdict(cost)
    train_macs = figures.pop("train_macs")
    for key in unused_keys:
        del figures[key]
    sends = []
    if plan.sends is not None:
        sends = [_field_json(field, plan) for field in plan.sends.fields]
    return {
        "stage": plan.stage,
        "blocks": list(plan.blocks),
        **figures,
        "sends": sends,
        "train_macs": train_macs,
    }


def _sum_costs(costs: Sequence[StageCost], unused_keys: Sequence[str]) -> dict[str, int]:
    """Return the sums of all stages' costs. The activation bytes are those of the largest stage."""
    totals = dict.fromkeys(asdict(costs[0]), 0)
    for cost in costs:
        for key, value in asdict(cost).items():
            totals[key] += value
    for key in unused_keys:
        del totals[key]
    # Its stages run in turn.
    totals["activation_bytes_per_sample"] = max(cost.activation_bytes_per_sample for cost in costs)
    return totals


def _field_json(field: Field, plan: StagePlan) -> dict[str, Any]:
    """Return a field that a stage sends, with its layout and order where they are not plain."""
    values: dict[str, Any] = {"name": field.name, "shape": field.shape, "dtype": field.dtype}
    layout = _unusual_layout(field, plan)
    if layout:
        values["layout"] = layout
    if field.order:
        values["order"] = field.order
    return values


def _unusual_layout(field: Field, plan: StagePlan) -> str:
    """Return the layout of a stage's main tensor where its shape does not say it, else ``."""
    layout = plan.gives.layout
    if field.shape != plan.output_shape:
        return ""  # another field, or codes, which are flat
    if field.name != plan.output or layout == PLAIN_LAYOUTS.get(len(field.shape), ""):
        return ""
    return layout


def _prediction_json(prediction: Prediction) -> dict[str, Any]:
    return {**asdict(prediction), "balance": prediction.balance}


def prediction_table(predictions: Mapping[str, Prediction]) -> Table:
    """Return predictions of cuts, by name, as a table with a row for each, in order."""
    names = ("cut", "slowest\nstage, ms", "balance", "samples/s", "efficiency", "stages end at")
    table = narrow_table("predicted", names, wraps="stages end at", left="stages end at")
    for name, prediction in predictions.items():
        efficiency = ""
        if prediction.efficiency is not None:
            efficiency = f"{prediction.efficiency:.3f}"
        table.add_row(
            name,
            f"{1000 * max(prediction.stage_s):.2f}",
            f"{prediction.balance:.3f}",
            f"{prediction.samples_per_s:.1f}",
            efficiency,
            " ".join(map(str, prediction.cuts)),
        )
    return table


def plan_table(plans: Sequence[StagePlan], costs: Sequence[StageCost]) -> Table:
    """Return the plan as a table: a row for every stage, and one for all.

    The last row has sums, but the largest stage's saved bytes. Raises ValueError if plans and costs
    differ in number.
    """
    names = ("stage", "params", "MMACs", "aux params", "aux MMACs", "KiB saved", "blocks")
    table = narrow_table(f"{len(plans)} stages", names, wraps="blocks", left="blocks")
    for plan, cost in zip(plans, costs, strict=True):
        table.add_row(str(plan.stage), *_cost_cells([cost]), _describe_blocks(plan.blocks))
    table.add_section()
    table.add_row("all", *_cost_cells(costs), "KiB: the largest")
    return table


def _cost_cells(costs: Sequence[StageCost]) -> list[str]:
    """Return the figures of some stages together: sums, and the largest saved activation."""
    params = macs = aux_params = aux_macs = saved = 0
    for cost in costs:
        params += cost.params
        macs += cost.macs
        aux_params += cost.aux_params
        aux_macs += cost.aux_macs
        saved = max(saved, cost.activation_bytes_per_sample)
    return [
        f"{params:,}",
        f"{macs / 1e6:.2f}",
        f"{aux_params:,}",
        f"{aux_macs / 1e6:.2f}",
        f"{saved / _KIB:,.0f}",
    ]


def _describe_blocks(blocks: Sequence[str]) -> str:
    first, last = blocks[0], blocks[-1]
    return first if first == last else f"{first}..{last} ({len(blocks)})"


def describe_crossings(plans: Sequence[StagePlan]) -> list[str]:
    """Return a line for every boundary: the tensors that cross it, and the bytes of a sample.

    The list is empty for one stage.
    """
    lines = []
    for plan in plans:
        if plan.sends is None:
            continue
        fields = plan.sends.fields
        texts = ", ".join(_describe_field(field, plan) for field in fields)
        size = sum(field.nbytes for field in fields) / _KIB
        lines.append(f"{plan.stage} -> {plan.stage + 1}: {texts} ({size:,.1f} KiB a sample)")
    return lines


def describe_back(
    plans: Sequence[StagePlan], costs: Sequence[StageCost], config: Resolved
) -> list[str]:
    """Return a line for every stage whose parameters come back, and one on their memory.

    The list is empty without `method.feedback`. plans, costs: of all stages.
    """
    lines = []
    for back in list_back(plans, costs, config):
        share = 100 * back.bytes_per_step / back.forward_bytes
        lines.append(
            f"{back.earlier} <- {back.later}: {back.parameters:,} parameters every {back.every} "
            f"steps, {back.lag} late ({back.nbytes / _KIB:,.1f} KiB, {back.bytes_per_step:,.0f} "
            f"bytes a step, {share:.2g} % of those forward)"
        )
    if lines:
        workers = zip(plans, costs, strict=True)
        size = sum(snapshot_memory([plan], [cost], config) for plan, cost in workers)
        lines.append(f"snapshots: {format_bytes(size)} in the workers, one for each stage")
    return lines


def describe_recovery(
    plans: Sequence[StagePlan], costs: Sequence[StageCost], config: Resolved
) -> list[str]:
    """Return a line on the shared memory of a run that recovers, none for another run.

    plans, costs: of all stages.
    """
    memory = recovery_memory(plans, costs, config)
    if memory is None:
        return []
    return [
        f"run.recover stage: {format_bytes(memory.rings_bytes)} of shared memory for rings of "
        f"{memory.messages} messages, {format_bytes(memory.snapshots_bytes)} for snapshots"
    ]


def describe_frozen(plans: Sequence[StagePlan], costs: Sequence[StageCost]) -> list[str]:
    """Return a line on the parameters that are not trained, with their stages; none without.

    Raises ValueError if plans and costs differ in number.
    """
    frozen = sum(cost.frozen_params for cost in costs)
    if not frozen:
        return []
    stages = []
    for plan, cost in zip(plans, costs, strict=True):
        if cost.frozen_params:
            stages.append(f"stage {plan.stage}: {cost.frozen_params:,}")
    params = sum(cost.params for cost in costs)
    return [f"frozen: {frozen:,} of {params:,} parameters ({', '.join(stages)})"]


def _describe_field(field: Field, plan: StagePlan) -> str:
    """Return a field as `h.0 16x32x32 float32`; a scalar has no shape.

    The layout of an activation follows where its shape does not say it, as `hwc`.
    """
    shape = "x".join(map(str, field.shape))
    words = (field.name, shape, field.dtype, _unusual_layout(field, plan))
    return " ".join(filter(None, words))


def memory_json(memory: MemoryUse) -> dict[str, Any]:
    """Return the bytes by kind, under the names of the fields, and `total_bytes`."""
    return {**asdict(memory), "total_bytes": memory.total_bytes}


def back_json(back: Back) -> dict[str, Any]:
    """Return what comes back from one stage to another, under the names of the fields."""
    return {**asdict(back), "bytes_per_step": back.bytes_per_step}


def add_memory(
    plan: dict[str, Any], plans: Sequence[StagePlan], costs: Sequence[StageCost], config: Resolved
) -> dict[str, Any]:
    """Return a plan's JSON with `memory` by kind in every stage, each replica a worker of its own.

    plan: as of `plan_json` for the same plans. It is not changed. Raises ValueError if the stages
    differ in number.
    """
    stages = []
    for stage, stage_plan, cost in zip(plan["stages"], plans, costs, strict=True):
        memory = worker_memory([stage_plan], [cost], config, config.replicas[stage_plan.stage])
        stages.append({**stage, "memory": memory_json(memory)})
    return {**plan, "stages": stages}


def memory_table(plans: Sequence[StagePlan], costs: Sequence[StageCost], config: Resolved) -> Table:
    """Return every stage's memory by kind as a table, each replica a worker of its own.

    Raises ValueError if plans and costs differ in number.
    """
    kinds = [kind.removesuffix("_bytes") for kind in MemoryUse.__dataclass_fields__]
    title = f"memory of a worker at batch {config.data.batch_size}"
    if config.optim.accumulate > 1:
        title += f", in {config.optim.accumulate} messages"
    if max(config.replicas) > 1:
        title += ", of one replica"
    table = narrow_table(title, ("stage", *kinds, "all"))
    for plan, cost in zip(plans, costs, strict=True):
        memory = worker_memory([plan], [cost], config, config.replicas[plan.stage])
        sizes = [*asdict(memory).values(), memory.total_bytes]
        table.add_row(str(plan.stage), *map(format_bytes, sizes))
    return table


def narrow_table(
    title: str, columns: Sequence[str], wraps: str | None = None, left: str | None = None
) -> Table:
    """Return an empty table without frames that fits 80 columns.

    Figures are never cut short: only the column `wraps` gives way. The first column and `left` are
    left-justified, all others right-justified. Both name a column. A name that is none, or None,
    changes nothing.
    """
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False
    )
    for index, name in enumerate(columns):
        no_wrap = name != wraps
        if index == 0 or name == left:
            table.add_column(name, justify="left", no_wrap=no_wrap, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=no_wrap, overflow="fold")
    return table

"""`localpipe bench --memory`: what training holds on one device, end to end, with checkpointing, and with every method.

A device that trains all stages one after another holds the largest stage's activations, not the network's. The counts need
no device; where there is a CUDA device, its allocator's peak over real steps stands beside them.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from localpipe import data
from localpipe.bench.systems.plain import choose_segments, count_plain_saved_bytes
from localpipe.bench.systems.shared import Part, build_entry, network_of
from localpipe.bench.tables import plain_table, table_console
from localpipe.config import registry
from localpipe.config.keys import Config
from localpipe.config.load import to_dict, update
from localpipe.config.resolved import Resolved
from localpipe.data.dataset import Dataset
from localpipe.files import SCHEMA, write_whole
from localpipe.networks.blueprint import Blueprint
from localpipe.pipeline.channels.message import Header, Kind, Message
from localpipe.pipeline.stages.optimizer import build_optimizer
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import IMAGE, StagePlan, build_plans
from localpipe.plan.costs import count_costs
from localpipe.plan.resolve_here import resolve_here

STAGES = (2, 3, 4, 8, 16)
_STEPS = 3
# The last block of every stage but the last, by the number of stages: the papers' cuts of balanced memory for CIFAR
# (InfoPro and ContSup, released code).
BALANCED = {
    "resnet110": {2: (15,), 3: (10, 21), 4: (7, 15, 27)},
    "resnet32": {2: (4,), 4: (3, 5, 8), 8: (2, 3, 4, 7, 8, 12, 13)},
}
# GB on one Titan Xp, ResNet-110 on CIFAR-10 at batch 1024, InfoPro at the balanced cuts (Wang et al. 2021, table 3).
PUBLISHED_GB = {
    ("e2e", "", 1): 9.40,
    ("checkpoint", "", 1): 3.91,
    ("infopro", "balanced", 2): 5.38,
    ("infopro", "balanced", 3): 4.22,
    ("infopro", "balanced", 4): 3.52,
}
_PUBLISHED_FOR = ("resnet110", (3, 32, 32))


@dataclass(frozen=True)
class MemoryCase:
    """One row: a method at a number of stages, `cuts` being equal, balanced, or what the configuration says."""

    method: str
    cuts: str
    stages: int
    config: Resolved
    segments: int | None = None  # of end to end; more than one is gradient checkpointing


def run_memory(given: Config, target: Path | None) -> int:
    """Print what every way to train holds, and write it to a file; return the exit status."""
    dataset = data.load(given.data, given.run.seed)
    blueprint = network_of(resolve_here(update(given, _method("dgl", 1, "equal")), dataset))
    published = (blueprint.name, blueprint.image) == _PUBLISHED_FOR
    rows: list[dict[str, Any]] = []
    for case in memory_cases(given, dataset, blueprint):
        rows.append(memory_row(case, blueprint, published))
        rows[-1].update(against_e2e=_against(rows, "saved_activation_bytes_per_sample"))
        rows[-1].update(peak_against_e2e=_against(rows, "peak_memory_bytes"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result = {
        "schema": SCHEMA,
        "device": device,
        "config": to_dict(given),
        "rows": rows,
    }
    if target is not None:
        write_whole(target, json.dumps(result, indent=1) + "\n")
    _show(rows, given, device)
    return 0


def memory_cases(given: Config, dataset: Dataset, blueprint: Blueprint) -> Iterator[MemoryCase]:
    """Yield every row: end to end first, then the methods at the configuration's cuts, InfoPro's balanced ones too."""

    def resolved(method: str, stages: int, cuts: Any) -> Resolved:
        return resolve_here(update(given, _method(method, stages, cuts)), dataset)

    whole = resolved("dgl", 1, "equal")
    yield MemoryCase("e2e", "", 1, whole, 1)
    yield MemoryCase("checkpoint", "", 1, whole, choose_segments(blueprint, whole))
    others = given.pipeline.cuts if given.pipeline.cuts in ("layerwise", "memory") else "equal"
    fitting = [stages for stages in STAGES if stages <= len(blueprint.blocks)]
    for stages, cuts in BALANCED.get(blueprint.name, {}).items():
        for rule, wanted in (
            ("balanced", list(cuts)),
            ("memory", "memory"),
        ):  # by hand, and as `pipeline.cuts: memory`
            yield MemoryCase("infopro", rule, stages, resolved("infopro", stages, wanted))
    for method in registry.METHODS:
        for stages in fitting:
            yield MemoryCase(method, others, stages, resolved(method, stages, others))


def _method(name: str, stages: int, cuts: Any) -> dict[str, Any]:
    axes = {
        "objective": {"name": "dgl"},
        "context": {"mode": "none"},
        "reconcile": {"distance": "none"},
        **{axis: dict(options) for axis, options in registry.METHODS[name].items()},
    }
    return {
        **{f"method.{axis}": options for axis, options in axes.items()},
        "pipeline.stages": stages,
        "pipeline.cuts": cuts,
        "pipeline.processes": 1,
        "pipeline.replicas": 1,
        "run.device": "cpu",  # what a stage is counted with; the measuring below moves it
    }


def memory_row(case: MemoryCase, blueprint: Blueprint, published: bool) -> dict[str, Any]:
    """Return what a case holds, the paper's figure beside it where `published`."""
    config = case.config
    if case.segments is not None:
        cut, saved = [], count_plain_saved_bytes(blueprint, config, case.segments)
    else:
        _, plans = build_plans(config)
        cut = [plan.last for plan in plans[:-1]]
        saved = max(
            cost.activation_bytes_per_sample for cost in count_costs(blueprint, plans, config)
        )
    gigabytes = PUBLISHED_GB if published else {}
    known = gigabytes.get((case.method, case.cuts, case.stages))
    return {
        "method": case.method,
        "stages": case.stages,
        "cuts": case.cuts or None,
        "cut": cut,
        "segments": case.segments,
        "saved_activation_bytes_per_sample": saved,
        "peak_memory_bytes": _cuda_peak(case, blueprint) if torch.cuda.is_available() else None,
        "published_gb": known,
        "published_against_e2e": None if known is None else known / gigabytes["e2e", "", 1] - 1,
    }


def _against(rows: list[dict[str, Any]], key: str) -> float | None:
    """Return the last row's share of the first row's, less one."""
    return None if rows[0][key] is None else rows[-1][key] / rows[0][key] - 1


# -- on a device --------------------------------------------------------------------------------------------------


def _cuda_peak(case: MemoryCase, blueprint: Blueprint) -> int:
    """Return the allocator's peak over real training steps of the whole batch on one device."""
    gc.collect()
    torch.cuda.empty_cache()
    step = training_step(case, blueprint, "cuda")
    step()  # optimizer state and workspaces are there from now on
    torch.cuda.reset_peak_memory_stats()
    for _ in range(_STEPS):
        step()
    return int(torch.cuda.max_memory_allocated())


def training_step(case: MemoryCase, blueprint: Blueprint, device: str) -> Callable[[], None]:
    """Return a step on a batch that is already on the device, all stages one after another."""
    return (_stages if case.segments is None else _end_to_end)(case, blueprint, device)


def _end_to_end(case: MemoryCase, blueprint: Blueprint, device: str) -> Callable[[], None]:
    config = case.config
    part = Part(blueprint, 0, len(blueprint.blocks) - 1, config, torch.device(device))
    part.segments = case.segments or 1
    optimizer = build_optimizer(config.optim, part.parameters())
    assert optimizer is not None, "a head has parameters"
    image, target = _batch(config, blueprint, device)
    normalise = build_entry(config).to(device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        blueprint.task.loss(part(normalise(image)), target).backward()
        optimizer.step()

    return step


def _stages(case: MemoryCase, blueprint: Blueprint, device: str) -> Callable[[], None]:
    config = case.config
    _, plans = build_plans(config)
    stages = [Stage(plan, blueprint, config, device) for plan in plans]
    image, target = _batch(config, blueprint, device)
    header = Header(Kind.TRAIN, 1, 1, config.data.batch_size)

    def step() -> None:
        message = Message(header, {IMAGE: image, "target": target})
        for stage in stages:
            message = _step(stage, message)

    return step


def _step(stage: Stage, message: Message) -> Message:
    """Train a stage on a message, as a worker does; return the next stage's."""
    h = stage.forward(message)
    loss = stage.local_loss(message, h)
    gradient = stage.boundary_gradient(loss, h) if stage.sends_gradient else None
    fields = _sent(stage.plan, dict(stage.outgoing(message, h, gradient)))
    stage.update(stage.reconciled(loss, message), message, 0.0)
    return Message(message.header, fields)


def _sent(plan: StagePlan, fields: dict[str, Any]) -> dict[str, Any]:
    return (
        {}
        if plan.sends is None
        else {field.name: fields[field.name].clone() for field in plan.sends.fields}
    )


def _batch(
    config: Resolved, blueprint: Blueprint, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    size = config.data.batch_size
    image = torch.randint(0, 256, (size, *blueprint.image), dtype=torch.uint8, device=device)
    return image, torch.randint(0, blueprint.task.num_classes, (size,), device=device)


# -- showing ------------------------------------------------------------------------------------------------------


def _show(rows: list[dict[str, Any]], config: Config, device: str) -> None:
    on = table_console()
    size = config.data.batch_size
    title = f"{config.model.name}: what one device holds"
    columns = ["method", "stages", "cuts", "KiB saved\na sample", "against\ne2e"]
    measured = rows[0]["peak_memory_bytes"] is not None
    columns += [f"GiB at\nbatch {size}", "against\ne2e"] if measured else []
    known = any(row["published_gb"] is not None for row in rows)
    columns += ["published\nGB", "against\ne2e"] if known else []
    shown = plain_table(title, columns)
    for row in rows:
        many = row["segments"] is not None and row["segments"] > 1
        cells = [
            row["method"],
            str(row["stages"]),
            f"{row['segments']} segments" if many else row["cuts"] or "",
        ]
        cells += [
            f"{row['saved_activation_bytes_per_sample'] / 2**10:,.0f}",
            _percent(row["against_e2e"]),
        ]
        if measured:
            cells += [f"{row['peak_memory_bytes'] / 2**30:.2f}", _percent(row["peak_against_e2e"])]
        if known:
            gigabytes = row["published_gb"]
            cells += [
                "" if gigabytes is None else f"{gigabytes:.2f}",
                _percent(row["published_against_e2e"]),
            ]
        shown.add_row(*cells)
    on.print(shown)
    on.print()
    lines = [
        "saved: the peak of what autograd holds for backward in the largest stage's step, parameters apart"
    ]
    lines.append("balanced: the papers' cuts by hand; memory: the cut of pipeline.cuts=memory")
    if known:
        lines.append(
            "published: InfoPro (ICLR 2021), table 3, CIFAR-10, batch 1024 on one Titan Xp, weights and all"
        )
    lines.append(device if measured else "no CUDA device, so only the counts")
    on.print("\n".join(lines), highlight=False, soft_wrap=True)


def _percent(value: float | None) -> str:
    return "" if value is None or value == 0 else f"{100 * value:+.0f} %"

"""`localpipe bench --memory`: the memory of training on one device.

End to end, with checkpointing, and with every method. A device that trains all stages one after
another holds the largest stage's activations, not the network's. The counts need no device. Where
there is a CUDA device, the peak of its allocator over real steps is printed too.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from localpipe.bench.memory_step import measure_cuda_peak
from localpipe.bench.systems.plain import choose_segments, count_plain_saved_bytes
from localpipe.bench.tables import plain_table, table_console
from localpipe.config import registry
from localpipe.config.keys import Config
from localpipe.config.load import to_dict, update
from localpipe.config.resolved import Resolved, take_workers
from localpipe.data.dataset import Dataset
from localpipe.errors import UserError
from localpipe.files import SCHEMA, check_output_path, write_output
from localpipe.networks.blueprint import Blueprint
from localpipe.networks.weights.pretrained import load_pretrained
from localpipe.output import warn
from localpipe.pipeline.stages.stage_plan import build_blueprint, build_plans
from localpipe.pipeline.workers.device import emulated_key
from localpipe.plan.costs import count_costs
from localpipe.plan.formats import format_percent
from localpipe.plan.resolve_here import load_data, resolve_here

STAGES = (2, 3, 4, 8, 16)
# The last block of every stage but the last, by the number of stages: the papers' cuts of balanced
# memory for CIFAR (InfoPro and ContSup, released code).
BALANCED = {
    "resnet110": {2: (15,), 3: (10, 21), 4: (7, 15, 27)},
    "resnet32": {2: (4,), 4: (3, 5, 8), 8: (2, 3, 4, 7, 8, 12, 13)},
}
# GB on one Titan Xp, ResNet-110 on CIFAR-10 at batch 1024, InfoPro at the balanced cuts
# (Wang et al. 2021, table 3).
PUBLISHED_GB = {
    ("e2e", "", 1): 9.40,
    ("checkpoint", "", 1): 3.91,
    ("infopro", "balanced", 2): 5.38,
    ("infopro", "balanced", 3): 4.22,
    ("infopro", "balanced", 4): 3.52,
}
_PUBLISHED_FOR = ("resnet110", (3, 32, 32))
_SAVED, _PEAK = "saved_activation_bytes_per_sample", "peak_memory_bytes"  # keys of a row


@dataclass(frozen=True)
class MemoryCase:
    """One row: a method at a number of stages.

    method: a name of the table of methods, `e2e` or `checkpoint`. cuts: `equal`, `balanced`, or a
    rule of the configuration. It is empty end to end. config: resolved, for one process on the CPU.
    segments: of end to end, where more than one is gradient checkpointing. It is None for the
    methods.
    """

    method: str
    cuts: str
    stages: int
    config: Resolved
    segments: int | None = None


def run_memory(config: Config, target: Path | None) -> int:
    """Print the memory of every case, and write it to a file; return the exit status 0.

    target: the JSON file, which replaces an old one, or None. Peaks are measured only with a CUDA
    device. A method that the task or the network does not go with is left out, with a note.
    Raises UserError for a network whose blocks only wait, for accumulated messages, and as
    `data.load` and `resolve_here` do, and for a file that cannot be written. Raises RunError if
    writing fails at the end.
    """
    if target is not None:
        check_output_path("bench: --json", target)
    if config.optim.accumulate > 1:
        raise UserError(
            f"bench: --memory compares whole batches, and optim.accumulate is "
            f"{config.optim.accumulate}; set optim.accumulate=1, or use plan for a worker's memory"
        )
    config, dataset = load_data(config, load_pretrained(config.model))
    end_to_end = _resolve_case(config, dataset, "dgl", 1, "equal")
    if end_to_end.only_waits:
        raise UserError(
            f"bench: --memory cannot count a {end_to_end.model.name}, whose blocks only wait; "
            "choose another model.name"
        )
    blueprint = build_blueprint(end_to_end)
    rows, left_out = _make_rows(config, dataset, blueprint)

    # The file and the table.
    device = "cpu"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    emulated = emulated_key(device)
    if target is not None:
        result = {"schema": SCHEMA, **emulated, "device": device, "config": to_dict(config)}
        result["rows"] = rows
        write_output(target, json.dumps(result, indent=1) + "\n", "file")
    if emulated:
        device += " (emulated: true)"
    _show(rows, config, device)
    for method, reason in left_out.items():
        warn(f"note: {method} is left out: {reason}")
    return 0


def _make_rows(
    config: Config, dataset: Dataset, blueprint: Blueprint
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return a row for every case, and why each method that is left out is refused."""
    is_published = (blueprint.name, blueprint.sample) == _PUBLISHED_FOR
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for case in memory_cases(config, dataset, blueprint, left_out):
        try:
            row = memory_row(case, blueprint, is_published, config.run.precision)
        except UserError as refusal:
            if case.segments is not None:
                raise
            left_out.setdefault(case.method, str(refusal))
            continue
        rows.append(row)
        row["against_e2e"] = _compare_with_first(rows, _SAVED)
        row["peak_against_e2e"] = _compare_with_first(rows, _PEAK)
    return rows, left_out


def memory_cases(
    config: Config, dataset: Dataset, blueprint: Blueprint, left_out: dict[str, str]
) -> Iterator[MemoryCase]:
    """Yield every case: end to end first, then InfoPro at balanced cuts, then every method.

    The first two are end to end, without and with checkpointing. With frozen blocks there is none
    with checkpointing, and no method that reconciles. Balanced cuts exist for the networks of
    `BALANCED` only. Methods have the numbers of `STAGES` that the network has blocks for. left_out:
    gets why a method is refused, by its name, where its cut is decided by its costs. Raises
    UserError as `resolve_here`.
    """
    end_to_end = _resolve_case(config, dataset, "dgl", 1, "equal")
    yield MemoryCase("e2e", "", 1, end_to_end, 1)
    if not config.model.freeze:  # what is frozen is not run again
        segments = choose_segments(blueprint, end_to_end)
        yield MemoryCase("checkpoint", "", 1, end_to_end, segments)

    # Balanced by hand, and by `pipeline.cuts: memory`.
    for stages, cuts in BALANCED.get(blueprint.name, {}).items():
        balanced = _resolve_case(config, dataset, "infopro", stages, list(cuts))
        yield MemoryCase("infopro", "balanced", stages, balanced)
        counted = _resolve_case(config, dataset, "infopro", stages, "memory")
        yield MemoryCase("infopro", "memory", stages, counted)

    rule = "equal"
    if config.pipeline.cuts in ("layerwise", "memory"):
        rule = str(config.pipeline.cuts)
    for method in registry.METHODS:
        for stages in STAGES:
            if stages <= len(blueprint.blocks):
                try:
                    resolved = _resolve_case(config, dataset, method, stages, rule)
                except UserError as refusal:
                    left_out.setdefault(method, str(refusal))
                    continue
                if config.model.freeze and resolved.reconciles:
                    continue  # a stage of frozen blocks alone cannot be reconciled
                yield MemoryCase(method, rule, stages, resolved)


def _resolve_case(
    config: Config, dataset: Dataset, method: str, stages: int, cuts: Any
) -> Resolved:
    """Return the resolved configuration of a method at a number of stages and a cut."""
    axes: dict[str, Any] = {
        "objective": {"name": "dgl"},
        "context": {"mode": "none"},
        "reconcile": {"distance": "none"},
        "feedback": {"mode": "none"},
    }
    for axis, options in registry.METHODS[method].items():
        axes[axis] = dict(options)
    keys = {
        "pipeline.stages": stages,
        "pipeline.cuts": cuts,
        **take_workers(config, 1),
        "pipeline.replicas": 1,
        # For the counts. A measured peak has its own device, and the configuration's precision.
        "run.device": "cpu",
        "run.capture": "none",
    }
    if config.run.precision == "tf32":
        keys["run.precision"] = "fp32"  # of the same bytes
    for axis, options in axes.items():
        keys[f"method.{axis}"] = options
    if _reconciles(method):
        keys["run.checkpointing"] = "none"  # a double backward pass holds what is computed again
    return resolve_here(update(config, keys), dataset)


def _reconciles(method: str) -> bool:
    return "reconcile" in registry.METHODS[method]


def memory_row(
    case: MemoryCase, blueprint: Blueprint, is_published: bool, precision: str | None = None
) -> dict[str, Any]:
    """Return the memory of a case, with the paper's figure where `is_published`.

    precision: `run.precision` of the measured peak, None for that of the case. A case is resolved
    for the CPU, which has no tf32.
    Keys: `method`, `stages`, `segments`, `cuts` (None end to end), `cut` (the last block of every
    stage but the last). Further keys: `saved_activation_bytes_per_sample` of the largest stage,
    `peak_memory_bytes` (None without CUDA, or where the GPU is too small), `published_gb` and
    `published_against_e2e` (None if not published).
    """
    if case.segments is not None:
        cut = []
        saved = count_plain_saved_bytes(blueprint, case.config, case.segments)
    else:
        _, plans = build_plans(case.config)
        cut = [plan.last for plan in plans[:-1]]
        costs = count_costs(blueprint, plans, case.config)
        saved = max(cost.activation_bytes_per_sample for cost in costs)

    # The peak on a device, and the published one.
    peak = None
    if torch.cuda.is_available():
        # The other cases may fit.
        with contextlib.suppress(torch.OutOfMemoryError):
            keys = {"run.device": "cuda", "run.precision": precision or case.config.run.precision}
            config = update(case.config, keys)
            peak = measure_cuda_peak(config, blueprint, case.segments)
    published, published_ratio = None, None
    if is_published:
        published = PUBLISHED_GB.get((case.method, case.cuts, case.stages))
    if published is not None:
        published_ratio = published / PUBLISHED_GB["e2e", "", 1] - 1
    return {
        "method": case.method,
        "stages": case.stages,
        "cuts": case.cuts or None,
        "cut": cut,
        "segments": case.segments,
        _SAVED: saved,
        _PEAK: peak,
        "published_gb": published,
        "published_against_e2e": published_ratio,
    }


def _compare_with_first(rows: list[dict[str, Any]], key: str) -> float | None:
    """Return the last row's figure over the first row's, minus 1."""
    if rows[0][key] is None or rows[-1][key] is None:
        return None
    return float(rows[-1][key] / rows[0][key] - 1)


# -- the table ----------------------------------------------------------------------------------


def _show(rows: list[dict[str, Any]], config: Config, device: str) -> None:
    has_peaks = torch.cuda.is_available()
    has_published = any(row["published_gb"] is not None for row in rows)
    columns = ["method", "stages", "cuts", "KiB saved\na sample", "against\ne2e"]
    if has_peaks:
        columns += [f"GiB at\nbatch {config.data.batch_size}", "against\ne2e"]
    if has_published:
        columns += ["published\nGB", "against\ne2e"]
    table: Table = plain_table(f"{config.model.name}: what one device holds", columns)
    for row in rows:
        table.add_row(*_format_row(row, has_peaks, has_published))
    console = table_console()
    console.print(table)
    console.print()

    # What the words of the table mean.
    lines = [
        "saved: the peak of what autograd holds for backward in the largest stage's step, "
        "parameters apart",
        "balanced: the papers' cuts by hand; memory: the cut of pipeline.cuts=memory",
    ]
    if has_published:
        lines.append(
            "published: InfoPro (ICLR 2021), table 3, CIFAR-10, batch 1024 on one Titan Xp, "
            "weights and all"
        )
    if config.run.checkpointing == "block":
        lines.append(
            "sgr: without run.checkpointing, because its double backward pass holds what is "
            "computed again"
        )
    if has_peaks and config.run.capture != "none":
        lines.append("the peaks are of eager steps, whatever run.capture is")
    if has_peaks:
        lines.append(device)
    else:
        lines.append("no CUDA device, so only the counts")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _format_row(row: dict[str, Any], has_peaks: bool, has_published: bool) -> list[str]:
    cuts = row["cuts"] or ""
    if row["segments"] is not None and row["segments"] > 1:
        cuts = f"{row['segments']} segments"
    cells = [row["method"], str(row["stages"]), cuts]
    cells += [f"{row[_SAVED] / 2**10:,.0f}", _format_change(row["against_e2e"])]
    if has_peaks:
        peak = "too large"
        if row[_PEAK] is not None:
            peak = f"{row[_PEAK] / 2**30:.2f}"
        cells += [peak, _format_change(row["peak_against_e2e"])]
    if has_published:
        published = ""
        if row["published_gb"] is not None:
            published = f"{row['published_gb']:.2f}"
        cells += [published, _format_change(row["published_against_e2e"])]
    return cells


def _format_change(value: float | None) -> str:
    """Return a change in per cent; nothing for none at all."""
    if not value:
        return ""
    return format_percent(value, digits=0, signed=True)

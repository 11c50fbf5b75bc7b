"""A forecast as tables, lines and JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from localpipe.plan.cluster.forecast import Forecast
from localpipe.plan.tables import format_bytes, memory_json, narrow_table


def forecast_json(forecast: Forecast) -> dict[str, Any]:
    """Return the mapping that `plan --cluster --json` prints under `cluster`."""
    workers = [
        {
            "worker": i,
            "stages": list(worker.stages),
            "nodes": [place.node for place in worker.places],
            "device": worker.places[0].device,
            "before_send_s": worker.before_s,
            "compute_s": worker.compute_s,
            "all_reduce_s": worker.reduce_s,
            "message_bytes": worker.message_bytes,
            "wire": worker.wire,
            "transfer_s": worker.transfer_s,
            "latency_s": worker.latency_s,
            "memory": memory_json(worker.memory),
        }
        for i, worker in enumerate(forecast.workers)
    ]
    return {
        "name": forecast.cluster,
        "devices": forecast.devices,
        "workers": workers,
        "systems": [asdict(row) for row in forecast.rows],
        "bottleneck": forecast.bottleneck,
        "advice": list(forecast.advice),
        "assumptions": list(forecast.assumptions),
    }


def forecast_tables(forecast: Forecast) -> list[Table]:
    """Return the workers and the systems as tables for a person."""
    return [_workers_table(forecast), _systems_table(forecast)]


def _workers_table(forecast: Forecast) -> Table:
    names = (
        "stage",
        "node",
        "compute\nms",
        "weights,\ngradients",
        "optimizer",
        "activa-\ntions",
        "buffers",
        "message",
    )
    shown = narrow_table(
        f"{forecast.cluster}: workers", (*names, "wire\nms"), wraps="node", left="node"
    )
    for worker in forecast.workers:
        stages, use = worker.stages, worker.memory
        shown.add_row(
            f"{stages[0]}" if len(stages) == 1 else f"{stages[0]}..{stages[-1]}",
            ", ".join(dict.fromkeys(place.node for place in worker.places)),
            f"{1e3 * (worker.compute_s + worker.reduce_s):,.2f}",
            format_bytes(use.weights_bytes + use.gradients_bytes),
            format_bytes(use.optimizer_bytes),
            format_bytes(use.activations_bytes),
            format_bytes(use.buffers_bytes),
            format_bytes(worker.message_bytes) if worker.wire else "",
            f"{1e3 * (worker.transfer_s + worker.latency_s):,.2f}" if worker.wire else "",
        )
    return shown


def _systems_table(forecast: Forecast) -> Table:
    names = (
        "system",
        "devices",
        "formula",
        "simulated",
        "efficiency",
        "memory",
        "whole\nrun",
        "limited by",
    )
    shown = narrow_table("samples per second", names, wraps="limited by", left="limited by")
    for row in forecast.rows:
        name = (
            row.system if row.micro_batches is None else f"{row.system} (m = {row.micro_batches})"
        )
        need = "" if row.memory_bytes is None else format_bytes(row.memory_bytes)
        if row.samples_per_s is None or row.efficiency is None:
            shown.add_row(name, str(row.devices), "", "", "", need, "", row.why_not or "")
            continue
        shown.add_row(
            name,
            str(row.devices),
            f"{row.formula_samples_per_s:,.0f}",
            f"{row.samples_per_s:,.0f}",
            f"{100 * row.efficiency:.1f} %",
            need,
            _duration(row.run_s or 0.0),
            row.bottleneck or "",
        )
    return shown


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def forecast_remarks(forecast: Forecast) -> list[str]:
    """Return the lines below the tables: the bottleneck, what to change first, what was assumed."""
    lines = [f"bottleneck: {forecast.bottleneck}", "what to change first:"]
    nothing = ["nothing stands out"]
    lines += [f"  {i}. {line}" for i, line in enumerate(forecast.advice or nothing, 1)]
    return [*lines, "assumed:", *(f"  - {line}" for line in forecast.assumptions)]

"""A forecast as JSON, as tables and as lines of text."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from localpipe.plan.cluster.forecast import Forecast
from localpipe.plan.cluster.peers import ForecastRow
from localpipe.plan.cluster.placement import PlacedWorker
from localpipe.plan.formats import format_bytes, format_forecast_time
from localpipe.plan.tables import memory_json, narrow_table


def forecast_json(forecast: Forecast) -> dict[str, Any]:
    """Return the mapping that `plan --cluster --json` prints under `cluster`.

    Keys: `name`, `devices` (their number), `workers`, `systems` (fields of `ForecastRow`),
    `bottleneck`, `advice` and `assumptions`. A worker's seconds and bytes are those of a message.
    """
    workers = []
    for index, worker in enumerate(forecast.workers):
        workers.append({"worker": index, **_worker_json(worker)})
    return {
        "name": forecast.cluster,
        "devices": forecast.devices,
        "workers": workers,
        "systems": [asdict(row) for row in forecast.rows],
        "bottleneck": forecast.bottleneck,
        "advice": list(forecast.advice),
        "assumptions": list(forecast.assumptions),
    }


def _worker_json(worker: PlacedWorker) -> dict[str, Any]:
    return {
        "stages": list(worker.stages),
        "nodes": [device.machine for device in worker.devices],
        "device": worker.devices[0].kind,
        "before_send_s": worker.before_s,
        "compute_s": worker.compute_s,
        "all_reduce_s": worker.reduce_s,
        "message_bytes": worker.message_bytes,
        "wire": worker.wire,
        "transfer_s": worker.transfer_s,
        "latency_s": worker.latency_s,
        "memory": memory_json(worker.memory),
    }


def forecast_tables(forecast: Forecast) -> list[Table]:
    """Return a table of the workers and a table of the systems, for a terminal, in this order.

    A system that cannot run has a row with the reason.
    """
    return [_build_workers_table(forecast), _build_systems_table(forecast)]


def _build_workers_table(forecast: Forecast) -> Table:
    columns = (
        "stage",
        "node",
        "compute\nms",
        "weights,\ngradients",
        "optimizer",
        "activa-\ntions",
        "buffers",
        "message",
        "wire\nms",
    )
    title = f"{forecast.cluster}: workers"
    if forecast.messages > 1:
        title += f", times of one of {forecast.messages} messages a step"
    table = narrow_table(title, columns, wraps="node", left="node")
    for worker in forecast.workers:
        table.add_row(*_format_worker(worker))
    return table


def _format_worker(worker: PlacedWorker) -> tuple[str, ...]:
    first = worker.stages[0]
    last = worker.stages[-1]
    stages = f"{first}"
    if first != last:
        stages = f"{first}..{last}"
    machines = dict.fromkeys(device.machine for device in worker.devices)
    memory = worker.memory
    parameters = format_bytes(memory.weights_bytes + memory.gradients_bytes)
    compute_ms = 1e3 * (worker.compute_s + worker.reduce_s)
    # The last worker sends no message.
    message = ""
    link_ms = ""
    if worker.wire:
        message = format_bytes(worker.message_bytes)
        edge_s = worker.transfer_s + worker.latency_s
        link_ms = f"{1e3 * edge_s:,.2f}"
    return (
        stages,
        ", ".join(machines),
        f"{compute_ms:,.2f}",
        parameters,
        format_bytes(memory.optimizer_bytes),
        format_bytes(memory.activations_bytes),
        format_bytes(memory.buffers_bytes),
        message,
        link_ms,
    )


def _build_systems_table(forecast: Forecast) -> Table:
    columns = (
        "system",
        "devices",
        "formula",
        "simulated",
        "efficiency",
        "memory",
        "whole\nrun",
        "limited by",
    )
    table = narrow_table("samples per second", columns, wraps="limited by", left="limited by")
    for row in forecast.rows:
        table.add_row(*_format_system(row))
    return table


def _format_system(row: ForecastRow) -> tuple[str, ...]:
    name = row.system
    devices = str(row.devices)
    if row.micro_batches is not None:
        name = f"{name} (m = {row.micro_batches})"
    memory = ""
    if row.memory_bytes is not None:
        memory = format_bytes(row.memory_bytes)
    # A system that cannot run has a reason in place of its figures.
    if row.samples_per_s is None or row.efficiency is None:
        return (name, devices, "", "", "", memory, "", row.why_not or "")
    formula = f"{row.formula_samples_per_s:,.0f}"
    simulated = f"{row.samples_per_s:,.0f}"
    efficiency = f"{100 * row.efficiency:.1f} %"
    run = _format_run(row)
    limit = row.bottleneck or ""
    return (name, devices, formula, simulated, efficiency, memory, run, limit)


def _format_run(row: ForecastRow) -> str:
    """Return the time of the whole run. One that fails before every checkpoint never ends."""
    if row.run_s is not None:
        return format_forecast_time(row.run_s)
    if row.formula_run_s is None:
        return "never"
    return "hardly\never"


def forecast_remarks(forecast: Forecast) -> list[str]:
    """Return the lines below the tables: the bottleneck, the advice and the assumptions.

    Without advice a line says that nothing stands out.
    """
    lines = [f"bottleneck: {forecast.bottleneck}", "what to change first:"]
    for number, line in enumerate(forecast.advice or ["nothing stands out"], 1):
        lines.append(f"  {number}. {line}")
    lines.append("assumed:")
    for line in forecast.assumptions:
        lines.append(f"  - {line}")
    return lines

"""`localpipe bench`: fresh processes, paired windows, a table for a person and a file for a machine."""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from localpipe import config as configs
from localpipe import data, job, metrics
from localpipe.bench import paired
from localpipe.config import Config
from localpipe.job import Job
from localpipe.launcher import Workers


def bench(given: Config, target: Path | None, windows: int, window_s: float) -> int:
    """Measure a configuration's pipeline beside its bound in paired windows; return the exit status."""
    dataset = data.load(given.data, given.run.seed)
    config = job.resolve(given, dataset)
    job.check_plan(config, dataset)
    decided = Job(configs.to_dict(config), configs.to_dict(given), 0, 0.0, time.time())
    with Workers(decided, "localpipe.bench.paired") as workers:
        workers.store.set(paired.ASKED, json.dumps({"windows": windows, "window_s": window_s}))
        status = workers.follow(lambda: None)
        if status != 0 or workers.asked:
            return status or 128 + workers.asked
        assert isinstance(config.pipeline.processes, int)
        times = [json.loads(workers.store.get(f"times/{rank}")) for rank in range(config.pipeline.processes)]
    row = _row(config, times)
    result = {"schema": metrics.SCHEMA, "machine": machine(), "config": configs.to_dict(config), "rows": [row]}
    if target is not None:
        metrics.write_whole(target, json.dumps(result, indent=1) + "\n")
    _show(row, result["machine"], f"{windows} paired windows of {times[0]['steps']} steps")
    return 0


def machine() -> dict[str, Any]:
    """Say in words what was measured on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": job.cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": "cpu",
        "torch": torch.__version__,
    }


def _row(config: Config, times: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one row: medians over windows, each window's time the slowest worker's."""
    samples = times[0]["steps"] * config.data.batch_size
    pipeline = _rates(times, "pipeline", samples)
    bound = _rates(times, "bound", samples)
    ratios = [a / b for a, b in zip(pipeline, bound, strict=True)]
    return {
        "system": "localpipe",
        "processes": config.pipeline.processes,
        "micro_batches": None,
        "cut": config.pipeline.cuts if isinstance(config.pipeline.cuts, str) else list(config.pipeline.cuts),
        "samples_per_s": statistics.median(pipeline),
        "samples_per_s_runs": pipeline,
        "peak_memory_bytes": [time["peak_memory_bytes"] for time in times],
        "bound_samples_per_s": statistics.median(bound),
        "efficiency": statistics.median(ratios) if job.fits(config) else None,
        "efficiency_runs": ratios,
        "bound_from": "paired",
        "jitter_cost": _jitter_cost(times),
    }


def _jitter_cost(times: list[dict[str, Any]]) -> float | None:
    """Return the share of the throughput that a chain's jitter costs: the median over pairs of windows with and without."""
    if "steady" not in times[0]:
        return None
    pairs = zip(_rates(times, "pipeline", 1), _rates(times, "steady", 1), strict=True)
    return 1 - statistics.median(jittering / steady for jittering, steady in pairs)


def _rates(times: list[dict[str, Any]], name: str, samples: int) -> list[float]:
    return [samples / max(windows) for windows in zip(*(time[name] for time in times), strict=True)]


def _show(row: dict[str, Any], on: Any, title: str) -> None:
    table = Table(title=title, title_justify="left")
    for name in ("system", "processes", "samples/s", "bound", "efficiency", "from .. to", "MiB"):
        table.add_column(name, justify="right")
    known = row["efficiency"] is not None
    runs = row["efficiency_runs"]
    table.add_row(
        row["system"],
        str(row["processes"]),
        f"{row['samples_per_s']:.1f}",
        f"{row['bound_samples_per_s']:.1f}",
        f"{row['efficiency']:.3f}" if known else "workers x threads exceed the cores",
        f"{min(runs):.3f} .. {max(runs):.3f}" if known else "",
        f"{max(row['peak_memory_bytes']) / 2**20:.0f}",
    )
    Console().print(table)
    if row["jitter_cost"] is not None:
        print(f"the jitter costs {100 * row['jitter_cost']:.1f} % of the throughput of the same chain without it")
    print(f"{on['cores']} cores, {on['device']}, torch {on['torch']}")

"""The summary of a run: the content of summary.json, and the table that is printed of it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.table import Table

import localpipe
from localpipe.config.resolved import Resolved
from localpipe.files import SCHEMA
from localpipe.output import make_console
from localpipe.pipeline.stages.weights import weights_digest
from localpipe.pipeline.workers.device import emulated_key, gpu_name
from localpipe.pipeline.workers.mesh import assign_hosts
from localpipe.plan.costs import StageCost, count_costs
from localpipe.plan.formats import format_number, format_percent
from localpipe.runs.directory import RunDirectory, file_sha256
from localpipe.runs.prepare import Prepared
from localpipe.runs.recorded_run import Record, read_best, read_last, read_metric
from localpipe.tasks.metric import TOP5_ACCURACY, Metric
from localpipe.tasks.task import Task

# A bound of fewer steps is left out: while queues fill, the last stage may be ahead of it.
_LEAST_BOUND_STEPS = 20


def build_summary(
    prepared: Prepared,
    evaluations: Sequence[Record],
    ends: Sequence[Record],
    peaks: Sequence[int],
) -> dict[str, Any]:
    """Return the content of summary.json, as of now.

    evaluations: all `eval` records of the run. ends: for every stage in order, `loss`, `busy_s`,
    `pace` (`samples`, `wall_s`, `compute_s`), `weights` and `averaged_weights` (lines of
    `weight_lines`), `step` and `has_cores`. peaks: the peak memory of every worker by rank, in
    bytes. Speeds are None if a stage had no steady step. The bound and `efficiency` are None after
    fewer than 20 steady batches, and where the run was faster than its spans allow. `efficiency` is
    None too if the workers lacked cores. Raises KeyError if a stage has no test evaluation after
    the last step, and OSError if the run has no config.yaml.
    """
    config, job = prepared.config, prepared.job
    stages = len(ends)
    steps = ends[-1]["step"]

    # What was counted of the stages on the meta device, and all weights in one digest.
    costs = count_costs(prepared.blueprint, prepared.plans, config)
    weights: list[str] = []
    averaged_weights: list[str] = []
    for end in ends:
        weights += end["weights"]
        averaged_weights += end["averaged_weights"]
    ema_sha256 = None
    if config.optim.ema is not None:
        ema_sha256 = weights_digest(averaged_weights)
    return {
        "schema": SCHEMA,
        **_metric_figures(config, prepared.blueprint.task, evaluations, steps),
        "loss_per_stage": [end["loss"] for end in ends],
        "busy_s_per_stage": [round(end["busy_s"], 3) for end in ends],
        "busy_share_per_stage": [_busy_share(end) for end in ends],
        **_cost_figures(costs),
        "seed": config.run.seed,
        "epochs": prepared.schedule.last_epoch,
        "config_sha256": file_sha256(RunDirectory(config.run.dir).config_file),
        "data_sha256": job.data_sha256,
        "localpipe": localpipe.__version__,
        "torch": torch.__version__,
        **_speed_figures(config, ends),
        "peak_memory_bytes": list(peaks),
        "stages": stages,
        "processes": config.pipeline.processes,
        "replicas": config.pipeline.replicas,
        "steps": steps,
        "deterministic": config.run.deterministic,
        "wall_s": round(job.elapsed_s + time.time() - job.started, 3),
        "weights_sha256": weights_digest(weights),
        "ema_sha256": ema_sha256,
        **emulated_key(gpu_name(config.run.device)),
    }


def final_evaluations(evaluations: Sequence[Record], steps: int) -> dict[int, Record]:
    """Return {stage: record} of the test evaluations after exactly `steps` steps.

    A stage without one is missing. Of several records of a stage, the last counts.
    """
    final = {}
    for record in evaluations:
        if record["step"] == steps and record["split"] == "test":
            final[record["stage"]] = record
    return final


def _metric_figures(
    config: Resolved, task: Task, evaluations: Sequence[Record], steps: int
) -> dict[str, Any]:
    """Return the figures of all exits after the last step, and the whole network's best."""
    stages, metric = config.stages, task.metric
    final = final_evaluations(evaluations, steps)
    values = [final[stage][metric.name] for stage in range(stages)]
    best = _find_best([record for record in evaluations if record["stage"] == stages - 1], metric)
    figures: dict[str, Any] = {
        "task": config.task.name,
        "metric": {**metric.as_json(), "value": values[-1]},
        "best_metric": best[metric.name],
        "best_epoch": best["epoch"],
        "metric_per_stage": values,
        "probe_metric_per_stage": _probe_values(config, final, metric.name),
    }
    for name in task.figures:
        per_stage = [final[stage][name] for stage in range(stages)]
        figures[f"test_{name}"] = per_stage[-1]
        figures[f"best_test_{name}"] = best[name]
        figures[f"test_{name}_per_stage"] = per_stage
    figures["probe_accuracy_per_stage"] = None
    if metric.name == "accuracy":
        figures["probe_accuracy_per_stage"] = figures["probe_metric_per_stage"]
    return figures


def _probe_values(
    config: Resolved, final: Mapping[int, Record], name: str
) -> list[float | None] | None:
    """Return a figure of every stage's probe, None without probes."""
    if config.run.probe == "none":
        return None
    return [final[stage].get(f"probe_{name}") for stage in range(config.stages)]


def _find_best(evaluations: Sequence[Record], metric: Metric) -> Record:
    """Return the test record of the best epoch by a metric, the earliest of equals.

    It is chosen on the validation images if there are some, else on the test images.
    """
    splits = {record["split"] for record in evaluations}
    split = "validation" if "validation" in splits else "test"
    candidates = [record for record in evaluations if record["split"] == split]
    best = max(
        candidates, key=lambda record: (metric.sort_key(record[metric.name]), -record["step"])
    )
    for record in evaluations:
        if record["split"] == "test" and record["step"] == best["step"]:
            return record
    raise AssertionError("every evaluation has test records")


def _cost_figures(costs: Sequence[StageCost]) -> dict[str, Any]:
    """Return what was counted of the stages on the meta device, for one sample."""
    return {
        "saved_activation_bytes_per_sample": [cost.activation_bytes_per_sample for cost in costs],
        "train_macs_per_sample": sum(cost.train_macs for cost in costs),
        "inference_macs_per_sample": sum(cost.macs + cost.context_macs for cost in costs),
        "aux_params": sum(cost.aux_params for cost in costs),
        "context_params": sum(cost.context_params for cost in costs),
    }


def _speed_figures(config: Resolved, ends: Sequence[Record]) -> dict[str, Any]:
    """Return the last stage's throughput, and the bound by the workers' time of computing."""
    figures: dict[str, Any] = {
        "train_samples_per_s": None,
        "bound_samples_per_s": None,
        "bound_from": "spans",
        "efficiency": None,
    }
    throughputs = [end["pace"] for end in ends]
    if not all(throughput["samples"] for throughput in throughputs):
        return figures

    # The slowest worker of the first pipeline bounds the speed of all.
    worker_s = []
    for host in assign_hosts(config.replicas, config.pipeline.processes):
        if host.replica == 0:
            hosted = [throughputs[stage] for stage in host.stages]
            worker_s.append(sum(stage["compute_s"] / stage["samples"] for stage in hosted))
    bound = 1 / max(worker_s)
    rate = throughputs[-1]["samples"] / throughputs[-1]["wall_s"]
    figures["train_samples_per_s"] = round(rate, 2)
    steps = throughputs[-1]["samples"] / config.data.batch_size
    if steps < _LEAST_BOUND_STEPS or rate > bound:
        return figures
    figures["bound_samples_per_s"] = round(bound, 2)
    if all(end["has_cores"] for end in ends):
        figures["efficiency"] = round(rate / bound, 4)
    return figures


def _busy_share(end: Record) -> float | None:
    """Return the share of a stage's time in which it computed."""
    throughput = end["pace"]
    if not throughput["wall_s"]:
        return None
    share: float = round(throughput["compute_s"] / throughput["wall_s"], 4)
    return share


def print_summary(summary: Mapping[str, Any], run_dir: str) -> None:
    """Print a row for every stage, and accuracy, speed and digest of the whole network.

    summary: the content of summary.json. run_dir: only for the title. Raises KeyError if a key is
    missing.
    """
    console = make_console(tolerant=True)
    console.print(_build_table(summary, run_dir))
    metric = Metric.from_json(summary)
    line = (
        f"whole network: {metric.words} {metric.format(read_last(summary))}, "
        f"best {metric.format(read_best(summary))} in epoch {summary['best_epoch']}"
    )
    top5 = summary.get(f"test_{TOP5_ACCURACY.name}")
    if top5 is not None:
        line += f"; {TOP5_ACCURACY.words} {TOP5_ACCURACY.format(top5)}"
    console.print(line, highlight=False)
    if summary["train_samples_per_s"] is not None:
        console.print(
            f"speed: {summary['train_samples_per_s']:.0f} samples/s "
            f"with {summary['processes']} processes, {_describe_bound(summary)}",
            highlight=False,
        )
    if summary.get("emulated"):
        console.print("emulated: true", highlight=False)
    console.print(f"weights {summary['weights_sha256']}", highlight=False, soft_wrap=True)


def _describe_bound(summary: Mapping[str, Any]) -> str:
    if summary["bound_samples_per_s"] is None:
        return "too short to tell a bound"
    efficiency = "workers x threads exceed the cores, so no efficiency"
    if summary["efficiency"] is not None:
        efficiency = f"efficiency {summary['efficiency']:.2f}"
    return f"bound {summary['bound_samples_per_s']:.0f} (from spans), {efficiency}"


def _build_table(summary: Mapping[str, Any], run_dir: str) -> Table:
    """Return a row for every stage."""
    title = f"{run_dir}: {summary['steps']} steps in {summary['wall_s']:.0f} s"
    table = Table(title=title, title_justify="left")
    metric = Metric.from_json(summary)
    exit_name = f"exit {metric.words}"
    for name in ("stage", "local loss", exit_name, "busy share", "KiB saved/sample"):
        table.add_column(name, justify="right")
    columns = zip(
        summary["loss_per_stage"],
        read_metric(summary),
        summary["busy_share_per_stage"],
        summary["saved_activation_bytes_per_sample"],
        strict=True,
    )
    for stage, (loss, value, busy, saved_bytes) in enumerate(columns):
        table.add_row(
            str(stage),
            format_number(loss, 4),
            metric.format(value),
            format_percent(busy),
            f"{saved_bytes / 1024:,.0f}",
        )
    return table

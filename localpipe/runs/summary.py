"""The summary of a run: its figures and the table that is printed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from localpipe.config.resolved import Resolved
from localpipe.pipeline.workers.mesh import assign_hosts
from localpipe.runs.progress import _number, _percent


def _best(evals: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the test record of the best epoch, the earliest of equals, chosen on held-out images where there are some."""
    chosen_on = "validation" if any(e["split"] == "validation" for e in evals) else "test"
    candidates = [e for e in evals if e["split"] == chosen_on]
    step = max(candidates, key=lambda e: (e["accuracy"], -e["step"]))["step"]
    return next(e for e in evals if e["split"] == "test" and e["step"] == step)


def _speed(config: Resolved, ends: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the throughput of the last stage and the bound that the workers' compute spans give."""
    processes = config.pipeline.processes
    assert isinstance(processes, int)
    paces = [end["pace"] for end in ends]
    if any(not pace["samples"] for pace in paces):
        return {
            "train_samples_per_s": None,
            "bound_samples_per_s": None,
            "bound_from": "spans",
            "efficiency": None,
        }
    rate = paces[-1]["samples"] / paces[-1]["wall_s"]
    per_sample = [
        sum(paces[stage]["compute_s"] / paces[stage]["samples"] for stage in host.stages)
        for host in assign_hosts(config.replicas, processes)
        if host.replica == 0
    ]
    bound = 1 / max(per_sample)
    fits = all(end["has_cores"] for end in ends)
    return {
        "train_samples_per_s": round(rate, 2),
        "bound_samples_per_s": round(bound, 2),
        "bound_from": "spans",
        "efficiency": round(rate / bound, 4) if fits else None,
    }


def _share(pace: dict[str, float]) -> float | None:
    return round(pace["compute_s"] / pace["wall_s"], 4) if pace["wall_s"] else None


def print_summary(summary: Mapping[str, Any], run_dir: str) -> None:
    """Print the table of a finished run."""
    table = Table(
        title=f"{run_dir}: {summary['steps']} steps in {summary['wall_s']:.0f} s",
        title_justify="left",
    )
    for name in ("stage", "local loss", "exit accuracy", "busy share", "KiB saved/sample"):
        table.add_column(name, justify="right")
    rows = zip(
        summary["loss_per_stage"],
        summary["test_accuracy_per_stage"],
        summary["busy_share_per_stage"],
        summary["saved_activation_bytes_per_sample"],
        strict=True,
    )
    for stage, (loss, accuracy, busy, saved) in enumerate(rows):
        table.add_row(
            str(stage), _number(loss, 4), _percent(accuracy), _percent(busy), f"{saved / 1024:,.0f}"
        )
    console = Console()
    console.print(table)
    console.print(
        f"whole network: accuracy {_percent(summary['test_accuracy'])}, best {_percent(summary['best_test_accuracy'])} "
        f"in epoch {summary['best_epoch']}",
        highlight=False,
    )
    if summary["train_samples_per_s"] is not None:
        efficiency = summary["efficiency"]
        told = (
            "workers x threads exceed the cores, so no efficiency"
            if efficiency is None
            else f"efficiency {efficiency:.2f}"
        )
        console.print(
            f"speed: {summary['train_samples_per_s']:.0f} samples/s with {summary['processes']} processes, bound "
            f"{summary['bound_samples_per_s']:.0f} (from spans), {told}",
            highlight=False,
        )
    console.print(f"weights {summary['weights_sha256']}", highlight=False, soft_wrap=True)

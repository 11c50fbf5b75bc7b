"""What was measured, as rows: pure functions from the workers' answers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from localpipe.bench.systems.plain import choose_segments, count_plain_saved_bytes
from localpipe.bench.systems.shared import Part, SystemRequest, network_of
from localpipe.config.resolved import Resolved
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.workers.mesh import assign_hosts
from localpipe.plan.costs import count_costs
from localpipe.plan.predict import fits_cores
from localpipe.runs.trace import Span

OURS = ("localpipe", "sequential")  # the others are peers
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Measured:
    """A system and its workers' answers: windows by kind (`step`, `bound`), then window, then rank."""

    asked: SystemRequest
    config: Resolved
    steps: int
    saved: list[int | None]
    windows: dict[str, list[list[dict[str, Any]]]]
    note: str | None
    spans: Sequence[
        Sequence[Sequence[Any]]
    ] = ()  # by rank, of a few steps; empty where no timeline was asked for


def build_rows(
    group: Sequence[Measured], command: str, predicted: Sequence[float] = ()
) -> list[dict[str, Any]]:
    """Return one row for every system of a group that took its windows in turn.

    predicted: samples/s that profiles promised of localpipe; their median stands beside what was measured.
    """
    found = [_row(each, command) for each in group]
    for row in found:
        if row["system"] == "localpipe" and predicted and row["samples_per_s"]:
            promised = statistics.median(predicted)
            row.update(
                predicted_samples_per_s=promised,
                predicted_over_measured=promised / row["samples_per_s"],
            )
            row.update(predicted_samples_per_s_runs=list(predicted))
    peers = [row for row in found if row["system"] not in OURS and row["samples_per_s"]]
    best = max(peers, key=lambda row: float(row["samples_per_s"]), default=None)
    for row in found:
        if best is not None and row["samples_per_s"]:
            pairs = zip(row["samples_per_s_runs"], best["samples_per_s_runs"], strict=True)
            ratios = [mine / its for mine, its in pairs]
            row.update(best_peer=best["system"], ratio_to_best_peer=statistics.median(ratios))
            row.update(ratio_to_best_peer_runs=ratios)
    return found


def select_traces(
    group: Sequence[Measured], found: Sequence[dict[str, Any]]
) -> dict[str, list[tuple[int, Span]]]:
    """Return (rank, span) of localpipe's timeline and of the fastest pipeline's of micro-batches, by system."""
    rates = {row["system"]: row["samples_per_s"] for row in found if row["samples_per_s"]}
    pipelines = [
        each
        for each in group
        if each.asked.micro_batches is not None and each.asked.system in rates
    ]
    fastest = max(pipelines, key=lambda each: float(rates[each.asked.system]), default=None)
    return {
        each.asked.system: [
            (rank, Span(*span)) for rank, spans in enumerate(each.spans) for span in spans
        ]
        for each in group
        if each.spans and (each.asked.system == "localpipe" or each is fastest)
    }


def _row(each: Measured, command: str) -> dict[str, Any]:
    asked, config = each.asked, each.config
    count = "" if asked.micro_batches is None else f" --micro-batches {asked.micro_batches}"
    row: dict[str, Any] = {
        "system": asked.system,
        "processes": config.pipeline.processes,
        "threads": config.run.threads,
        "micro_batches": asked.micro_batches,
        "cut": _cut(each),
        "samples_per_s": None,
        "samples_per_s_runs": [],
        "peak_memory_bytes": None,
        "bound_samples_per_s": None,
        "efficiency": None,
        "predicted_samples_per_s": None,
        "predicted_samples_per_s_runs": [],
        "predicted_over_measured": None,
        "jitter_cost": None,
        "saved_activation_bytes_per_sample": None,
        "wire_bytes_per_step": _wire_bytes(each),
        "ratio_to_best_peer": None,
        "best_peer": None,
        "note": each.note,
        "command": f"{command} --systems {asked.system}{count}",
    }
    if each.note is None:
        row.update(_speed(each), saved_activation_bytes_per_sample=_saved(each), **_shares(each))
    return row


def _speed(each: Measured) -> dict[str, Any]:
    """Return medians over windows, each window's time the slowest worker's."""
    rates = _rates(each, "step")
    last = each.windows["step"][-1]
    speed: dict[str, Any] = {
        "samples_per_s": statistics.median(rates),
        "samples_per_s_runs": rates,
        "steps_per_window": each.steps,
        "peak_memory_bytes": [answer["peak_memory_bytes"] for answer in last],
    }
    if "bound" in each.windows:
        bound = _rates(each, "bound")
        ratios = [a / b for a, b in zip(rates, bound, strict=True)]
        speed.update(
            bound_samples_per_s=statistics.median(bound),
            efficiency=statistics.median(ratios) if fits_cores(each.config) else None,
            efficiency_runs=ratios,
            bound_from="paired",
        )
    if "steady" in each.windows:
        pairs = zip(rates, _rates(each, "steady"), strict=True)
        speed["jitter_cost"] = 1 - statistics.median(
            jittering / steady for jittering, steady in pairs
        )
    return speed


def _rates(each: Measured, kind: str) -> list[float]:
    samples = each.steps * each.config.data.batch_size
    return [samples / max(answer["wall_s"] for answer in window) for window in each.windows[kind]]


def _shares(each: Measured) -> dict[str, Any]:
    """Return by rank what share of the windows went where, and the balance: mean over max of the ranks' work."""
    ranks = list(zip(*each.windows["step"], strict=True))
    shares: dict[str, Any] = {}
    for what, key in (
        ("busy", "busy"),
        ("receive_wait", "receive"),
        ("send_wait", "send"),
        ("cpu", "cpu"),
    ):
        spent = [_sum(window[key] for window in rank) for rank in ranks]
        walls = [sum(window["wall_s"] for window in rank) for rank in ranks]
        known = all(seconds is not None for seconds in spent)
        shares[what] = [s / wall for s, wall in zip(spent, walls, strict=True)] if known else None
    kind, key = ("bound", "wall_s") if "bound" in each.windows else ("step", "busy")
    work = [_sum(window[key] for window in rank) for rank in zip(*each.windows[kind], strict=True)]
    known = all(seconds is not None for seconds in work)
    shares["balance"] = statistics.mean(work) / max(work) if known and len(work) > 1 else None
    return shares


def _sum(values: Any) -> Any:
    values = list(values)
    return None if any(value is None for value in values) else sum(values)


def _cut(each: Measured) -> list[int] | None:
    """Return the last block of every stage but the last; None where nothing is cut."""
    if each.asked.cut is not None:
        return [last for _, last in each.asked.cut[:-1]]
    if each.asked.system not in OURS:
        return None
    _, plans = build_plans(each.config)
    return [plan.last for plan in plans[:-1]]


def _saved(each: Measured) -> list[int] | None:
    """Return by rank the peak of bytes a sample of the whole batch that autograd holds."""
    config, system = each.config, each.asked.system
    if each.asked.micro_batches is not None:
        return [saved for saved in each.saved if saved is not None]
    blueprint = network_of(config)
    if system in OURS:
        costs = count_costs(*build_plans(config), config)
        placed = assign_hosts(config.replicas, config.pipeline.processes)
        held = [
            max(costs[stage].activation_bytes_per_sample for stage in host.stages)
            for host in placed
        ]
        shared = [config.replicas[host.stages[0]] for host in placed]
        return [saved // replicas for saved, replicas in zip(held, shared, strict=True)]
    segments = choose_segments(blueprint, config) if system == "checkpoint" else 1
    share = config.pipeline.processes  # a worker of ddp has so much of the batch less
    return [count_plain_saved_bytes(blueprint, config, segments) // share] * share


def _wire_bytes(each: Measured) -> int:
    """Return the bytes that all workers together send in a step."""
    config, system = each.config, each.asked.system
    batch, processes = config.data.batch_size, config.pipeline.processes
    assert isinstance(processes, int)
    if system in OURS:
        _, plans = build_plans(config)
        edges = {host.stages[-1] for host in assign_hosts(config.replicas, processes)}
        return sum(
            plan.sends.nbytes for plan in plans if plan.stage in edges and plan.sends is not None
        )
    blueprint = network_of(config)
    if system == "ddp":  # a ring all-reduce: each of n workers sends 2 (n - 1) / n of the gradients
        part = Part(blueprint, 0, len(blueprint.blocks) - 1, config, torch.device("meta"))
        return 2 * (processes - 1) * _FLOAT_BYTES * sum(p.numel() for p in part.parameters())
    shapes = blueprint.shapes()
    numbers = 0
    for _, last in (each.asked.cut or ())[:-1]:  # neighbouring stages are never in one worker
        size = 1
        for side in shapes[last]:
            size *= side
        numbers += size
    return 2 * numbers * _FLOAT_BYTES * batch  # activations one way, their gradients back

"""The rows of the table, made of the workers' responses by pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from localpipe.bench.systems.spec import SystemRequest, find_system
from localpipe.config.resolved import Resolved
from localpipe.plan.predict import fits_cores
from localpipe.runs.trace import Span

Row = dict[str, Any]
# The key of a row, and that of a worker's response, for every share of the time.
_SHARES = (
    ("busy", "busy"),
    ("receive_wait", "receive"),
    ("send_wait", "send"),
    ("cpu", "cpu"),
)


@dataclass(frozen=True)
class Measured:
    """The responses of a system's workers.

    steps: of a window, 0 if the system was not built. saved: bytes for a sample by rank, None where
    the system's facts count them. windows: by kind (`step`, `bound`, ...), then window, then rank.
    Each one is a mapping of `run_window`. note: why the system has failed, or None. spans: by rank,
    of a few steps, each the values of a `Span`. They are empty without a timeline.
    """

    request: SystemRequest
    config: Resolved
    steps: int
    saved: list[int | None]
    windows: dict[str, list[list[dict[str, Any]]]]
    note: str | None
    spans: Sequence[Sequence[Sequence[Any]]] = ()

    @staticmethod
    def missing(request: SystemRequest, config: Resolved, note: str | None) -> Measured:
        """Return the measurements of a system that was not started: none. note: the reason."""
        return Measured(request, config, 0, [], {}, note)


def build_rows(
    group: Sequence[Measured], command: str, predicted: Sequence[float] = ()
) -> list[Row]:
    """Return one row for every system of a group that took its windows in turn, in order.

    A row has the keys of a benchmark's --json, such as `system`, `samples_per_s`, `cut` and `note`.
    A failed system has None, or an empty list, for figures, and lacks `busy`, `receive_wait`,
    `send_wait`, `cpu` and `balance`. Ratios are to the fastest peer of the group, window by window,
    and None without one.

    command: as typed. Each row's own adds --systems, and `optim.accumulate` where it is not the
    configured one. predicted: samples/s that profiles predict of localpipe as configured. Their
    median is compared with what was measured. Raises ValueError if systems with figures have
    different numbers of windows.
    """
    rows = [_build_row(measured, command) for measured in group]
    for measured, row in zip(group, rows, strict=True):
        if predicted and row["samples_per_s"] and measured.request.is_configured_subject:
            _add_prediction(row, predicted)
    best = _find_best_peer(rows)
    for row in rows:
        if best is not None and row["samples_per_s"]:
            _add_ratio(row, best)
    return rows


def _add_prediction(row: Row, predicted: Sequence[float]) -> None:
    median = statistics.median(predicted)
    row["predicted_samples_per_s"] = median
    row["predicted_over_measured"] = median / row["samples_per_s"]
    row["predicted_samples_per_s_runs"] = list(predicted)


def _find_best_peer(rows: Sequence[Row]) -> Row | None:
    peers = []
    for row in rows:
        if row["samples_per_s"] and find_system(row["system"]).is_peer:
            peers.append(row)
    return max(peers, key=read_rate, default=None)


def label_row(row: Row) -> str:
    """Return a row's system for people: `ddp`, or `localpipe, 4` for messages of one update."""
    if row["micro_batches"] is not None and find_system(row["system"]).accumulates:
        return f"{row['system']}, {row['micro_batches']}"
    return str(row["system"])


def read_rate(row: Row) -> float:
    """Return the samples per second of a row as a key to sort by. TypeError without figures."""
    return float(row["samples_per_s"])


def _add_ratio(row: Row, best: Row) -> None:
    """Compare a row with the best peer's, window by window."""
    pairs = zip(row["samples_per_s_runs"], best["samples_per_s_runs"], strict=True)
    ratios = [rate / best_rate for rate, best_rate in pairs]
    row["best_peer"] = best["system"]
    row["ratio_to_best_peer"] = statistics.median(ratios)
    row["ratio_to_best_peer_runs"] = ratios


def select_traces(
    group: Sequence[Measured], rows: Sequence[Row]
) -> dict[str, list[tuple[int, Span]]]:
    """Return the timelines to draw, as (rank, span), by system. Ranks follow each other.

    They are that of localpipe as configured and that of the fastest pipeline of micro-batches, in
    the order of the group. rows: the rows of the same group. A system without spans is left out, so
    the mapping may be empty.
    """
    pipelines = []
    for row in rows:
        if find_system(row["system"]).has_micro_batches and row["samples_per_s"]:
            pipelines.append(row)
    selected = set()
    if pipelines:
        selected.add(max(pipelines, key=read_rate)["system"])
    traces = {}
    for measured in group:
        request, system = measured.request, measured.request.system
        if measured.spans and (request.is_configured_subject or system in selected):
            traces[system] = _list_spans(measured)
    return traces


def _list_spans(measured: Measured) -> list[tuple[int, Span]]:
    spans = []
    for rank, values_of_rank in enumerate(measured.spans):
        for values in values_of_rank:
            spans.append((rank, Span(*values)))
    return spans


def _build_row(measured: Measured, command: str) -> Row:
    request, config = measured.request, measured.config
    spec = request.spec
    micro_batches = request.micro_batches
    if spec.accumulates and micro_batches is None and config.optim.accumulate > 1:
        micro_batches = config.optim.accumulate
    row: Row = {
        "system": request.system,
        "processes": config.pipeline.processes,
        "threads": config.run.threads,
        "micro_batches": micro_batches,
        "cut": spec.list_cuts(config, request),
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
        "wire_bytes_per_step": spec.count_sent_bytes(config, request),
        "ratio_to_best_peer": None,
        "best_peer": None,
        "note": measured.note,
        "command": _build_command(request, command),
    }
    # A system that has failed has no figures.
    if measured.note is None:
        row.update(_summarise_speed(measured))
        row["saved_activation_bytes_per_sample"] = _list_saved_bytes(measured)
        row.update(_compute_shares(measured))
        row["balance"] = _compute_balance(measured)
    return row


def _build_command(request: SystemRequest, command: str) -> str:
    """Return the command that measures a row alone."""
    count = request.micro_batches
    if count is None:
        return f"{command} --systems {request.system}"
    if request.spec.accumulates:
        return f"{command} optim.accumulate={count} --systems {request.system}"
    return f"{command} --systems {request.system} --micro-batches {count}"


def _summarise_speed(measured: Measured) -> dict[str, Any]:
    """Return medians over windows. The time of a window is the slowest worker's."""
    rates = list_rates(measured, "step")
    last = measured.windows["step"][-1]
    speed: dict[str, Any] = {
        "samples_per_s": statistics.median(rates),
        "samples_per_s_runs": rates,
        "steps_per_window": measured.steps,
        "peak_memory_bytes": [response["peak_memory_bytes"] for response in last],
    }
    if "bound" in measured.windows:
        bounds = list_rates(measured, "bound")
        ratios = [rate / bound for rate, bound in zip(rates, bounds, strict=True)]
        speed["bound_samples_per_s"] = statistics.median(bounds)
        speed["efficiency"] = None
        if fits_cores(measured.config):
            speed["efficiency"] = statistics.median(ratios)
        speed["efficiency_runs"] = ratios
        speed["bound_from"] = "paired"
    if "steady" in measured.windows:
        pairs = zip(rates, list_rates(measured, "steady"), strict=True)
        speed["jitter_cost"] = 1 - statistics.median(rate / steady for rate, steady in pairs)
    return speed


def list_rates(measured: Measured, kind: str) -> list[float]:
    """Return the samples per second of every window of a kind. The slowest worker decides."""
    samples = measured.steps * measured.config.data.batch_size
    rates = []
    for window in measured.windows[kind]:
        times = [response["wall_s"] for response in window]
        rates.append(samples / max(times))
    return rates


def _compute_shares(measured: Measured) -> dict[str, list[float] | None]:
    """Return by rank what share of the windows' time went where; None where it is not known."""
    walls = _sum_by_rank(measured, "step", "wall_s")
    shares: dict[str, list[float] | None] = {}
    for name, key in _SHARES:
        seconds = _sum_by_rank(measured, "step", key)
        shares[name] = None
        if seconds is not None and walls is not None:
            shares[name] = [part / wall for part, wall in zip(seconds, walls, strict=True)]
    return shares


def _compute_balance(measured: Measured) -> float | None:
    """Return the mean over the maximum of the workers' computing; None for one worker."""
    if "bound" in measured.windows:
        work = _sum_by_rank(measured, "bound", "wall_s")
    else:
        work = _sum_by_rank(measured, "step", "busy")
    if work is None or len(work) == 1:
        return None
    return statistics.mean(work) / max(work)


def _sum_by_rank(measured: Measured, kind: str, key: str) -> list[float] | None:
    """Return the sum over the windows of a kind, by rank; None if a worker cannot tell."""
    sums = []
    for responses in zip(*measured.windows[kind], strict=True):
        total = _sum_values(response[key] for response in responses)
        if total is None:
            return None
        sums.append(total)
    return sums


def _sum_values(values: Iterable[float | None]) -> float | None:
    total = 0.0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _list_saved_bytes(measured: Measured) -> list[int]:
    """Return by rank the peak of bytes that autograd holds, for a sample of the whole batch."""
    count = measured.request.spec.count_saved_bytes
    if count is not None:
        return count(measured.config)
    saved_bytes = []
    for saved in measured.saved:
        if saved is not None:
            saved_bytes.append(saved)
    return saved_bytes

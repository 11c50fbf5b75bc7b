"""The rows of a benchmark over a link, made of the workers' responses, and their table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from rich.table import Table

from localpipe.bench.links.predictions import (
    list_edge_bytes,
    list_link_bytes,
    predict_data_parallel,
    predict_localpipe,
    predict_pipeline,
)
from localpipe.bench.rows import Measured, Row, list_rates
from localpipe.bench.tables import plain_table
from localpipe.config.resolved import Resolved
from localpipe.plan.formats import format_number

OPEN, SHAPED, BOUND = "step", "shaped", "bound"  # the windows of a system


def build_link_rows(
    group: Sequence[Measured], goodput_bits_per_s: float, delay_s: float, command: str
) -> list[Row]:
    """Return one row for every system that took its windows in turn, in order.

    goodput_bits_per_s: of a direction of a link, without headers. A system that has failed has a
    note, and None or an empty list for figures. `relative` is the median over the rounds of its
    speed on the link over that on the open one. `of_fp32_open` compares a row of localpipe with the
    open speed of localpipe at fp32. Raises ValueError if systems have different numbers of windows.
    """
    rows = [_build_row(measured, goodput_bits_per_s / 8, delay_s) for measured in group]
    for row in rows:
        words = f"--systems {row['system']}"
        if row["system"] != "localpipe" and row["micro_batches"] is not None:
            words += f" --micro-batches {row['micro_batches']}"
        row["command"] = f"{command} {words}"
    _compare_with_fp32(rows)
    return rows


def _build_row(measured: Measured, bytes_per_s: float, delay_s: float) -> Row:
    request, config = measured.request, measured.config
    is_localpipe = request.spec.is_subject
    row: Row = {
        "system": request.system,
        "wire_dtype": config.pipeline.wire_dtype if is_localpipe else None,
        "processes": config.pipeline.processes,
        "threads": config.run.threads,
        "micro_batches": request.micro_batches,
        "cut": request.spec.list_cuts(config, request),
        "steps_per_window": measured.steps,
        "samples_per_s": None,
        "samples_per_s_runs": [],
        "open_samples_per_s": None,
        "open_samples_per_s_runs": [],
        "relative": None,
        "relative_runs": [],
        "of_fp32_open": None,
        "r": None,
        "predicted_relative": None,
        "predicted_samples_per_s": None,
        "bound_samples_per_s": None,
        "wire_bytes_per_step": request.spec.count_sent_bytes(config, request),
        "note": measured.note,
    }
    if measured.note is None:
        row.update(_summarise_speed(measured))
        r, relative = _predict(measured, bytes_per_s, delay_s)
        row["r"], row["predicted_relative"] = r, relative
        row["predicted_samples_per_s"] = relative * row["open_samples_per_s"]
    return row


def _summarise_speed(measured: Measured) -> Row:
    """Return medians over the rounds. A round has a window on the link and one on the open one."""
    shaped, unshaped = list_rates(measured, SHAPED), list_rates(measured, OPEN)
    relative = [rate / rate_open for rate, rate_open in zip(shaped, unshaped, strict=True)]
    speed: Row = {
        "samples_per_s": statistics.median(shaped),
        "samples_per_s_runs": shaped,
        "open_samples_per_s": statistics.median(unshaped),
        "open_samples_per_s_runs": unshaped,
        "relative": statistics.median(relative),
        "relative_runs": relative,
    }
    if BOUND in measured.windows:
        speed["bound_samples_per_s"] = statistics.median(list_rates(measured, BOUND))
    return speed


def find_step_s(measured: Measured, kind: str, key: str) -> list[float]:
    """Return by rank the median seconds of a step in the windows of a kind. key: of a response."""
    seconds = []
    for responses in zip(*measured.windows[kind], strict=True):  # of one rank
        window_s = statistics.median(response[key] for response in responses)
        seconds.append(window_s / measured.steps)
    return seconds


def _predict(measured: Measured, bytes_per_s: float, delay_s: float) -> tuple[float, float]:
    """Return r, the transfer time over the compute time, and the predicted relative speed."""
    if measured.request.spec.is_subject:
        return _predict_localpipe(measured, bytes_per_s, delay_s)
    if measured.request.cut is not None:
        return _predict_pipeline(measured, bytes_per_s, delay_s)
    return _predict_data_parallel(measured, bytes_per_s, delay_s)


def _predict_localpipe(
    measured: Measured, bytes_per_s: float, delay_s: float
) -> tuple[float, float]:
    config, messages = measured.config, measured.config.optim.accumulate
    compute_s = [seconds / messages for seconds in find_step_s(measured, BOUND, "wall_s")]
    edge_bytes = list_edge_bytes(config)
    r = max(edge_bytes) / bytes_per_s / max(compute_s)

    # The simulated pipeline is as fast on the open link as the measured one.
    open_s = max(find_step_s(measured, OPEN, "wall_s")) / messages
    scaled_s = [seconds * open_s / max(compute_s) for seconds in compute_s]
    depth = config.pipeline.depth
    return r, predict_localpipe(scaled_s, edge_bytes, depth, bytes_per_s, delay_s)


def _predict_pipeline(
    measured: Measured, bytes_per_s: float, delay_s: float
) -> tuple[float, float]:
    request = measured.request
    compute_s = find_step_s(measured, OPEN, "busy")
    link_bytes = list_link_bytes(measured.config, request)
    r = max(link_bytes) / bytes_per_s / max(compute_s)
    open_s = max(find_step_s(measured, OPEN, "wall_s"))
    return r, predict_pipeline(request, compute_s, link_bytes, bytes_per_s, delay_s, open_s)


def _predict_data_parallel(
    measured: Measured, bytes_per_s: float, delay_s: float
) -> tuple[float, float]:
    config, workers = measured.config, measured.config.pipeline.processes
    sent_bytes = measured.request.spec.count_sent_bytes(config, measured.request)
    # Each worker sends 2 (n - 1) / n of the gradients.
    gradient_bytes = sent_bytes // (2 * (workers - 1))
    step_s = max(find_step_s(measured, OPEN, "wall_s"))
    r = sent_bytes / workers / bytes_per_s / step_s
    return r, predict_data_parallel(step_s, gradient_bytes, workers, bytes_per_s, delay_s)


def _compare_with_fp32(rows: Sequence[Row]) -> None:
    """Compare the shaped speed of every row of localpipe with fp32's open one, round by round."""
    base: list[float] = []
    for row in rows:
        if row["wire_dtype"] == "fp32":
            base = row["open_samples_per_s_runs"]
    for row in rows:
        if base and row["wire_dtype"] and row["samples_per_s_runs"]:
            pairs = zip(row["samples_per_s_runs"], base, strict=True)
            row["of_fp32_open"] = statistics.median(rate / rate_open for rate, rate_open in pairs)


# -- the table ----------------------------------------------------------------------------------


def build_link_table(rows: Sequence[Row], config: Resolved, words: str) -> Table:
    """Return the table: a row for every system. A system that has failed has empty cells.

    words: on the link, for the title.
    """
    columns = (
        "system",
        "micro-\nbatches",
        "samples/s\non the link",
        "samples/s\nopen",
        "link / open\n(from .. to)",
        "predicted",
        "r",
        "x fp32's\nopen",
        "MiB sent\na step",
        "cut",
    )
    title = (
        f"{config.model.name}, batch {config.data.batch_size}, {words}: "
        f"{config.bench.windows} windows each, in turn"
    )
    table = plain_table(title, columns)
    for row in rows:
        table.add_row(
            label_link_row(row),
            str(row["micro_batches"] or ""),
            _format(row["samples_per_s"], 1),
            _format(row["open_samples_per_s"], 1),
            _format_relative(row),
            _format(row["predicted_relative"], 3),
            _format(row["r"], 2),
            _format(row["of_fp32_open"], 3),
            f"{row['wire_bytes_per_step'] / 2**20:.2f}",
            " ".join(map(str, row["cut"] or ())),
        )
    return table


def label_link_row(row: Row) -> str:
    """Return a row's system for people, as `localpipe int8`."""
    if row["wire_dtype"] is None:
        return str(row["system"])
    return f"{row['system']} {row['wire_dtype']}"


def _format(value: float | None, digits: int) -> str:
    return format_number(value, digits, missing="", separator="")


def _format_relative(row: Row) -> str:
    if row["relative"] is None:
        return ""
    runs = row["relative_runs"]
    return f"{row['relative']:.3f} ({min(runs):.3f} .. {max(runs):.3f})"

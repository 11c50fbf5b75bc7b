"""The picture of a benchmark: bars of throughput and memory, and timelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from localpipe.bench.rows import Row
from localpipe.bench.systems.spec import find_system
from localpipe.config.resolved import Resolved
from localpipe.results.report.figures import COLOURS, draw_timeline_axes
from localpipe.results.report.timeline import Window, last_steps, steady_window
from localpipe.runs.trace import Span, group_spans

PICTURES = (".png", ".svg", ".pdf")
_STEPS = 4  # of a timeline
_PEER_COLOUR = "#b5b5b5"


def draw_picture(
    groups: Sequence[Sequence[Row]],
    traces: Mapping[str, Sequence[tuple[int, Span]]],
    config: Resolved,
    machine: Row,
    target: Path,
) -> None:
    """Write a picture: throughput and memory, one bar a row, and a timeline of every trace.

    groups: rows of `build_rows`. Rows without figures are left out. traces: as of `select_traces`.
    One without steps is left out. machine: of `describe_machine`. target: one of `PICTURES`, and an
    old file is replaced. Raises ValueError for another ending, and OSError if it cannot be written.
    """
    rows = []
    for row in chain.from_iterable(groups):
        if row["samples_per_s"] is not None:
            rows.append(row)
    windows = {}
    for name, spans in traces.items():
        window = _select_window(name, spans)
        if window is not None:
            windows[name] = window

    # One part for the bars and one for every timeline, as high as their rows need.
    heights = [0.9 + 0.32 * len(rows)]
    for window in windows.values():
        heights.append(1.4 + 0.42 * len(window.rows))
    figure = Figure(figsize=(11, 0.5 + sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_bars(parts[0], rows)
    for part, (name, window) in zip(parts[1:], windows.items(), strict=True):
        _draw_timeline(part, name, window)

    title = f"{config.model.name}, batch {config.data.batch_size}"
    figure.suptitle(f"{title}: {machine['cores']} cores, torch {machine['torch']}")
    figure.savefig(target, dpi=120)


def _select_window(name: str, spans: Sequence[tuple[int, Span]]) -> Window | None:
    """Return the steps to draw, or None without spans.

    localpipe's steps overlap as far as its queues allow, so they come from a steady time.
    """
    rows = group_spans(spans)
    if find_system(name).is_subject:
        return steady_window(rows, _STEPS)
    return last_steps(rows, _STEPS)


def _draw_timeline(part: SubFigure, name: str, window: Window) -> None:
    axes = part.subplots()
    _hide_frame(axes)
    draw_timeline_axes(axes, window)
    busy = f"{name}: {window.computing:.2f} workers compute at once."
    axes.set_xlabel(f"{busy} {axes.get_xlabel()}")


def _draw_bars(part: SubFigure, rows: Sequence[Row]) -> None:
    positions = range(len(rows))
    colours = [_choose_colour(row) for row in rows]
    speed, memory, saved = part.subplots(1, 3, sharey=True)

    # Throughput, with the range over the windows.
    medians, below, above = [], [], []
    for row in rows:
        median, rates = row["samples_per_s"], row["samples_per_s_runs"]
        medians.append(median)
        below.append(median - min(rates))
        above.append(max(rates) - median)
    speed.barh(positions, medians, xerr=(below, above), color=colours, ecolor="black", capsize=2)
    speed.set_xlabel("samples/s, median and range")

    # Memory.
    peaks = [max(row["peak_memory_bytes"]) / 2**20 for row in rows]
    memory.barh(positions, peaks, color=colours)
    memory.set_xlabel("MiB, largest process")
    saved_kib = [max(row["saved_activation_bytes_per_sample"]) / 2**10 for row in rows]
    saved.barh(positions, saved_kib, color=colours)
    saved.set_xlabel("KiB saved for backward, a sample")

    # The three share their vertical axis.
    speed.set_yticks(positions, [_name_row(row) for row in rows])
    speed.invert_yaxis()
    for axes in (speed, memory, saved):
        _hide_frame(axes)


def _choose_colour(row: Row) -> str:
    if find_system(row["system"]).is_subject:
        return COLOURS["forward"]
    return _PEER_COLOUR


def _name_row(row: Row) -> str:
    if row["micro_batches"]:
        return f"{row['system']}, {row['micro_batches']}"
    return str(row["system"])


def _hide_frame(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)

"""The picture of a benchmark: bars of throughput and memory, and timelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure, SubFigure

from localpipe.bench.tables import Row
from localpipe.config.resolved import Resolved
from localpipe.results.report.figures import COLOURS, draw_timeline_axes
from localpipe.results.report.timeline import Window, last_steps, steady_window
from localpipe.runs.trace import Span, group_spans

PICTURES = (".png", ".svg", ".pdf")
_STEPS = 4  # of a timeline


def draw_picture(
    groups: Sequence[Sequence[Row]],
    traces: Mapping[str, Sequence[tuple[int, Span]]],
    config: Resolved,
    machine: Row,
    target: Path,
) -> None:
    """Write a picture: throughput and memory, one bar a row, and below a timeline for every one of the traces."""
    found = [row for group in groups for row in group if row["samples_per_s"] is not None]
    windows = {
        name: window
        for name, spans in traces.items()
        if (window := _window(name, spans)) is not None
    }
    heights = [
        0.9 + 0.32 * len(found),
        *(1.4 + 0.42 * len(window.rows) for window in windows.values()),
    ]
    figure = Figure(figsize=(11, 0.5 + sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _bars(parts[0], found)
    for part, (name, window) in zip(parts[1:], windows.items(), strict=True):
        axes = part.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        draw_timeline_axes(axes, window)
        axes.set_xlabel(
            f"{name}: {window.computing:.2f} workers compute at once. {axes.get_xlabel()}"
        )
    figure.suptitle(
        f"{config.model.name}, batch {config.data.batch_size}: {machine['cores']} cores, torch {machine['torch']}"
    )
    figure.savefig(target, dpi=120)


def _window(name: str, spans: Sequence[tuple[int, Span]]) -> Window | None:
    """Return the steps to draw, or None where nothing was kept: as many of localpipe's as the queues let stand apart."""
    kept = group_spans(spans)
    return steady_window(kept, _STEPS) if name == "localpipe" else last_steps(kept, _STEPS)


def _bars(part: SubFigure, found: Sequence[Row]) -> None:
    names = [
        row["system"] + (f", {row['micro_batches']}" if row["micro_batches"] else "")
        for row in found
    ]
    places = range(len(found))
    speed, memory, saved = part.subplots(1, 3, sharey=True)
    colours = [COLOURS["forward"] if row["system"] == "localpipe" else "#b5b5b5" for row in found]
    middle = [row["samples_per_s"] for row in found]
    low = [m - min(row["samples_per_s_runs"]) for m, row in zip(middle, found, strict=True)]
    high = [max(row["samples_per_s_runs"]) - m for m, row in zip(middle, found, strict=True)]
    speed.barh(places, middle, xerr=(low, high), color=colours, ecolor="black", capsize=2)
    memory.barh(places, [max(row["peak_memory_bytes"]) / 2**20 for row in found], color=colours)
    saved.barh(
        places,
        [max(row["saved_activation_bytes_per_sample"]) / 2**10 for row in found],
        color=colours,
    )
    speed.set_yticks(places, names)
    speed.invert_yaxis()
    for axes, label in (
        (speed, "samples/s, median and range"),
        (memory, "MiB, largest process"),
        (saved, "KiB saved for backward, a sample"),
    ):
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)

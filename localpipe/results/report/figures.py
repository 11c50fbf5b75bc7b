"""The pictures of a run, drawn by matplotlib: curves, the timeline, memory, shares of time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from localpipe.pipeline.workers.mesh import find_rank
from localpipe.pipeline.workers.phase import COMPUTE_PHASES
from localpipe.results.report.shares import Share
from localpipe.results.report.timeline import Window
from localpipe.runs.recorded_run import RecordedRun
from localpipe.runs.trace import Span

WIDTH = 10.0  # inches
COLOURS = {
    "forward": "#3d74b8", "loss": "#7fb0de", "update": "#1d3c6b", "send": "#e8913a",
    "receive": "#d4d4d4", "data": "#d8c49a", "probe": "#5aa469", "record": "#9a9a9a",
    "eval": "#8e6bb0", "save": "#c94f7c", "feedback": "#3aa6a0",
}  # fmt: skip
NAMES = {
    "update": "backward and update",
    "receive": "waits for a message",
    "data": "waits for data",
    "loss": "local loss",
    "feedback": "parameters that come back",
}
_WAITING = ("receive", "data", "send", "feedback")
_MAX_LABELS = 8  # stages, beyond which a legend names only some

Points = Sequence[tuple[int, float]]


def draw_loss(run: RecordedRun) -> Figure | None:
    """Draw the local loss of every stage over steps. None if no loss is recorded yet."""
    curves = {}
    for stage in range(run.stages):
        points = []
        for record in run.of("train", stage):
            if record["loss"] is not None:
                points.append((record["step"], record["loss"]))
        curves[stage] = points
    return _draw_curves(curves, "local loss", marker=None)


def draw_metric(run: RecordedRun) -> Figure | None:
    """Draw the metric of every stage's exit on the test set over steps, fractions in per cent.

    A stage without a trained exit has no curve. None if no value is recorded yet.
    """
    metric = run.metric
    curves = {}
    for stage in range(run.stages):
        points = []
        for record in run.of("eval", stage, "test"):
            value = record.get(metric.name)
            if value is not None:
                points.append((record["step"], metric.scale * value))
        curves[stage] = points
    unit = " (%)" if metric.is_fraction else ""
    samples = "images" if run.config.data.dtype is None else "samples"
    label = f"{metric.words} of the exit on the test {samples}{unit}"
    return _draw_curves(curves, label, marker="o")


def _draw_curves(curves: Mapping[int, Points], label: str, marker: str | None) -> Figure | None:
    """Draw a curve for every stage that has points; None where none has."""
    if not any(curves.values()):
        return None
    figure, axes = _make_axes(3.6)
    shades = matplotlib.colormaps["viridis"]
    last = max(curves)
    for stage, points in curves.items():
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        shade = 0.9 * (1 - stage / last) if last else 0.0
        axes.plot(
            steps,
            values,
            color=shades(shade),
            linewidth=2.2 if stage == last else 1.4,
            marker=marker,
            markersize=3.5,
            label=_label_stage(stage, last),
        )
    axes.set(xlabel="step", ylabel=label)
    axes.grid(axis="y", color="#e5e5e5")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _label_stage(stage: int, last: int) -> str | None:
    """Return a stage's name for the legend; of many stages only some have one."""
    if stage == last:
        return f"stage {stage}, whole network"
    if last < _MAX_LABELS or stage % (last // _MAX_LABELS + 1) == 0:
        return f"stage {stage}"
    return None


def draw_timeline(window: Window) -> Figure:
    """Draw a window of the trace: a row for every stage and rank, bars for its phases.

    Every bar's id is `bar-STAGE-NUMBER-PHASE-STEP`, with the number of the span in its row.
    """
    figure, axes = _make_axes(1.5 + 0.42 * len(window.rows))
    draw_timeline_axes(axes, window)
    return figure


def draw_timeline_axes(axes: Axes, window: Window) -> None:
    """Draw a window of the trace into axes, as `draw_timeline` does.

    The axes get ticks, limits, a label and a legend above them. Rows go from top to bottom.
    """
    rows = window.rows
    phases = set()
    for position, row in enumerate(rows):
        for number, span in enumerate(row.spans):
            phases.add(span.phase)
            if span.end > span.begin:
                _draw_bar(axes, position, number, span, window)

    names = [f"stage {row.stage}\nrank {row.rank}" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(0, 1e3 * (window.end - window.begin))
    axes.set_xlabel(
        f"ms; the last stage's steps {window.first_step} to {window.last_step}, numbers are steps"
    )
    _add_legend(axes, [phase for phase in COLOURS if phase in phases])


def _draw_bar(axes: Axes, position: int, number: int, span: Span, window: Window) -> None:
    """Draw one span, and its step where there is room for a number."""
    height = 0.26 if span.phase in _WAITING else 0.8
    begin, length = 1e3 * (span.begin - window.begin), 1e3 * (span.end - span.begin)
    colour = COLOURS.get(span.phase, "#eeeeee")
    corner = (begin, position - height / 2)
    bar = Rectangle(corner, length, height, color=colour, linewidth=0)
    bar.set_gid(f"bar-{span.stage}-{number}-{span.phase}-{span.step}")
    axes.add_patch(bar)

    has_room = length > 18 * (window.end - window.begin)  # 1.8 % of the width
    if span.phase == "update" and has_room:
        style: dict[str, Any] = {"color": "white", "fontsize": 7, "ha": "center", "va": "center"}
        axes.text(begin + length / 2, position, str(span.step), **style)


def draw_memory(run: RecordedRun) -> Figure | None:
    """Draw the peak memory of every worker. None if `peak_memory_per_rank` is empty."""
    peaks = peak_memory_per_rank(run)
    if not peaks:
        return None
    figure, axes = _make_axes(1.1 + 0.3 * len(peaks))
    rows = range(len(peaks))
    sizes = [peak / 2**20 for peak in peaks.values()]
    bars = axes.barh(rows, sizes, color=COLOURS["forward"], height=0.7)
    axes.bar_label(bars, fmt="{:,.0f} MiB", fontsize=8, padding=3)
    axes.set_yticks(rows, [f"rank {rank}" for rank in peaks], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("peak memory of the process (MiB)")
    return figure


def peak_memory_per_rank(run: RecordedRun) -> dict[int, int]:
    """Return the peak memory of workers in bytes, {rank: bytes}, by ascending rank.

    It is the summary's, for all ranks. Of an unfinished run it is the largest that was recorded,
    for the ranks of the first replicas only. Empty while one of them has recorded none.
    """
    if run.summary is not None:
        return dict(enumerate(run.summary["peak_memory_bytes"]))
    config = run.config
    peaks: dict[int, int] = {}
    for stage in range(run.stages):
        rank = find_rank(stage, 0, config.replicas, config.pipeline.processes)
        peak = peaks.get(rank, 0)
        for record in run.of("train", stage):
            peak = max(peak, record.get("peak_memory_bytes", 0))
        peaks[rank] = peak
    if not all(peaks.values()):
        return {}
    return dict(sorted(peaks.items()))


def draw_shares(shares: Sequence[Share]) -> Figure | None:
    """Draw how every stage's time divides, in per cent, a row for each. None without shares."""
    if not shares:
        return None
    figure, axes = _make_axes(1.3 + 0.3 * len(shares))
    parts = (
        ("computes", "busy", COLOURS["forward"]),
        ("waits for a message", "receive", COLOURS["receive"]),
        ("waits to send", "send", COLOURS["send"]),
        ("its worker's other stages compute", "others", "#c3d7ec"),
        ("rest", "rest", "#f2f2f2"),
    )
    # Each part begins where the one before ends.
    positions = range(len(shares))
    left = [0.0] * len(shares)
    for name, attribute, colour in parts:
        widths = [100 * getattr(share, attribute) for share in shares]
        axes.barh(positions, widths, left=left, color=colour, label=name, height=0.7)
        left = [start + width for start, width in zip(left, widths, strict=True)]

    names = [f"stage {share.stage}\nrank {share.rank}" for share in shares]
    axes.set_yticks(positions, names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="share of the wall clock (%), median over the training records")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False, fontsize=8)
    return figure


def _make_axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _add_legend(axes: Axes, phases: Sequence[str]) -> None:
    """Add a legend of phases above the axes, computing first."""
    ordered = sorted(phases, key=lambda phase: phase not in COMPUTE_PHASES)
    handles = [Patch(color=COLOURS[phase], label=NAMES.get(phase, phase)) for phase in ordered]
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(handles),
        frameon=False,
        fontsize=8,
    )

"""The pictures of a run, drawn by matplotlib: curves of every stage, the timeline, memory, shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from localpipe.pipeline.workers.mesh import rank_of
from localpipe.pipeline.workers.phase import COMPUTE
from localpipe.results.report.shares import Share
from localpipe.results.report.timeline import Window
from localpipe.runs.directory import RunDirectory
from localpipe.runs.trace import Span

WIDTH = 10.0  # inches
COLOURS = {
    "forward": "#3d74b8", "loss": "#7fb0de", "update": "#1d3c6b", "send": "#e8913a", "receive": "#d4d4d4",
    "data": "#d8c49a", "probe": "#5aa469", "record": "#9a9a9a", "eval": "#8e6bb0", "save": "#c94f7c",
}  # fmt: skip
NAMES = {
    "update": "backward and update",
    "receive": "waits for a message",
    "data": "waits for data",
    "loss": "local loss",
}
_WAITING = ("receive", "data", "send")
_MANY = 8  # stages, beyond which a legend names only some


def draw_loss(ledger: RunDirectory) -> Figure | None:
    """Draw the local loss of every stage over steps."""
    curves = {}
    for stage in range(ledger.stages):
        found = [(r["step"], r["loss"]) for r in ledger.of("train", stage) if r["loss"] is not None]
        curves[stage] = found
    return _curves(curves, "local loss", marker=False)


def draw_accuracy(ledger: RunDirectory) -> Figure | None:
    """Draw the test accuracy of every stage's exit over steps; a stage without a trained exit has no curve."""
    curves = {}
    for stage in range(ledger.stages):
        records = ledger.of("eval", stage, "test")
        curves[stage] = [
            (r["step"], 100 * r["accuracy"]) for r in records if r["accuracy"] is not None
        ]
    return _curves(curves, "accuracy of the exit on the test images (%)", marker=True)


def _curves(curves: dict[int, list[tuple[int, float]]], what: str, marker: bool) -> Figure | None:
    if not any(curves.values()):
        return None
    figure, axes = _axes(3.6)
    shades = matplotlib.colormaps["viridis"]
    last = max(curves)
    for stage, points in curves.items():
        if points:
            steps, values = zip(*points, strict=True)
            few = last < _MANY or stage in (0, last) or stage % (last // _MANY + 1) == 0
            axes.plot(
                steps,
                values,
                color=shades(0.9 * (1 - stage / last)) if last else shades(0.0),
                linewidth=2.2 if stage == last else 1.4,
                marker="o" if marker else None,
                markersize=3.5,
                label=(f"stage {stage}" + (", whole network" if stage == last else ""))
                if few
                else None,
            )
    axes.set(xlabel="step", ylabel=what)
    axes.grid(axis="y", color="#e5e5e5")
    axes.legend(frameon=False, fontsize=8)
    return figure


def draw_timeline(window: Window) -> Figure:
    """Draw a window of the trace: a row for every stage, bars for what it does; every bar's id says which it is."""
    figure, axes = _axes(1.5 + 0.42 * len(window.rows))
    draw_timeline_axes(axes, window)
    return figure


def draw_timeline_axes(axes: Axes, window: Window) -> None:
    """Draw a window of the trace into axes."""
    rows = window.rows
    for place, row in enumerate(rows):
        for number, span in enumerate(row.spans):
            if span.end > span.begin:
                _bar(axes, place, number, span, window)
    axes.set_yticks(
        range(len(rows)), [f"stage {row.stage}\nrank {row.rank}" for row in rows], fontsize=8
    )
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(0, 1e3 * (window.end - window.begin))
    axes.set_xlabel(
        f"ms; the last stage's steps {window.first_step} to {window.last_step}, numbers are steps"
    )
    shown = {span.phase for row in rows for span in row.spans}
    _legend(axes, [phase for phase in COLOURS if phase in shown])


def _bar(axes: Axes, place: int, number: int, span: Span, window: Window) -> None:
    height = 0.26 if span.phase in _WAITING else 0.8
    begin, length = 1e3 * (span.begin - window.begin), 1e3 * (span.end - span.begin)
    bar = Rectangle(
        (begin, place - height / 2),
        length,
        height,
        color=COLOURS.get(span.phase, "#eeeeee"),
        linewidth=0,
    )
    bar.set_gid(f"bar-{span.stage}-{number}-{span.phase}-{span.step}")
    axes.add_patch(bar)
    if span.phase == "update" and length > 18 * (
        window.end - window.begin
    ):  # 1.8 % of the width: room for a number
        axes.text(
            begin + length / 2,
            place,
            str(span.step),
            color="white",
            fontsize=7,
            ha="center",
            va="center",
        )


def draw_memory(ledger: RunDirectory) -> Figure | None:
    """Draw the peak memory of every worker."""
    peaks = peak_memory(ledger)
    if not peaks:
        return None
    figure, axes = _axes(1.1 + 0.3 * len(peaks))
    bars = axes.barh(
        range(len(peaks)), [peak / 2**20 for peak in peaks], color=COLOURS["forward"], height=0.7
    )
    axes.bar_label(bars, fmt="{:,.0f} MiB", fontsize=8, padding=3)
    axes.set_yticks(range(len(peaks)), [f"rank {rank}" for rank in range(len(peaks))], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("peak memory of the process (MiB)")
    return figure


def peak_memory(ledger: RunDirectory) -> list[int]:
    """Return the peak memory of every worker in bytes: the summary's, or the newest that an unfinished run has recorded."""
    if ledger.summary is not None:
        return list(ledger.summary["peak_memory_bytes"])
    processes = ledger.config.pipeline.processes
    assert isinstance(processes, int)
    peaks: dict[int, int] = {}
    for stage in range(ledger.stages):
        rank = rank_of(stage, 0, ledger.config.replicas, processes)
        found = [
            record["peak_memory_bytes"]
            for record in ledger.of("train", stage)
            if "peak_memory_bytes" in record
        ]
        peaks[rank] = max([*found, peaks.get(rank, 0)])
    return list(peaks.values()) if all(peaks.values()) else []


def draw_shares(found: Sequence[Share]) -> Figure | None:
    """Draw how every stage's time divides."""
    if not found:
        return None
    figure, axes = _axes(1.3 + 0.3 * len(found))
    parts = {
        "computes": ([share.busy for share in found], COLOURS["forward"]),
        "waits for a message": ([share.receive for share in found], COLOURS["receive"]),
        "waits to send": ([share.send for share in found], COLOURS["send"]),
        "its worker's other stages compute": ([share.others for share in found], "#c3d7ec"),
        "rest": ([share.rest for share in found], "#f2f2f2"),
    }
    left = [0.0] * len(found)
    for name, (values, colour) in parts.items():
        axes.barh(
            range(len(found)),
            [100 * value for value in values],
            left=left,
            color=colour,
            label=name,
            height=0.7,
        )
        left = [before + 100 * value for before, value in zip(left, values, strict=True)]
    axes.set_yticks(
        range(len(found)),
        [f"stage {share.stage}\nrank {share.rank}" for share in found],
        fontsize=8,
    )
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="share of the wall clock (%), median over the training records")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False, fontsize=8)
    return figure


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axes: Axes, phases: Sequence[str]) -> None:
    ordered = sorted(phases, key=lambda phase: phase not in COMPUTE)
    handles: list[Any] = [
        Patch(color=COLOURS[phase], label=NAMES.get(phase, phase)) for phase in ordered
    ]
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(handles),
        frameon=False,
        fontsize=8,
    )

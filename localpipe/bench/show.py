"""What a person sees of a benchmark: two tables, in words where a peer is ahead, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch.nn.modules.batchnorm import _BatchNorm

from localpipe.bench.systems.system import blueprint_of
from localpipe.config import Config
from localpipe.errors import UserError

Row = dict[str, Any]
PICTURES = (".png", ".svg", ".pdf")
_PLAIN_WIDTH = 160
_LESS = 0.98  # what is nearer to the same is the same


def console() -> Console:
    """Return a console for tables: as wide as a file needs where there is no terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=_PLAIN_WIDTH)


def table(title: str, columns: Sequence[str], wide: Console) -> Table:
    """Return an empty table, its first column left-justified; without frames where there is no terminal."""
    shown = Table(title=title, title_justify="left", box=box.HEAVY_HEAD if wide.is_terminal else box.SIMPLE)
    for index, name in enumerate(columns):
        shown.add_column(name, justify="left" if index == 0 else "right")
    return shown


def show(groups: Sequence[Sequence[Row]], config: Config, machine: Row, command: str) -> None:
    """Print the rows of every group, and what they say."""
    on = console()
    for group in groups:
        counts = {row["micro_batches"] for row in group} - {None}
        beside = f", {counts.pop()} micro-batches" if counts else ""
        title = (
            f"{config.model.name}, batch {config.data.batch_size}{beside}: {config.bench.windows} windows each, in turn"
        )
        on.print(_speed(group, title, on))
        on.print(_cost(group, on))
        for row in group:
            if row["jitter_cost"] is not None:
                cost = f"{100 * row['jitter_cost']:.1f} %"
                on.print(f"the jitter costs {cost} of the throughput of the same chain without it", highlight=False)
        for line in verdicts(group):
            on.print(line, highlight=False, soft_wrap=True)
    found = [row for group in groups for row in group]
    for line in _notes(found, config):
        on.print(line, highlight=False, soft_wrap=True)
    on.print(f"{machine['cores']} cores, {machine['device']}, torch {machine['torch']}", highlight=False)
    for count in sorted({row["micro_batches"] for row in found} - {None}) or [None]:
        names = "|".join(row["system"] for row in found if row["micro_batches"] in (None, count))
        counted = "" if count is None else f" --micro-batches {count}"
        on.print(f"one row alone: {command}{counted} --systems {names}", highlight=False, soft_wrap=True)


def _speed(group: Sequence[Row], title: str, on: Console) -> Table:
    best = next((row["best_peer"] for row in group if row["best_peer"]), None)
    against = f"x {best}" if best else "x best peer"
    columns = (
        "system",
        "processes x threads",
        "samples/s",
        "from .. to",
        against,
        "bound",
        "efficiency",
        "balance",
        "cut",
    )
    shown = table(title, columns, on)
    for row in group:
        runs = row["samples_per_s_runs"]
        unknown = "" if row["bound_samples_per_s"] is None else "more threads than cores"
        shown.add_row(
            row["system"],
            f"{row['processes']} x {row['threads']}",
            _number(row["samples_per_s"], 1),
            f"{min(runs):.1f} .. {max(runs):.1f}" if runs else "",
            _number(row["ratio_to_best_peer"], 3),
            _number(row["bound_samples_per_s"], 1),
            _number(row["efficiency"], 3) or unknown,
            _number(row.get("balance"), 3),
            " ".join(map(str, row["cut"])) if row["cut"] is not None and len(row["cut"]) < 8 else "",
        )
    return shown


def _cost(group: Sequence[Row], on: Console) -> Table:
    columns = (
        "system",
        "MiB a process",
        "KiB saved/sample",
        "MiB sent/step",
        "busy",
        "receive wait",
        "send wait",
        "cpu",
    )
    shown = table("memory, wire and time; the largest process, shares by process", columns, on)
    for row in group:
        if row["samples_per_s"] is not None:
            shown.add_row(
                row["system"],
                f"{max(row['peak_memory_bytes']) / 2**20:,.0f}",
                f"{max(row['saved_activation_bytes_per_sample']) / 2**10:,.0f}",
                f"{row['wire_bytes_per_step'] / 2**20:.2f}",
                *(_percents(row[what]) for what in ("busy", "receive_wait", "send_wait", "cpu")),
            )
    return shown


def verdicts(group: Sequence[Row]) -> list[str]:
    """Say where a peer is ahead of localpipe, and where none is."""
    ours = next((row for row in group if row["system"] == "localpipe" and row["samples_per_s"]), None)
    peers = [row for row in group if row["best_peer"] is not None and row["system"] not in ("localpipe", "sequential")]
    if ours is None or not peers:
        return []
    lines = []
    for row in sorted(peers, key=lambda row: -float(row["samples_per_s"])):
        ratio = row["ratio_to_best_peer"] / ours["ratio_to_best_peer"]
        if ratio > 1:
            lines.append(f"{row['system']} is faster than localpipe: {ratio:.2f}x")
    for what, key in (("a process", "peak_memory_bytes"), ("saved for backward", "saved_activation_bytes_per_sample")):
        mine = max(ours[key])
        for row in peers:
            if max(row[key]) < _LESS * mine:
                lines.append(f"{row['system']} needs less memory {what} than localpipe: {max(row[key]) / mine:.2f}x")
    if not any("faster" in line for line in lines):
        lines.insert(0, f"no peer here is faster than localpipe: {ours['ratio_to_best_peer']:.2f}x the best of them")
    return lines


def _notes(found: Sequence[Row], config: Config) -> list[str]:
    """Say what is not there, and what is not the same in every row."""
    lines = [f"note: {row['system']}: {row['note']}" for row in found if row["note"] is not None]
    counts = sorted({row["micro_batches"] for row in found} - {None})
    batch = config.data.batch_size
    if counts and _normalises(config):
        sizes = ", ".join(str(batch // count) for count in counts)
        lines.append(
            f"note: batch normalisation sees micro-batches of {sizes} samples in the pipelines of torch, the whole batch of "
            f"{batch} in localpipe and e2e, each process's share in ddp"
        )
    if any(row["system"] in ("gpipe", "1f1b", "interleaved", "zb") for row in found):
        lines.append(
            "note: the receive wait of a torch pipeline holds its send waits too; ddp hides its waits in backward"
        )
    return lines


def _normalises(config: Config) -> bool:
    """Return whether the network looks at a whole batch anywhere."""
    blueprint = blueprint_of(config)
    parts = blueprint.build_meta(range(len(blueprint.parts)))
    return any(isinstance(module, _BatchNorm) for part in parts for module in part.modules())


def draw(groups: Sequence[Sequence[Row]], config: Config, machine: Row, target: Path) -> None:
    """Write a picture of throughput and memory, one bar a row."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("bench: --picture needs matplotlib; pip install matplotlib") from None
    found = [row for group in groups for row in group if row["samples_per_s"] is not None]
    names = [row["system"] + (f", {row['micro_batches']}" if row["micro_batches"] else "") for row in found]
    places = range(len(found))
    figure = Figure(figsize=(11, 1.2 + 0.32 * len(found)), layout="constrained")
    speed, memory, saved = figure.subplots(1, 3, sharey=True)
    colours = ["tab:blue" if row["system"] == "localpipe" else "tab:gray" for row in found]
    middle = [row["samples_per_s"] for row in found]
    low = [m - min(row["samples_per_s_runs"]) for m, row in zip(middle, found, strict=True)]
    high = [max(row["samples_per_s_runs"]) - m for m, row in zip(middle, found, strict=True)]
    speed.barh(places, middle, xerr=(low, high), color=colours, ecolor="black", capsize=2)
    memory.barh(places, [max(row["peak_memory_bytes"]) / 2**20 for row in found], color=colours)
    kept = [max(row["saved_activation_bytes_per_sample"]) / 2**10 for row in found]
    saved.barh(places, kept, color=colours)
    speed.set_yticks(places, names)
    speed.invert_yaxis()
    speed.set_xlabel("samples/s, median and range")
    memory.set_xlabel("MiB, largest process")
    saved.set_xlabel("KiB saved for backward, a sample")
    figure.suptitle(
        f"{config.model.name}, batch {config.data.batch_size}: {machine['cores']} cores, torch {machine['torch']}"
    )
    figure.savefig(target, dpi=120)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percents(values: Sequence[float] | None) -> str:
    return "" if values is None else " ".join(f"{100 * value:.0f}" for value in values) + " %"

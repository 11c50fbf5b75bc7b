"""The tables of a benchmark, and sentences on where a peer is ahead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.nn.modules.batchnorm import _BatchNorm

from localpipe.bench.systems.shared import network_of
from localpipe.config.resolved import Resolved
from localpipe.plan.tables import narrow_table

Row = dict[str, Any]
_PLAIN_WIDTH = 120
_LISTED = 4  # so many processes one by one, else the range
_LESS = 0.98  # what is nearer to the same is the same


def table_console() -> Console:
    """Return a console for tables: as wide as a file needs where there is no terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=_PLAIN_WIDTH)


def plain_table(title: str, columns: Sequence[str]) -> Table:
    """Return an empty table; only the last column's words may wrap."""
    return narrow_table(title, columns, wraps=columns[-1])


def show_results(
    groups: Sequence[Sequence[Row]], config: Resolved, machine: Row, command: str
) -> None:
    """Print the rows of every group, and what they say."""
    on = table_console()
    for group in groups:
        counts = {row["micro_batches"] for row in group} - {None}
        beside = f", {counts.pop()} micro-batches" if counts else ""
        title = f"{config.model.name}, batch {config.data.batch_size}{beside}: {config.bench.windows} windows each, in turn"
        for one in (_speed(group, title), _cost(group)):
            on.print(one)
            on.print()
        for row in group:
            if row["jitter_cost"] is not None:
                cost = f"{100 * row['jitter_cost']:.1f} %"
                on.print(
                    f"the jitter costs {cost} of the throughput of the same chain without it",
                    highlight=False,
                )
        for line in describe_leads(group):
            on.print(line, highlight=False, soft_wrap=True)
    found = [row for group in groups for row in group]
    if any(row["bound_samples_per_s"] is not None and row["efficiency"] is None for row in found):
        on.print(
            "few cores: the workers' threads outnumber the cores, so that no efficiency can be told",
            highlight=False,
        )
    for line in [*_promises(found), *_notes(found, config)]:
        on.print(line, highlight=False, soft_wrap=True)
    on.print(
        f"{machine['cores']} cores, {machine['device']}, torch {machine['torch']}", highlight=False
    )
    for count in sorted({row["micro_batches"] for row in found} - {None}) or [None]:
        names = "|".join(row["system"] for row in found if row["micro_batches"] in (None, count))
        counted = "" if count is None else f" --micro-batches {count}"
        on.print(
            f"one row alone: {command}{counted} --systems {names}", highlight=False, soft_wrap=True
        )


def _speed(group: Sequence[Row], title: str) -> Table:
    best = next((row["best_peer"] for row in group if row["best_peer"]), None)
    against = f"x\n{best}" if best else "x best\npeer"
    columns = (
        "system",
        "processes\nx threads",
        "samples/s",
        "from .. to",
        against,
        "bound",
        "efficiency",
        "cut",
    )
    shown = plain_table(title, columns)
    for row in group:
        runs = row["samples_per_s_runs"]
        unknown = "" if row["bound_samples_per_s"] is None else "few cores"
        shown.add_row(
            row["system"],
            f"{row['processes']} x {row['threads']}",
            _number(row["samples_per_s"], 1),
            f"{min(runs):.1f} .. {max(runs):.1f}" if runs else "",
            _number(row["ratio_to_best_peer"], 3),
            _number(row["bound_samples_per_s"], 1),
            _number(row["efficiency"], 3) or unknown,
            _cut(row["cut"] or ()),
        )
    return shown


def _cost(group: Sequence[Row]) -> Table:
    columns = (
        "system",
        "MiB a\nprocess",
        "KiB saved\na sample",
        "MiB sent\na step",
        "busy",
        "receive\nwait",
        "send\nwait",
        "cpu",
        "balance",
    )
    shown = plain_table(
        "memory and bytes of the largest process; shares of the time, % of each process", columns
    )
    for row in group:
        if row["samples_per_s"] is not None:
            shown.add_row(
                row["system"],
                f"{max(row['peak_memory_bytes']) / 2**20:,.0f}",
                f"{max(row['saved_activation_bytes_per_sample']) / 2**10:,.0f}",
                f"{row['wire_bytes_per_step'] / 2**20:.2f}",
                *(_percents(row[what]) for what in ("busy", "receive_wait", "send_wait", "cpu")),
                _number(row.get("balance"), 3),
            )
    return shown


def describe_leads(group: Sequence[Row]) -> list[str]:
    """Say where a peer is ahead of localpipe, and where none is."""
    ours = next(
        (row for row in group if row["system"] == "localpipe" and row["samples_per_s"]), None
    )
    peers = [
        row
        for row in group
        if row["best_peer"] is not None and row["system"] not in ("localpipe", "sequential")
    ]
    if ours is None or not peers:
        return []
    lines = []
    for row in sorted(peers, key=lambda row: -float(row["samples_per_s"])):
        ratio = row["ratio_to_best_peer"] / ours["ratio_to_best_peer"]
        if ratio > 1:
            lines.append(f"{row['system']} is faster than localpipe: {ratio:.2f}x")
    for what, key in (
        ("a process", "peak_memory_bytes"),
        ("saved for backward", "saved_activation_bytes_per_sample"),
    ):
        mine = max(ours[key])
        for row in peers:
            if max(row[key]) < _LESS * mine:
                lines.append(
                    f"{row['system']} needs less memory {what} than localpipe: {max(row[key]) / mine:.2f}x"
                )
    if not any("faster" in line for line in lines):
        lines.insert(
            0,
            f"no peer here is faster than localpipe: {ours['ratio_to_best_peer']:.2f}x the best of them",
        )
    return lines


def _promises(found: Sequence[Row]) -> list[str]:
    """Say what a profile promised of localpipe, beside what was measured."""
    return [
        f"plan --measure predicts {row['predicted_samples_per_s']:.1f} samples/s of localpipe: "
        f"{100 * (row['predicted_over_measured'] - 1):+.1f} % against the {row['samples_per_s']:.1f} measured "
        f"(profiles: {' '.join(f'{rate:.1f}' for rate in row['predicted_samples_per_s_runs'])})"
        for row in found
        if row["predicted_samples_per_s"] is not None
    ][:1]


def _notes(found: Sequence[Row], config: Resolved) -> list[str]:
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


def _normalises(config: Resolved) -> bool:
    """Return whether the network looks at a whole batch anywhere."""
    blueprint = network_of(config)
    parts = blueprint.build_meta(range(len(blueprint.parts)))
    return any(isinstance(module, _BatchNorm) for part in parts for module in part.modules())


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percents(values: Sequence[float] | None) -> str:
    if values is None:
        return ""
    percents = [round(100 * value) for value in values]
    return (
        " ".join(map(str, percents))
        if len(percents) <= _LISTED
        else f"{min(percents)} .. {max(percents)}"
    )


def _cut(ends: Sequence[int]) -> str:
    each = len(ends) > _LISTED and list(ends) == list(range(len(ends)))
    return f"each of {len(ends) + 1} blocks" if each else " ".join(map(str, ends))

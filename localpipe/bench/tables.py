"""The tables of a benchmark: throughput and efficiency, then memory, bytes and waits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from rich.console import Console
from rich.table import Table

from localpipe.bench.remarks import (
    describe_accumulation,
    describe_jitter,
    describe_leads,
    describe_notes,
    describe_prediction,
    list_commands,
)
from localpipe.bench.rows import Row, label_row
from localpipe.bench.systems.spec import find_system
from localpipe.config.resolved import Resolved
from localpipe.output import make_console
from localpipe.plan.formats import format_number
from localpipe.plan.tables import narrow_table

_PLAIN_WIDTH = 120
_MAX_LISTED = 4  # up to so many processes are listed one by one, else their range


def table_console() -> Console:
    """Return a console for tables on standard output: 120 columns where there is no terminal."""
    console = make_console()
    if console.is_terminal:
        return console
    return make_console(_PLAIN_WIDTH)


def plain_table(title: str, columns: Sequence[str]) -> Table:
    """Return an empty table; only the last column's words may wrap. columns: at least one."""
    return narrow_table(title, columns, wraps=columns[-1])


def show_results(
    groups: Sequence[Sequence[Row]], config: Resolved, machine: Row, command: str
) -> None:
    """Print the tables of every group with its remarks, then the remarks on all of them.

    groups: rows of `build_rows`. machine: of `describe_machine`. command: as typed, without flags.
    A group without figures is printed too.
    """
    console = table_console()
    # Every group, with the remarks that compare its rows.
    for group in groups:
        title = _format_title(group, config)
        for table in (build_speed_table(group, title), build_cost_table(group)):
            console.print(table)
            console.print()
        for line in describe_jitter(group):
            console.print(line, highlight=False)
        for line in [*describe_leads(group), *describe_accumulation(group)]:
            console.print(line, highlight=False, soft_wrap=True)

    # What holds for all of them.
    rows = list(chain.from_iterable(groups))
    if any(_lacks_cores(row) for row in rows):
        console.print(
            "few cores: the workers' threads outnumber the cores, "
            "so that no efficiency can be told",
            highlight=False,
        )
    for line in [*describe_prediction(rows), *describe_notes(rows, config)]:
        console.print(line, highlight=False, soft_wrap=True)
    device = machine["device"]
    if machine.get("emulated"):
        device += " (emulated: true)"
    console.print(f"{machine['cores']} cores, {device}, torch {machine['torch']}", highlight=False)
    for line in list_commands(rows, config, command):
        console.print(f"one row alone: {line}", highlight=False, soft_wrap=True)


def _lacks_cores(row: Row) -> bool:
    return row["bound_samples_per_s"] is not None and row["efficiency"] is None


def build_speed_table(group: Sequence[Row], title: str) -> Table:
    """Return the table of throughput, bound and cut: a row for every system, in order.

    A system that has failed has empty cells. The ratio's column has the name of the fastest peer,
    if there is one.
    """
    best_column = "x best\npeer"
    for row in group:
        if row["best_peer"]:
            best_column = f"x\n{row['best_peer']}"
            break
    columns = (
        "system",
        "processes\nx threads",
        "samples/s",
        "from .. to",
        best_column,
        "bound",
        "efficiency",
        "cut",
    )
    # A system that has failed has a row without figures, and a note below.
    table = plain_table(title, columns)
    for row in group:
        table.add_row(
            label_row(row),
            f"{row['processes']} x {_format_threads(row['threads'])}",
            _format_figure(row["samples_per_s"], 1),
            _format_range(row["samples_per_s_runs"]),
            _format_figure(row["ratio_to_best_peer"], 3),
            _format_figure(row["bound_samples_per_s"], 1),
            _format_efficiency(row),
            format_cut(row["cut"] or ()),
        )
    return table


def _format_title(group: Sequence[Row], config: Resolved) -> str:
    title = f"{config.model.name}, batch {config.data.batch_size}"
    for row in group:
        if row["micro_batches"] is not None and find_system(row["system"]).has_micro_batches:
            title += f", {row['micro_batches']} micro-batches"
            break
    return f"{title}: {config.bench.windows} windows each, in turn"


def build_cost_table(group: Sequence[Row]) -> Table:
    """Return the table of memory, bytes and shares of the time, for systems that have figures.

    It has no rows where all have failed. A share that a system cannot tell is an empty cell.
    """
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
    title = (
        "memory of the largest process; bytes sent by all together; "
        "shares of the time, % of each process"
    )
    table = plain_table(title, columns)
    # A system that has failed has no row.
    for row in group:
        if row["samples_per_s"] is None:
            continue
        table.add_row(
            label_row(row),
            f"{max(row['peak_memory_bytes']) / 2**20:,.0f}",
            f"{max(row['saved_activation_bytes_per_sample']) / 2**10:,.0f}",
            f"{row['wire_bytes_per_step'] / 2**20:.2f}",
            format_shares(row["busy"]),
            format_shares(row["receive_wait"]),
            format_shares(row["send_wait"]),
            format_shares(row["cpu"]),
            _format_figure(row.get("balance"), 3),
        )
    return table


# -- cells --------------------------------------------------------------------------------------


def _format_figure(value: float | None, digits: int) -> str:
    return format_number(value, digits, missing="", separator="")


def _format_threads(threads: int | Sequence[int]) -> str:
    """Return the threads of a process, or of each: 2, or 1,3."""
    if isinstance(threads, int):
        return str(threads)
    return ",".join(map(str, threads))


def _format_range(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{min(values):.1f} .. {max(values):.1f}"


def _format_efficiency(row: Row) -> str:
    if _lacks_cores(row):
        return "few cores"
    return _format_figure(row["efficiency"], 3)


def format_shares(shares: Sequence[float] | None) -> str:
    """Return the shares of the processes' time in per cent, such as `97 88`, by rank.

    shares: of 1. More than four become a range, as `88 .. 97`. None gives an empty text.
    """
    if shares is None:
        return ""
    percents = [round(100 * share) for share in shares]
    if len(percents) > _MAX_LISTED:
        return f"{min(percents)} .. {max(percents)}"
    return " ".join(map(str, percents))


def format_cut(cuts: Sequence[int]) -> str:
    """Return the last block of every stage but the last as text, such as `3 7 11`.

    More than four stages of one block each, but the last, become `each of N blocks`, where N counts
    stages. An empty cut gives an empty text.
    """
    if len(cuts) > _MAX_LISTED and list(cuts) == list(range(len(cuts))):
        return f"each of {len(cuts) + 1} blocks"
    return " ".join(map(str, cuts))

"""The report of `localpipe doctor` as a table in the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from localpipe.doctor.check import Check, Status
from localpipe.output import make_console

_COLOURS = {"ok": "green", "warning": "yellow", "error": "bold red"}
_LAST_LINE = {
    "ok": "ready",
    "warning": "ready; the warnings cost speed or may matter later",
    "error": "not ready",
}


def print_report(checks: Iterable[Check], worst: Status) -> None:
    """Print a row for every check, in order, with its advice, and a last line.

    worst: the worst status of the checks, which decides the last line. It is not computed here.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        status = Text(check.status, style=_COLOURS[check.status])
        text = Text(check.found)
        if check.advice:
            text.append(f"\n{check.advice}", style="italic")
        table.add_row(status, check.name, text)
    make_console().print(table)
    print(_LAST_LINE[worst])

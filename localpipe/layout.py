"""How a table for a terminal looks: without frames, and narrow enough for 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table


def narrow(
    title: str, columns: Sequence[str], wraps: str | None = None, left: str | None = None
) -> Table:
    """Return an empty table whose figures are never cut short; only the column `wraps` gives way.

    The first column and `left` are left-justified, the others hold figures.
    """
    shown = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, show_edge=False
    )
    for index, name in enumerate(columns):
        justify = "left" if index == 0 or name == left else "right"
        shown.add_column(name, justify=justify, no_wrap=name != wraps, overflow="fold")  # type: ignore[arg-type]
    return shown

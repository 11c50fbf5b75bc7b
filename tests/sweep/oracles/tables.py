"""Tables beside JSON: the cells that a row must show, in their order in one line."""

from __future__ import annotations

import re
from collections.abc import Sequence


def has_row(text: str, cells: Sequence[str]) -> bool:
    """Return whether one line shows all cells in their order, each as a whole word."""
    pattern = r"(?:\s.*?|\s)?".join(rf"(?<!\S){re.escape(cell)}(?!\S)" for cell in cells if cell)
    lines = (re.sub(r"[│┃]", " ", line) for line in text.splitlines())
    return any(re.search(pattern, line) for line in lines)


def percent(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"

"""Figures as text for tables, pages and lines of a terminal."""

from __future__ import annotations


def format_percent(
    value: float | None, digits: int = 1, missing: str = "-", signed: bool = False
) -> str:
    """Return a share of 1 as per cent, like `12.5 %`; `missing` where there is none.

    value: None where there is none. digits: after the point. With `signed`, a share of 0 or more
    has a plus sign.
    """
    if value is None:
        return missing
    sign = ""
    if signed:
        sign = "+"
    return f"{100 * value:{sign}.{digits}f} %"


def format_number(
    value: float | None, digits: int = 0, missing: str = "-", separator: str = ","
) -> str:
    """Return a number like `12,345.6`; `missing` where there is none.

    value: None where there is none. digits: after the point. separator: between thousands, a comma
    or nothing.
    """
    if value is None:
        return missing
    return f"{value:{separator}.{digits}f}"


def format_duration(seconds: float) -> str:
    """Return a time in one unit, or in two: 42 s, 12 min, 3 h 05 min or 2 d 4 h.

    Seconds end at 100 s, minutes at 60 min, hours at 48 h. The units below are rounded. Raises
    ValueError for NaN and OverflowError for infinity.
    """
    minutes = round(seconds / 60)
    hours = round(seconds / 3600)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def format_forecast_time(seconds: float) -> str:
    """Return a time in the one unit that suits it: 4.2 s, 42 s, 12 min or 30.5 h.

    Seconds end at 120 s, minutes at 2 h. There are no days.
    """
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:,.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:,.0f} min"
    return f"{seconds / 3600:,.1f} h"


def format_bytes(nbytes: float) -> str:
    """Return a size in the unit that suits it, KiB at least: 0.5 KiB, 12.0 MiB or 1.5 GiB.

    MiB begins at 2**20 bytes, GiB at 2**30.
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if nbytes >= size:
            return f"{nbytes / size:,.1f} {unit}"
    return f"{nbytes / 2**10:,.1f} KiB"

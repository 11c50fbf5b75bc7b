"""What `bench --link` asks for: a rate, or a ratio of transfer to compute, and a delay."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from localpipe.errors import UserError

_UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_RATE = re.compile(r"([0-9.]+)(k|m|g|)bit")
_DELAY = re.compile(r"([0-9.]+)(us|ms|s)")
_EXPECTED = "expected RATE or RATE,DELAY, as 100mbit, or 1gbit,5ms, or r=0.9"


@dataclass(frozen=True)
class LinkRequest:
    """A link as it was typed.

    bits_per_s: of each direction, headers included. None where `ratio` decides it: the transfer
    time of localpipe's fp32 message over the compute time of its slowest stage. delay_s: one way.
    """

    text: str
    bits_per_s: float | None
    ratio: float | None
    delay_s: float = 0.0


def parse_link(text: str) -> LinkRequest:
    """Return the link of `--link RATE[,DELAY]`. Raises UserError for anything else."""
    rate, comma, delay = text.strip().lower().partition(",")
    delay_s = 0.0
    if comma:
        delay_s = _read_number(_DELAY, _SECONDS, delay.strip(), text, may_be_zero=True)
    rate = rate.strip()
    if rate.startswith("r="):
        ratio = _parse_number(rate.removeprefix("r="), text, may_be_zero=False)
        return LinkRequest(text, None, ratio, delay_s)
    units = {name.removesuffix("bit"): value for name, value in _UNITS.items()}
    bits_per_s = _read_number(_RATE, units, rate, text, may_be_zero=False)
    return LinkRequest(text, bits_per_s, None, delay_s)


def format_rate(bits_per_s: float) -> str:
    """Return a rate for people, as `100 Mbit/s`."""
    for name, unit in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if bits_per_s >= unit:
            return f"{bits_per_s / unit:.4g} {name}bit/s"
    return f"{bits_per_s:.4g} bit/s"


def _read_number(
    pattern: re.Pattern[str], units: dict[str, float], word: str, text: str, may_be_zero: bool
) -> float:
    match = pattern.fullmatch(word)
    if match is None:
        raise UserError(f"bench: --link {text!r} is no link; {_EXPECTED}")
    return _parse_number(match[1], text, may_be_zero) * units[match[2]]


def _parse_number(word: str, text: str, may_be_zero: bool) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number < 0 or (number == 0 and not may_be_zero):
        raise UserError(f"bench: --link {text!r} is no link; {_EXPECTED}")
    return number

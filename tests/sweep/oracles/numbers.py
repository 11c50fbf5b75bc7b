"""Numbers that can be true: of every JSON that a command writes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

_Rule = Callable[[float], bool]
# (pattern of a key's name, whether a number can be true, what it is)
_RULES: tuple[tuple[str, _Rule, str], ...] = (
    (r"accuracy|mean_iou", lambda x: 0 <= x <= 1, "a fraction from 0 to 1"),
    (r"^(busy|receive_wait|send_wait|busy_share_per_stage)$", lambda x: 0 <= x <= 1.05, "a share"),
    (r"^peak_memory_bytes$", lambda x: 2**20 < x < 2**42, "the memory of a process"),
    (r"^balance$", lambda x: 0 < x <= 1.000001, "a mean over a maximum"),
    (r"samples_per_s", lambda x: x > 0, "a speed above 0"),
    (r"^efficiency", lambda x: x > 0, "an efficiency above 0"),
    (r"bytes|params|macs|samples$|_s$|_ms$|^loss", lambda x: x >= 0, "a number at least 0"),
)


def impossible_numbers(value: Any, path: str = "") -> Iterator[str]:
    """Yield a sentence for every number in a JSON value that cannot be true."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from impossible_numbers(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for part in value:
            yield from impossible_numbers(part, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        name = path.rpartition(".")[2]
        if not math.isfinite(value):
            yield f"{path} is {value}"
            return
        for pattern, can_be_true, what in _RULES:
            if re.search(pattern, name):
                if not can_be_true(value):
                    yield f"{path} is {value}, expected {what}"
                break

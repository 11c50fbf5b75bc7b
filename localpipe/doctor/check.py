"""The result of one check: a status, a line of text, advice and figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

MIB = 1 << 20
GIB = 1 << 30
Status = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Check:
    """One line of the report: the result of one check.

    found: the line of text. advice: what to do, empty if the status is ok. figures: values for a
    program, which JSON can hold, empty where the check could not be made.
    """

    name: str
    status: Status
    found: str  # the line of text
    advice: str = ""  # what to do, unless the status is ok
    figures: dict[str, Any] = field(default_factory=dict)  # for a program that reads the JSON

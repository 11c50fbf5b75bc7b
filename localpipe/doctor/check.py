"""A check of the doctor: its status and its line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Check:
    """One line of the report: what was found, what to do about it, and the figures for a machine."""

    name: str
    status: Status
    found: str
    advice: str = ""
    figures: dict[str, Any] = field(default_factory=dict)

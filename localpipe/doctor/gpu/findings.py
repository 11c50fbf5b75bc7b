"""What a step finds, as data: rows of figures, and the machine. A step writes them into a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from localpipe.files import write_whole

# failed: something is not as promised, or could not be measured. absent: the machine lacks it.
FindingStatus = Literal["ok", "failed", "absent"]


@dataclass(frozen=True)
class Finding:
    """One row of the report: what was looked at, how it went, a line of text, and figures.

    figures: values for a program, which JSON can hold. They are empty where something is absent.
    """

    name: str
    status: FindingStatus
    text: str
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class StepFindings:
    """All findings of a step so far. machine: what `describe_machine` returns, None if unknown."""

    findings: list[Finding] = field(default_factory=list)
    machine: Mapping[str, Any] | None = None

    def write(self, path: Path) -> None:
        """Write them to a file atomically, so that its reader never sees half of them."""
        write_whole(path, json.dumps(asdict(self)), fsync=False)

    @staticmethod
    def read(path: Path) -> StepFindings:
        """Return the findings in a file, none if there is no file yet."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return StepFindings()
        findings = [Finding(**finding) for finding in values["findings"]]
        return StepFindings(findings, values["machine"])

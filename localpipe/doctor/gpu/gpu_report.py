"""The report of `localpipe doctor --gpu`: one JSON and one table, rewritten after every finding."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import localpipe
from localpipe.doctor.gpu.findings import Finding, StepFindings
from localpipe.doctor.gpu.gpu_table import format_report
from localpipe.doctor.gpu.step import GpuStep
from localpipe.doctor.gpu.step_process import StepEnd
from localpipe.files import SCHEMA, write_output

JSON_FILE, TABLE_FILE = "gpu.json", "gpu.md"
StepStatus = Literal["waiting", "running", "ended", "failed", "killed"]


@dataclass
class StepReport:
    """One step of the report. Its times are None until they are known."""

    name: str
    question: str
    status: StepStatus = "waiting"
    reason: str = ""
    limit_s: float | None = None
    wall_s: float | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def is_bad(self) -> bool:
        """Whether the step came to no end of its own, or found that something is not right."""
        if self.status in ("failed", "killed"):
            return True
        return any(finding.status == "failed" for finding in self.findings)


class GpuReport:
    """The whole report, in a folder that exists. Every change of a step rewrites both files.

    Raises RunError if a file cannot be written.
    """

    def __init__(
        self, folder: Path, steps: Sequence[GpuStep], minutes: float, size: str, cifar: str | None
    ) -> None:
        self._folder = folder
        self._request = {"minutes": minutes, "size": size, "cifar": cifar}
        self._machine: Mapping[str, Any] | None = None
        self._wall_s = 0.0
        self.steps = [StepReport(step.name, step.question) for step in steps]
        self.write()

    def begin(self, index: int, limit_s: float) -> None:
        """Note that a step runs now, and how long it may."""
        step = self.steps[index]
        step.status, step.limit_s = "running", round(limit_s, 1)
        self.write()

    def add(self, index: int, step_findings: StepFindings) -> list[Finding]:
        """Take over what a step has found so far, and return what is new."""
        step = self.steps[index]
        new = step_findings.findings[len(step.findings) :]
        if not new and (step_findings.machine is None or self._machine is not None):
            return []
        step.findings += new
        self._machine = self._machine or step_findings.machine
        self.write()
        return new

    def end(self, index: int, end: StepEnd, wall_s: float) -> None:
        """Note how a step ended. wall_s: the seconds since the doctor began."""
        step = self.steps[index]
        step.status, step.reason, step.wall_s = end.status, end.reason, round(end.wall_s, 1)
        self._wall_s = wall_s
        self.write()

    @property
    def is_bad(self) -> bool:
        """Whether a step is, see `StepReport.is_bad`."""
        return any(step.is_bad for step in self.steps)

    def as_json(self) -> dict[str, Any]:
        """Return the content of the JSON file, which docs/gpu.md describes."""
        emulated = None
        if self._machine is not None:
            emulated = self._machine["emulated"]
        return {
            "schema": SCHEMA,
            "localpipe": localpipe.__version__,
            "emulated": emulated,
            **self._request,
            "wall_s": round(self._wall_s, 1),
            "machine": self._machine,
            "steps": [asdict(step) for step in self.steps],
        }

    def write(self) -> None:
        """Write both files atomically. Raises RunError if one cannot be written."""
        report = self.as_json()
        content = json.dumps(report, indent=1) + "\n"
        write_output(self._folder / JSON_FILE, content, "--out")
        write_output(self._folder / TABLE_FILE, format_report(report), "--out")

"""The side of a step: what it is given, how much time it has, and where its findings go."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localpipe.doctor.gpu.findings import Finding, FindingStatus, StepFindings
from localpipe.doctor.gpu.size import SIZES

FINDINGS_FILE = "findings.json"
# The end of a step: what still runs is killed, and the last findings are written.
_RESERVE_S = 4.0
_RESERVED_SHARE = 0.1  # at most


@dataclass(frozen=True)
class StepRequest:
    """What a step's process gets from the doctor, as JSON.

    function: `module:function`. folder: exists, and is the step's own. size: a name of SIZES.
    cifar: an .npz with CIFAR-10, or None. end_s: when the process is killed, by the clock of
    `time.monotonic`, which all processes of a machine share.
    """

    function: str
    folder: str
    size: str
    cifar: str | None
    end_s: float


class StepContext:
    """What a step works with. Every finding is in the step's file at once.

    machine: what `describe_machine` returns, None to look at the machine when it is needed.
    """

    def __init__(self, request: StepRequest, machine: Mapping[str, Any] | None = None) -> None:
        self.size = SIZES[request.size]
        self.folder = Path(request.folder)
        self.cifar: Path | None = None
        if request.cifar is not None:
            self.cifar = Path(request.cifar)
        left_s = request.end_s - time.monotonic()
        self._end_s = request.end_s - min(_RESERVE_S, _RESERVED_SHARE * left_s)
        self._findings = StepFindings(machine=machine)

    @property
    def left_s(self) -> float:
        """The seconds until the step has to end, at least 0."""
        return max(0.0, self._end_s - time.monotonic())

    @property
    def machine(self) -> Mapping[str, Any]:
        """The devices and versions. The first use initialises CUDA in this process."""
        if self._findings.machine is None:
            # A step without a device starts faster without torch.
            from localpipe.doctor.gpu.machine import describe_machine

            self._findings.machine = describe_machine()
            self._write()
        return self._findings.machine

    def note_machine(self) -> None:
        """Let the report have the devices and versions, even if the step itself needs none."""
        assert self.machine

    def add_ok(self, name: str, text: str, **figures: Any) -> None:
        """Add a finding that is as promised, or a figure that has no promise."""
        self._add(name, "ok", text, figures)

    def add_failure(self, name: str, text: str, **figures: Any) -> None:
        """Add a finding that is not as promised, or that could not be made."""
        self._add(name, "failed", text, figures)

    def add_absence(self, name: str, reason: str) -> None:
        """Add a finding that cannot be made, because the machine lacks something."""
        self._add(name, "absent", reason, {})

    def _add(self, name: str, status: FindingStatus, text: str, figures: Mapping[str, Any]) -> None:
        self._findings.findings.append(Finding(name, status, text, figures))
        self._write()

    def _write(self) -> None:
        self._findings.write(self.folder / FINDINGS_FILE)

"""The command `localpipe doctor --gpu`: runs all steps in turn, each in its own time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from localpipe.doctor.gpu.findings import StepFindings
from localpipe.doctor.gpu.gpu_report import JSON_FILE, TABLE_FILE, GpuReport
from localpipe.doctor.gpu.step import STEPS, GpuStep, limit_s
from localpipe.doctor.gpu.step_context import FINDINGS_FILE, StepRequest
from localpipe.doctor.gpu.step_process import run_step
from localpipe.errors import UserError, suggest
from localpipe.files import check_output_path
from localpipe.output import say, show_progress

# What the end of the command takes: a step that is killed, the last writing of the files.
_RESERVE_S = 5.0
_RESERVED_SHARE = 0.1  # at most
_STEPS_FOLDER = "steps"  # of the report's folder


@dataclass(frozen=True)
class GpuDoctorRequest:
    """What the command line asks for.

    minutes: of the whole command. out: the folder of the report, None for a new one under `runs`.
    cifar: an .npz with CIFAR-10, or None. size: a name of SIZES. names: of the steps, None for all.
    """

    minutes: float
    out: Path | None
    cifar: Path | None
    size: str
    names: Sequence[str] | None


def run_gpu_doctor(request: GpuDoctorRequest, as_json: bool, began_s: float) -> int:
    """Run the steps, print every finding, write the report; return 1 if something is not right.

    as_json: print nothing but the report's JSON, at the end. began_s: when the command began, by
    `time.monotonic`. Raises UserError without a CUDA device, for an unknown step, for minutes that
    are no positive number, and for files that are missing or in the way.
    """
    steps = select_steps(request.names)
    _check_request(request)
    if not torch.cuda.is_available():
        raise UserError(
            "doctor: --gpu needs a CUDA device, and torch sees none; "
            "run it on a machine that has one, and plain `localpipe doctor` here"
        )
    folder = _make_folder(request.out)
    report = run_steps(steps, request, folder, began_s, as_json)
    if as_json:
        print(json.dumps(report.as_json()))
    else:
        say(f"{folder / TABLE_FILE} has the table, {folder / JSON_FILE} the figures")
    return int(report.is_bad)


def select_steps(names: Sequence[str] | None) -> list[GpuStep]:
    """Return the steps of some names in their own order, all of them for None.

    Raises UserError for a name that no step has.
    """
    step_names = [step.name for step in STEPS]
    for name in names or ():
        if name not in step_names:
            raise UserError(f"doctor: there is no step {name!r}; {suggest(name, step_names)}")
    return [step for step in STEPS if names is None or step.name in names]


def _check_request(request: GpuDoctorRequest) -> None:
    if not (math.isfinite(request.minutes) and request.minutes > 0):
        raise UserError(
            f"doctor: --minutes is {request.minutes:g}, expected a number above 0; write 8"
        )
    if request.cifar is not None and not request.cifar.is_file():
        raise UserError(
            f"doctor: --cifar {request.cifar} is no file; "
            "give an .npz with x_train, y_train, x_test, y_test, or leave it out"
        )


def _make_folder(out: Path | None) -> Path:
    """Make and return the folder of the report. One that holds a report is refused."""
    folder = out
    if folder is None:
        folder = Path("runs") / time.strftime("gpu_%Y%m%d_%H%M%S")
    for name in (JSON_FILE, _STEPS_FOLDER):
        if (folder / name).exists():
            raise UserError(f"doctor: {folder} holds {name} already; give another --out")
    check_output_path("doctor: --out", folder / JSON_FILE, makes_folders=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_steps(
    steps: Sequence[GpuStep],
    request: GpuDoctorRequest,
    folder: Path,
    began_s: float,
    is_quiet: bool = False,
) -> GpuReport:
    """Run steps in turn in the minutes of the request, and return the report, which is on disk too.

    A step that fails or is killed leaves the others as they are. is_quiet: print no finding.
    """
    total_s = 60 * request.minutes
    end_s = began_s + total_s - min(_RESERVE_S, _RESERVED_SHARE * total_s)
    cifar = None
    if request.cifar is not None:
        cifar = str(request.cifar.resolve())
    report = GpuReport(folder, steps, request.minutes, request.size, cifar)
    for index, step in enumerate(steps):
        seconds = limit_s(end_s - time.monotonic(), step, steps[index + 1 :])
        step_folder = folder / _STEPS_FOLDER / step.name.replace(" ", "_")
        step_folder.mkdir(parents=True)
        report.begin(index, seconds)
        show_progress(f"{step.name}: {step.question} (at most {seconds:.0f} s)")
        step_request = StepRequest(
            function=step.function,
            folder=str(step_folder.resolve()),
            size=request.size,
            cifar=cifar,
            end_s=time.monotonic() + seconds,
        )
        take_findings = partial(_take_findings, report, index, step_folder, is_quiet)
        end = run_step(step_request, step_folder / "log.txt", take_findings)
        report.end(index, end, time.monotonic() - began_s)
        if end.reason and not is_quiet:
            say(f"{step.name}: {end.status}: {end.reason}")
    show_progress("")
    return report


def _take_findings(report: GpuReport, index: int, step_folder: Path, is_quiet: bool) -> None:
    """Put what a step has found meanwhile into the report, and print it."""
    for finding in report.add(index, StepFindings.read(step_folder / FINDINGS_FILE)):
        if not is_quiet:
            name = report.steps[index].name
            say(f"{name}: {finding.name}: {finding.status}: {finding.text}")

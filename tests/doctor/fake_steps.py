"""Steps for the tests of `doctor --gpu`: what a step can do well, and what it can do badly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from localpipe.doctor.gpu.step_context import StepContext
from localpipe.errors import UserError


def succeed(context: StepContext) -> None:
    context.add_ok("figure", "twelve", value=12)
    context.add_absence("NVML", "there is none")


def succeed_again(context: StepContext) -> None:
    succeed(context)


def find_wrong(context: StepContext) -> None:
    context.add_failure("weights", "they differ")


def hang(context: StepContext) -> None:
    """Hang, with a process of its own that hangs too."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    context.add_ok("started", "a process", pid=process.pid)
    time.sleep(1000)


def raise_error(context: StepContext) -> None:
    raise ValueError("no such thing")


def raise_mistake(context: StepContext) -> None:
    raise UserError("config: one line")


def crash(context: StepContext) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def read_report(context: StepContext) -> None:
    """Tell what both files of the report hold while this step runs."""
    folder = Path(context.folder).parents[1]
    report = json.loads((folder / "gpu.json").read_text())
    statuses = [step["status"] for step in report["steps"]]
    table = (folder / "gpu.md").read_text()
    context.add_ok("report", "read", statuses=statuses, table=table)

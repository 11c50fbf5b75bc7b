"""The commands that the documentation names and that take longer than a test may."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests import ROOT
from tests.documents import PAGES, SLOW, list_commands, shorten_command
from tests.sweep.log import Log
from tests.sweep.trial import Finding

_LIMIT_S = 600.0
_PROGRAMS = {"localpipe": "localpipe", "torchrun": "torch.distributed.run"}


def try_documentation(folder: Path, log: Log, is_over: Callable[[], bool]) -> None:
    """Run every such command in a reader's folder, with smaller keys, and note what fails."""
    desk = folder / "desk"
    write_desk(desk)
    commands = {command: page for page in PAGES for command in list_commands(page)}
    tried = 0
    for command, page in commands.items():
        if not SLOW.match(command) or page == "CHANGELOG.md":
            continue
        if is_over():
            break
        tried += 1
        problem = run_command(command, desk)
        if problem is not None:
            log.add(Finding("documentation", command, problem), f"{page}: {command}")
    log.say(f"{tried} long commands of the documentation")


def write_desk(desk: Path) -> None:
    """Write what a reader has: configurations, examples, and a very short CIFAR-10."""
    (desk / "data").mkdir(parents=True)
    for name in ("configs", "examples"):
        (desk / name).symlink_to(ROOT / name)
    images, labels = np.zeros((512, 32, 32, 3), np.uint8), np.arange(512) % 10
    archive = desk / "data" / "cifar10.npz"
    np.savez(archive, x_train=images, y_train=labels, x_test=images, y_test=labels)


def run_command(command: str, desk: Path) -> str | None:
    """Run a command as a reader does, in a process of its own; return how it failed, or None."""
    program, *words = shorten_command(command)
    try:
        done = subprocess.run(
            [sys.executable, "-m", _PROGRAMS[program], *words],
            cwd=desk,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{desk}"},
            capture_output=True,
            text=True,
            timeout=_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"has not ended within {_LIMIT_S:g} s"
    # doctor's status is 1 where a check of the machine fails.
    is_right = done.returncode == 0 or (done.returncode == 1 and "doctor" in shlex.split(command))
    if is_right and "Traceback" not in done.stderr:
        return None
    lines = done.stderr.strip().splitlines() or ["nothing was printed"]
    return f"ends with status {done.returncode}: {lines[-1][:300]}"

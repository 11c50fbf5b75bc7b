"""What a forked process does: a command of localpipe, one of its workers, or a test's function."""

from __future__ import annotations

import importlib
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from localpipe.doctor.gpu import commands, step_process
from localpipe.environment import child_environment, die_with_parent, worker_environment
from localpipe.pipeline.launch import launcher
from localpipe.plan import measure
from tests.emulated_gpu.defects import plant
from tests.emulated_gpu.fork_server import ADDRESS, ForkedProcess, Request

DEFECT = "EMULATED_GPU_DEFECT"
RACE = "RACE: "  # before every report of the race checker


def run_command(*words: str) -> int:
    """Run a command of localpipe, with workers that the server forks; return its exit status."""
    from localpipe.cli import main

    fork_workers()
    return main(words)


def fork_workers() -> None:
    """Let this process's launchers ask the server for their workers."""
    for module in (launcher, measure):
        module.start_rank = start_rank  # type: ignore[attr-defined]


def start_rank(
    module: str, rank: int, world: int, folder: Path, stderr: IO[bytes] | None = None
) -> Any:
    """Start one rank as `localpipe.pipeline.launch.rank.start_rank` does, by a fork."""
    output = os.readlink("/proc/self/fd/2") if stderr is None else str(stderr.name)
    environment = worker_environment(rank, world, folder)
    request = Request(f"{__name__}:run_rank", [module], environment, os.getcwd(), output)
    return ForkedProcess(os.environ[ADDRESS], request)


def run_rank(module: str) -> int:
    """Run one rank: what `localpipe/pipeline/launch/start.py` does."""
    die_with_parent()
    if DEFECT in os.environ:
        plant(os.environ[DEFECT])
    status: int = importlib.import_module(module).main()
    return status


def run_doctor(*words: str) -> int:
    """Run a command of localpipe, with steps, their commands and workers that the server forks."""
    for module in (commands, step_process):
        module.start_process = start_process  # type: ignore[attr-defined]
    return run_command(*words)


def start_process(
    module: str, text: str, log: Path, variables: Mapping[str, str] | None = None
) -> Any:
    """Start what `localpipe.doctor.gpu.step_process.start_process` does, by a fork."""
    environment = child_environment(variables or {})
    log.write_bytes(b"")
    request = Request(f"{__name__}:run_module", [module, text], environment, os.getcwd(), str(log))
    return ForkedProcess(os.environ[ADDRESS], request)


def run_module(module: str, text: str) -> int:
    """Call `main()` of a module, with a text as standard input, in a process of the doctor."""
    die_with_parent()
    fork_workers()
    for other in (commands, step_process):
        other.start_process = start_process  # type: ignore[attr-defined]
    sys.stdin = io.StringIO(text)
    status: int = importlib.import_module(module).main()
    return status


def run_tests(*words: str) -> int:
    """Run pytest, with commands of localpipe that the server forks; return its exit status."""
    import pytest

    subprocess.run = _run_forked  # type: ignore[assignment]
    return int(pytest.main(list(words)))


_RUN = subprocess.run
_COMMAND = [sys.executable, "-m", "localpipe"]


def _run_forked(command: Sequence[str], **options: Any) -> Any:
    """Run a command as subprocess.run does; one of localpipe by a fork, and without a race."""
    if list(command[:3]) != _COMMAND:
        return _RUN(command, **options)
    with tempfile.NamedTemporaryFile() as output:
        request = Request(
            f"{__name__}:run_command",
            command[3:],
            options.get("env") or dict(os.environ),
            options.get("cwd") or os.getcwd(),
            output.name,
        )
        process = ForkedProcess(os.environ[ADDRESS], request)
        status = process.wait(options.get("timeout"))
        text = Path(output.name).read_text(errors="replace")
    assert RACE not in text, text
    return subprocess.CompletedProcess(command, status, text, text)


def run_program(name: str, *arguments: Any) -> int:
    """Run a function of `programs`."""
    from tests.emulated_gpu import programs

    getattr(programs, name)(*arguments)
    return 0

"""The doctor's side of a step's process: it is started, followed, and killed at its end."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from localpipe.doctor.gpu.step_context import StepRequest
from localpipe.environment import child_environment, start_command
from localpipe.errors import to_line
from localpipe.pipeline.launch.rank import kill_ranks

_TICK_S = 0.2
# ended: the step came to its own end, whatever it found.
EndStatus = Literal["ended", "failed", "killed"]


@dataclass(frozen=True)
class StepEnd:
    """How a step's process ended. reason: a line, empty if it came to its own end."""

    status: EndStatus
    reason: str
    wall_s: float


def run_step(request: StepRequest, log: Path, tick: Callable[[], None]) -> StepEnd:
    """Run a step in a process of its own until its end, or kill it at `request.end_s`.

    log: the file that gets what the process prints. tick: called a few times a second, and once
    after the end. The process is the head of a session, which is killed as a whole. It never raises
    for what the step does. What `tick` raises passes through, after the process has been killed.
    """
    start_s = time.monotonic()
    process = start_process("localpipe.doctor.gpu.step_main", json.dumps(asdict(request)), log)
    is_over = False
    try:
        while not is_over:
            wait(process, min(_TICK_S, request.end_s - time.monotonic()))
            if process.poll() is not None:
                break
            tick()
            is_over = time.monotonic() >= request.end_s
    finally:
        kill_ranks([process])
    tick()
    wall_s = time.monotonic() - start_s
    if is_over:
        return StepEnd("killed", f"killed at its limit, after {wall_s:.0f} s", wall_s)
    if process.returncode == 0:
        return StepEnd("ended", "", wall_s)
    return StepEnd("failed", describe_failure(process.returncode, log), wall_s)


def start_process(
    module: str, text: str, log: Path, variables: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a process that calls `main()` of a module, and give it a text on standard input.

    log: the file that gets what it prints. variables: environment variables that it has more. It is
    the head of a session of its own, and dies with this process.
    """
    with log.open("wb") as stream:
        process = subprocess.Popen(
            start_command(module),
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=child_environment(variables or {}),
            start_new_session=True,
        )
    assert process.stdin is not None
    # A process that cannot even start says so in its log.
    with contextlib.suppress(BrokenPipeError), process.stdin:
        process.stdin.write(text.encode())
    return process


def wait(process: subprocess.Popen[bytes], limit_s: float) -> None:
    """Wait until a process ends, or some seconds have passed."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, limit_s))


def describe_failure(status: int, log: Path) -> str:
    """Return in one line why a process failed: the signal, or the last line that it printed.

    status: as Popen has it, negative for a signal.
    """
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    printed = [line.strip() for line in lines if line.strip()]
    if not printed:
        return f"exit status {status}, and nothing was printed"
    return to_line(printed[-1])

"""A worker of the benchmark: it builds its part of one system and runs the launcher's commands."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from localpipe.bench.links.pacing import limit_connections
from localpipe.bench.systems.spec import System, SystemRequest
from localpipe.bench.systems.step_timer import StepTimer
from localpipe.bench.turns import CommandReceiver
from localpipe.config.resolved import Resolved
from localpipe.pipeline.launch.job import Job
from localpipe.pipeline.launch.process import prepare_process, run_worker
from localpipe.pipeline.workers.device import device_time_s
from localpipe.pipeline.workers.mesh import Mesh, private_dir
from localpipe.plan.saved_bytes import SavedBytes
from localpipe.runs.trace import Span, Trace

REQUEST_KEY = "bench"  # of the store, for the launcher's request
_TRIAL_STEPS = 3  # to estimate the time of a step


def main() -> int:
    """Run commands until the launcher ends the system. The process ends here with a status."""
    return run_worker(_work)


def _work(mesh: Mesh, job: Job) -> None:
    config = job.parse_config()
    prepare_process(config, mesh.rank)
    request = SystemRequest.from_json(json.loads(mesh.store.get(REQUEST_KEY)))
    serve(mesh, config, request, CommandReceiver(private_dir(), mesh.rank))


def serve(mesh: Mesh, config: Resolved, request: SystemRequest, commands: CommandReceiver) -> None:
    """Run commands and respond to each, until `end` or the end of the commands.

    request: of a system whose part this worker builds on `build`, which must come first, else
    AssertionError. `trace` responds with spans, `limit` limits what connections send. Any other
    command is a kind of window, else KeyError. Only `end` closes the system.
    """
    system: System | None = None
    for command in commands:
        if command["do"] == "build":
            system = request.spec.build(mesh, config, request)
            commands.respond(**_prepare(system, config, request))
            continue
        assert system is not None, "a system is built first"
        if command["do"] == "end":
            system.close()
            commands.respond()
            return
        if command["do"] == "limit":
            limit_connections(command["bytes_per_s"])
            commands.respond()
            continue
        if command["do"] == "trace":
            commands.respond(spans=trace_steps(system, command["steps"]))
            continue
        step = system.window_steps()[command["do"]]
        lag_s = command["lags"][mesh.rank]
        commands.respond(**run_window(system.timer, step, command["steps"], lag_s))


def _prepare(system: System, config: Resolved, request: SystemRequest) -> dict[str, Any]:
    """Warm up; return the estimated time of a step, the kinds of windows, and what is saved."""
    system.warm_up()
    end = time.monotonic()
    saved = None
    if request.spec.count_saved_bytes is None:
        saved = _measure_saved_bytes(system) // config.data.batch_size
    reset_memory_peak()
    step_s = _time_steps(system.trial_step, _TRIAL_STEPS) / _TRIAL_STEPS
    kinds = list(system.window_steps())
    return {"step_s": step_s, "saved": saved, "ended": end, "kinds": kinds}


def run_window(
    timer: StepTimer, step: Callable[[], None], steps: int, lag_s: float
) -> dict[str, float | None]:
    """Run a window of some steps, `lag_s` seconds after the first worker; return its figures.

    Keys: `wall_s`, `ended` (monotonic clock), `busy`, `receive`, `send`, `cpu` in seconds, and
    `peak_memory_bytes` since `reset_memory_peak`. busy, receive and send are None where the timer
    cannot tell them.
    """
    time.sleep(lag_s)
    timer.read()
    wall_s = _time_steps(step, steps)
    end = time.monotonic()
    return {
        "wall_s": wall_s,
        "ended": end,
        **timer.read(),
        "peak_memory_bytes": read_memory_peak(),
    }


def trace_steps(system: System, steps: int) -> list[Span]:
    """Return the spans of this worker in some steps, in seconds of the monotonic clock.

    They are in the order in which they ended. Afterwards nothing is traced. A span that began
    before these steps is left out.
    """
    trace = Trace()
    start = time.monotonic()
    system.timer.set_trace(trace)
    for _ in range(steps):
        system.step()
    system.timer.set_trace(None)
    # The first span may hold the sleep before these steps.
    spans = []
    for span in trace.spans:
        if span.begin >= start:
            spans.append(span)
    return spans


def _time_steps(step: Callable[[], None], steps: int) -> float:
    start = device_time_s()
    for _ in range(steps):
        step()
    return device_time_s() - start


def _measure_saved_bytes(system: System) -> int:
    """Return the peak of bytes that autograd holds in a real step, as `plan` counts them."""
    saved = SavedBytes(system.tensors())
    with saved.hooks():
        system.step()
    return saved.peak


def reset_memory_peak() -> None:
    """Set the peaks of the resident set and of a GPU's allocator back to what is in use now.

    Where the kernel does not allow it, nothing is raised, and the start of the process counts too.
    """
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def read_memory_peak() -> int:
    """Return the peak in bytes since `reset_memory_peak`: of a GPU's allocator, else resident.

    `getrusage` cannot be reset. It serves where the kernel shows no status. It never raises.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

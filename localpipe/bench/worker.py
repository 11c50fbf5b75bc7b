"""A worker of the benchmark: it builds its part of one system, and does what it is asked when its turn comes."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks

from localpipe.bench.systems.local import Local
from localpipe.bench.systems.plain import Plain
from localpipe.bench.systems.shared import System, SystemRequest
from localpipe.bench.systems.torch_pipeline import TorchPipeline
from localpipe.bench.turns import Called
from localpipe.config.resolved import Resolved
from localpipe.pipeline.launch.job import Job
from localpipe.pipeline.launch.process import prepare_process, run_worker
from localpipe.pipeline.workers.device import device_time_s
from localpipe.pipeline.workers.mesh import Mesh, private_dir
from localpipe.plan.costs import SavedBytes
from localpipe.runs.trace import Span, Trace

REQUEST_KEY = "bench"  # the store's key for what the launcher asks
FAMILIES: dict[str, Callable[[Mesh, Resolved, SystemRequest], System]] = {
    "localpipe": Local,
    "sequential": Local,
    "e2e": Plain,
    "e2e-1": Plain,
    "checkpoint": Plain,
    "ddp": Plain,
    "gpipe": TorchPipeline,
    "1f1b": TorchPipeline,
    "interleaved": TorchPipeline,
    "zb": TorchPipeline,
}
_TRIAL = 3  # steps that tell how long a step takes


def main() -> int:
    """Serve the launcher until it says end."""
    return run_worker(_serve)


def _serve(place: Mesh, decided: Job) -> None:
    config = decided.parsed()
    prepare_process(config)
    asked = SystemRequest.from_json(json.loads(place.store.get(REQUEST_KEY)))
    called = Called(private_dir(), place.rank)
    system: System | None = None
    for question in called:
        what = question["do"]
        if what == "build":
            system = FAMILIES[asked.system](place, config, asked)
            system.warm()
            ended = time.monotonic()
            saved = (
                _saved_bytes(system) // config.data.batch_size
                if isinstance(system, TorchPipeline)
                else None
            )
            reset_peak_memory()
            work = _work(system, "bound")
            called.answer(step_s=_timed(work, _TRIAL) / _TRIAL, saved=saved, ended=ended)
            continue
        assert system is not None, "a system is built first"
        if what == "end":
            system.close()
            called.answer()
            return
        if what == "trace":
            called.answer(spans=trace_steps(system, question["steps"]))
            continue
        called.answer(**run_window(system, what, question["steps"], question["lags"][place.rank]))


def run_window(system: System, what: str, steps: int, lag_s: float) -> dict[str, float | None]:
    """Take a window of some steps, `lag_s` behind the first worker; return what it took and when it ended."""
    time.sleep(lag_s)
    system.clock.read()
    wall_s = _timed(_work(system, what), steps)
    ended = time.monotonic()
    return {
        "wall_s": wall_s,
        "ended": ended,
        **system.clock.read(),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _work(system: System, what: str) -> Callable[[], None]:
    """Return localpipe's bound or steady step, where that is asked, and a step of any system."""
    if isinstance(system, Local) and what != "step":
        return {"bound": system.bound, "steady": system.steady}[what]
    return system.step


def trace_steps(system: System, steps: int) -> list[Span]:
    """Return what this worker did in some steps, on the machine's monotonic clock."""
    trace, began = Trace(), time.monotonic()
    system.clock.trace(trace)
    for _ in range(steps):
        system.step()
    system.clock.trace(None)
    return [
        span for span in trace.spans if span.begin >= began
    ]  # not what this worker slept for before


def _timed(work: Callable[[], None], steps: int) -> float:
    begin = device_time_s()
    for _ in range(steps):
        work()
    return device_time_s() - begin


def _saved_bytes(system: TorchPipeline) -> int:
    """Return the peak of bytes that autograd holds in a real step, as `plan` counts them."""
    own = [tensor for part in system.parts for tensor in (*part.parameters(), *part.buffers())]
    saved = SavedBytes(own)
    with saved_tensors_hooks(saved.hold, lambda holder: holder.tensor):
        system.step()
    return saved.peak


def reset_peak_memory() -> None:
    """Forget what start-up took; the kernel counts the resident set's peak from now on, the allocator that of a GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:  # not everywhere allowed: then start-up counts
        return


def peak_memory_bytes() -> int:
    """Return the resident set's peak, or the allocator's on a GPU."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

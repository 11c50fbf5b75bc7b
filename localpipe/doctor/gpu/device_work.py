"""Work on one device inside a step's own process: stages and networks without a command."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from localpipe import config as configs
from localpipe.bench.systems.local import LocalStages
from localpipe.bench.systems.spec import SystemRequest
from localpipe.config.resolved import Resolved
from localpipe.doctor.gpu.step_context import StepContext
from localpipe.pipeline.launch.process import prepare_process
from localpipe.pipeline.workers.device import device_time_s
from localpipe.pipeline.workers.mesh import Mesh, open_file_store
from localpipe.plan.resolve_here import load_data, resolve_here

_WARM_UP_STEPS = 3
_MIN_STEPS = 3


def speed_words(context: StepContext) -> list[str]:
    """Return the keys of what is measured for its speed: ResNet-32 in 4 stages, in full size."""
    size = context.size
    return [
        f"model.name={size.speed_network}",
        "data.name=synthetic",
        # Enough images that an epoch has several batches.
        f"data.samples={4 * size.speed_batch}",
        f"data.image_size={size.speed_image}",
        f"data.batch_size={size.speed_batch}",
        "data.augment=none",
        "pipeline.stages=4",
        "pipeline.processes=1",
        "run.device=cuda",
        "run.threads=1",
    ]


def resolve_words(words: Sequence[str]) -> Resolved:
    """Return the configuration `demo` with some keys replaced, with every `auto` decided.

    It sets the arithmetic of this process too: precision, determinism, threads.
    """
    config = configs.load("demo", words)
    config, dataset = load_data(config, None)
    resolved = resolve_here(config, dataset)
    prepare_process(resolved)
    return resolved


def build_stages(config: Resolved) -> LocalStages:
    """Return the stages of a configuration for one process, with loader and loop, warmed up."""
    with tempfile.TemporaryDirectory(prefix="localpipe-doctor-") as folder:
        mesh = Mesh(0, 1, open_file_store(Path(folder)), local=True)
        stages = LocalStages(mesh, config, SystemRequest("sequential"))
    stages.warm_up()
    return stages


def measure_step_s(step: Callable[[], None], seconds: float) -> float:
    """Run steps for about some seconds after a warm-up, and return the seconds that one takes."""
    count = count_steps(step, seconds)
    return time_steps(step, count) / count


def count_steps(step: Callable[[], None], seconds: float) -> int:
    """Run a few steps to warm up, and return how many take about some seconds, at least three."""
    for _ in range(_WARM_UP_STEPS):
        step()
    one_s = max(time_steps(step, 1), 1e-6)
    return max(_MIN_STEPS, round(seconds / one_s))


def time_steps(step: Callable[[], None], count: int) -> float:
    """Return the seconds of some steps. The device has finished before the clock is read."""
    start_s = device_time_s()
    for _ in range(count):
        step()
    return device_time_s() - start_s

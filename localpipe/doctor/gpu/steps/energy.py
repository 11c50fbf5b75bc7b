"""The energy that a sample takes: stages eager and captured, end to end, with checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from localpipe.bench.memory_step import build_training_step
from localpipe.bench.systems.plain import choose_segments
from localpipe.doctor.gpu.device_work import (
    build_stages,
    count_steps,
    resolve_words,
    speed_words,
    time_steps,
)
from localpipe.doctor.gpu.nvml import NvmlError, open_energy_meter
from localpipe.doctor.gpu.step_context import StepContext
from localpipe.pipeline.stages.stage_plan import build_blueprint


def run(context: StepContext) -> None:
    """Add a finding for every way to train, or why the device's energy is not known."""
    context.note_machine()
    try:
        read_joules = open_energy_meter(0)
    except NvmlError as error:
        context.add_absence("energy", str(error))
        return
    for name, step in _list_steps(context):
        measure_energy(context, name, step, read_joules)


def _list_steps(context: StepContext) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield the names and the steps. Each computes on a batch that is on the device already."""
    words = speed_words(context)
    for name, capture in (("stages, eager", "none"), ("stages, captured", "graphs")):
        stages = build_stages(resolve_words([*words, f"run.capture={capture}"]))
        yield name, stages.window_steps()["bound"]
    config = resolve_words([*words, "pipeline.stages=1"])
    blueprint = build_blueprint(config)
    yield "end to end", build_training_step(config, blueprint, 1, "cuda")
    segments = choose_segments(blueprint, config)
    yield "checkpointing", build_training_step(config, blueprint, segments, "cuda")


def measure_energy(
    context: StepContext, name: str, step: Callable[[], None], read_joules: Callable[[], float]
) -> None:
    """Add the joules of a sample. step: trains on `speed_batch` samples. read_joules: of NVML."""
    steps = count_steps(step, context.size.rate_s)
    start_j = read_joules()
    seconds = time_steps(step, steps)
    joules = read_joules() - start_j
    samples = steps * context.size.speed_batch
    if joules <= 0:
        context.add_absence(name, "the device's counter of energy stood still")
        return
    text = f"{1000 * joules / samples:.3f} mJ a sample, {joules / seconds:.0f} W"
    text += f", {samples / seconds:,.0f} samples/s"
    figures = {
        "joules_per_sample": joules / samples,
        "watts": round(joules / seconds, 1),
        "samples_per_s": round(samples / seconds, 1),
    }
    context.add_ok(name, text, **figures)

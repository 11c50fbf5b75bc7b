"""How many images a second the loader makes, beside what the device trains on."""

from __future__ import annotations

import time

from localpipe import data
from localpipe.config.resolved import Resolved
from localpipe.data.batches import BatchReader
from localpipe.doctor.gpu.device_work import (
    build_stages,
    measure_step_s,
    resolve_words,
    speed_words,
)
from localpipe.doctor.gpu.step_context import StepContext


def run(context: StepContext) -> None:
    """Add three findings: the loader alone, the device alone, and both together."""
    context.note_machine()
    config = resolve_words([*speed_words(context), "data.augment=crop_flip", "run.capture=graphs"])
    batch, seconds = config.data.batch_size, context.size.rate_s
    loader = _measure_loader(config, seconds)
    text = f"{loader:,.0f} images/s, one thread, with augmentation"
    context.add_ok("loader", text, samples_per_s=round(loader, 1))

    stages = build_stages(config)
    # The bound computes on batches that are on the device already.
    step_s = measure_step_s(stages.window_steps()["bound"], seconds)
    device = batch / step_s
    text = f"{device:,.0f} samples/s, {config.model.name} in {config.stages} captured stages"
    context.add_ok("device", text, samples_per_s=round(device, 1))

    step_s = measure_step_s(stages.step, seconds)
    both = batch / step_s
    text = f"{both:,.0f} samples/s; the loader alone is {loader / device:.2f} x the device alone"
    if loader < device:
        text += ": the device waits for it"
    context.add_ok(
        "together", text, samples_per_s=round(both, 1), loader_over_device=round(loader / device, 3)
    )


def _measure_loader(config: Resolved, seconds: float) -> float:
    """Return the images a second that one thread reads, augments and pins."""
    dataset = data.load(config.data, config.run.seed)
    reader = BatchReader(dataset, config.run.seed, pin_memory=True)
    batch, images = config.data.batch_size, 0
    batches = len(dataset.train) // batch
    reader.read_train(0, slice(0, batch))  # the first one allocates
    start_s = time.perf_counter()
    index = 0
    while time.perf_counter() - start_s < seconds:
        first = index % batches * batch
        images += len(reader.read_train(index // batches, slice(first, first + batch))["target"])
        index += 1
    return images / (time.perf_counter() - start_s)

"""Real training steps on one device: end to end, or all stages one after another."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from localpipe.bench.systems.part import Part
from localpipe.config.resolved import Resolved
from localpipe.networks.blueprint import Blueprint
from localpipe.pipeline.channels.message import Header, Kind, Message
from localpipe.pipeline.stages.boundary import build_entry
from localpipe.pipeline.stages.optimizer import build_update
from localpipe.pipeline.stages.precision import set_precision_flags
from localpipe.pipeline.stages.stage import Stage, mark_nothing, train_step
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.tasks.task import example_target

_STEPS = 3


def measure_cuda_peak(config: Resolved, blueprint: Blueprint, segments: int | None) -> int:
    """Return the allocator's peak in bytes over real training steps of the whole batch on one GPU.

    It is the peak of three steps after one to warm up, weights and optimizer included. The steps
    are eager, in the precision of the configuration, whose device is cuda. segments: of
    the network end to end. None stands for the stages of the configuration. Raises
    torch.OutOfMemoryError where the GPU is too small, RuntimeError without one.
    """
    set_precision_flags(config)
    gc.collect()
    torch.cuda.empty_cache()
    step = build_training_step(config, blueprint, segments, "cuda")
    step()  # from now on there are optimizer state and workspaces
    torch.cuda.reset_peak_memory_stats()
    for _ in range(_STEPS):
        step()
    return int(torch.cuda.max_memory_allocated())


def build_training_step(
    config: Resolved, blueprint: Blueprint, segments: int | None, device: str
) -> Callable[[], None]:
    """Return a step on one random batch that is on the device already.

    The step takes and returns nothing. segments: of the network end to end. None stands for the
    stages of the configuration, which then run one after another. The learning rate is 0. device:
    replaces `run.device`.
    """
    if segments is None:
        return _build_stages_step(config, blueprint, device)
    return _build_end_to_end_step(config, blueprint, segments, device)


def _build_end_to_end_step(
    config: Resolved, blueprint: Blueprint, segments: int, device: str
) -> Callable[[], None]:
    part = Part(blueprint, 0, len(blueprint.blocks) - 1, config, torch.device(device))
    part.segments = segments
    update = build_update(config.optim, part.parameters())
    assert update is not None, "a head has parameters"
    image, target = _make_batch(config, blueprint, device)
    entry = build_entry(config).to(device)

    def step() -> None:
        update.optimizer.zero_grad(set_to_none=True)
        blueprint.task.loss(part(entry(image)), target).backward()
        update.run()

    return step


def _build_stages_step(config: Resolved, blueprint: Blueprint, device: str) -> Callable[[], None]:
    _, plans = build_plans(config)
    stages = [Stage(plan, blueprint, config, device) for plan in plans]
    image, target = _make_batch(config, blueprint, device)
    header = Header(Kind.TRAIN, 1, 1, config.data.batch_size)

    def step() -> None:
        message = Message(header, {blueprint.inputs.name: image, "target": target})
        for stage in stages:
            message = _train_stage(stage, message)

    return step


def _train_stage(stage: Stage, message: Message) -> Message:
    """Train a stage on a message, as a worker does; return the next stage's message."""
    fields: dict[str, Any] = {}

    def send(h: Tensor, gradient: Tensor | None) -> None:
        if stage.plan.sends is None:
            return
        outgoing = dict(stage.outgoing(message, h, gradient))
        for field in stage.plan.sends.fields:
            fields[field.name] = outgoing[field.name].clone()

    train_step(stage, message, 0.0, send, mark_nothing)
    return Message(message.header, fields)


def _make_batch(config: Resolved, blueprint: Blueprint, device: str) -> tuple[Tensor, Tensor]:
    size = config.data.batch_size
    target = example_target(blueprint.task, size, device)
    if blueprint.dtype != "uint8":  # no images
        return blueprint.example_inputs(size, device), target
    dtype = getattr(torch, blueprint.inputs.dtype)
    image = torch.randint(0, 256, (size, *blueprint.sample), dtype=dtype, device=device)
    return image, target

"""torch.distributed.pipelining: GPipe, 1F1B, interleaved 1F1B and interleaved zero bubble."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from localpipe.bench.systems.batches import Batches, Targets
from localpipe.bench.systems.part import Part
from localpipe.bench.systems.spec import Cut, System, SystemRequest, SystemSpec
from localpipe.bench.systems.step_timer import StepTimer
from localpipe.config.resolved import Resolved
from localpipe.networks.blueprint import Blueprint
from localpipe.pipeline.channels.groups import join_world_group
from localpipe.pipeline.stages.boundary import build_entry
from localpipe.pipeline.stages.optimizer import build_update, set_rate
from localpipe.pipeline.stages.stage_plan import build_blueprint
from localpipe.pipeline.workers.device import select_worker_device
from localpipe.pipeline.workers.mesh import Mesh

_FLOAT_BYTES = 4
# The calls of torch's stages that compute, and the phase of each in a timeline.
_COMPUTE = {
    "forward_one_chunk": "forward",
    "backward_one_chunk": "update",
    "backward_weight_one_chunk": "update",
}


class TorchPipeline(System):
    """A synchronous pipeline of micro-batches.

    Worker r of n hosts the stages r, r + n, ... of a cut. The first worker reads the images, the
    last one the targets. Batch normalisation sees one micro-batch. Every worker makes it, because
    it waits for all.

    request: with a cut and micro-batches, else AssertionError. make_schedule: torch's schedule. It
    gets one stage, or a list where a worker hosts several.
    """

    def __init__(
        self, mesh: Mesh, config: Resolved, request: SystemRequest, make_schedule: Any
    ) -> None:
        assert request.cut is not None and request.micro_batches is not None
        device = select_worker_device(config, mesh.rank, mesh.local_rank)
        join_world_group(mesh.store, mesh.rank, mesh.world, mesh.shares_memory, device)
        blueprint = build_blueprint(config)
        self.entry = build_entry(config).to(device)

        # The stages of this worker.
        hosted = range(mesh.rank, len(request.cut), mesh.world)
        size = config.data.batch_size // request.micro_batches
        self.parts = [Part(blueprint, *request.cut[index], config, device) for index in hosted]
        for part in self.parts:
            part.gives_extra = False  # torch's last stage has one output
        stages = []
        for part, index in zip(self.parts, hosted, strict=True):
            stages.append(_build_stage(part, blueprint, request.cut, index, size, device))

        # The schedule that runs them, and the optimizer.
        scheduled: Any = stages
        if request.spec.stages_per_worker == 1:
            (scheduled,) = stages
        self.schedule = make_schedule(scheduled, request.micro_batches, loss_fn=blueprint.task.loss)
        # Older versions always merge the outputs.
        self._settings = {}
        if "return_outputs" in inspect.signature(self.schedule.step).parameters:
            self._settings["return_outputs"] = False
        parameters: list[Tensor] = []
        for part in self.parts:
            parameters += part.parameters()
        self.update = build_update(config.optim, parameters)

        # What it reads, and the time it takes.
        self.batches: Batches | None = None
        if mesh.rank == 0:
            self.batches = Batches(config, device)
        self.targets = Targets(config, device)
        self._is_last = mesh.rank == mesh.world - 1
        self.timer = StepTimer(device)
        self.timer.send = None
        _time_stages(stages, self.timer)
        self._timed_update = self.timer.wrap(self._update, hosted[0])

    def step(self) -> None:
        """Train on one batch, in micro-batches. All workers step at the same time."""
        start, busy_before = time.perf_counter(), self.timer.busy
        self.timer.begin_step()
        target, rate = self.targets.next()
        if self.update is not None:
            self.update.optimizer.zero_grad(set_to_none=True)
        inputs = []
        if self.batches is not None:
            image, _, _ = self.batches.next()
            inputs.append(self.entry(image))
        last_target = None
        if self._is_last:
            last_target = target
        self.schedule.step(*inputs, target=last_target, **self._settings)
        self._timed_update(rate)
        # A worker waits while it does not compute.
        if busy_before is not None and self.timer.busy is not None:
            busy_s = self.timer.busy - busy_before
            self.timer.add(receive=time.perf_counter() - start - busy_s)

    def _update(self, rate: float) -> None:
        if self.update is not None:
            set_rate(self.update.optimizer, rate)
            self.update.run()

    def weights(self) -> dict[str, Tensor]:
        """Return the weights and buffers of this worker's stages."""
        weights: dict[str, Tensor] = {}
        for part in self.parts:
            weights.update(part.weights())
        return weights

    def tensors(self) -> list[Tensor]:
        """Return parameters and all buffers of this worker's stages."""
        # With the buffers that no state dictionary has.
        tensors: list[Tensor] = []
        for part in self.parts:
            tensors += [*part.parameters(), *part.buffers()]
        return tensors

    def close(self) -> None:
        """Leave the process group. Call it once."""
        dist.destroy_process_group()


def _time_stages(stages: Sequence[PipelineStage], timer: StepTimer) -> None:
    """Count the computing of torch's stages as busy, and keep it for a timeline."""
    for stage in stages:
        for name, phase in _COMPUTE.items():
            setattr(stage, name, timer.wrap(getattr(stage, name), stage.stage_index, phase))


def _build_stage(
    part: Part, blueprint: Blueprint, cut: Cut, index: int, size: int, device: torch.device
) -> PipelineStage:
    """Return a stage with the shapes of its micro-batches, so that none has to be sent.

    size: samples of a micro-batch.
    """
    shapes = blueprint.shapes()
    first, last = cut[index]
    output_shape = shapes[last]
    if index == len(cut) - 1:
        output_shape = blueprint.task.output_shape
    example_input = blueprint.example_inputs(size)
    if index > 0:
        part.protect_input(shapes[first - 1])
        example_input = torch.empty(size, *shapes[first - 1], device="meta", requires_grad=True)
    example_output = torch.empty(size, *output_shape, device="meta", requires_grad=True)
    return PipelineStage(
        part, index, len(cut), device, input_args=example_input, output_args=example_output
    )


def _count_sent_bytes(config: Resolved, request: SystemRequest) -> int:
    """Return the bytes of the activations, and of their gradients on the way back."""
    shapes = build_blueprint(config).shapes()
    numbers = 0
    # Neighbouring stages are never in one worker.
    for _, last in (request.cut or ())[:-1]:
        numbers += math.prod(shapes[last])
    return 2 * numbers * _FLOAT_BYTES * config.data.batch_size


def _build_spec(
    make_schedule: Any, stages_per_worker: int = 1, fills_pipeline: bool = False
) -> SystemSpec:
    return SystemSpec(
        build=partial(TorchPipeline, make_schedule=make_schedule),
        count_sent_bytes=_count_sent_bytes,
        needs_two_processes=True,
        has_micro_batches=True,
        trains_frozen=False,
        clips_gradients=False,
        stages_per_worker=stages_per_worker,
        fills_pipeline=fills_pipeline,
    )


GPIPE = _build_spec(ScheduleGPipe)
ONE_F_ONE_B = _build_spec(Schedule1F1B, fills_pipeline=True)
INTERLEAVED = _build_spec(ScheduleInterleaved1F1B, stages_per_worker=2)
ZERO_BUBBLE = _build_spec(ScheduleInterleavedZeroBubble, stages_per_worker=2)

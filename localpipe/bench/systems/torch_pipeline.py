"""torch.distributed.pipelining as it comes: GPipe, 1F1B, interleaved 1F1B and interleaved zero bubble."""

from __future__ import annotations

import inspect
import time
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

from localpipe.bench.systems.shared import (
    Batches,
    Part,
    StepTimer,
    SystemRequest,
    Targets,
    build_entry,
    network_of,
    set_rate,
)
from localpipe.config.resolved import Resolved
from localpipe.networks.blueprint import Blueprint
from localpipe.pipeline.channels.groups import join_world_group
from localpipe.pipeline.stages.optimizer import build_optimizer
from localpipe.pipeline.workers.device import select_device
from localpipe.pipeline.workers.mesh import Mesh

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zb": ScheduleInterleavedZeroBubble,
}
WARM_UP = 4
_COMPUTE = {
    "forward_one_chunk": "forward",
    "backward_one_chunk": "update",
    "backward_weight_one_chunk": "update",
}


class TorchPipeline:
    """A synchronous pipeline of micro-batches; worker r of n hosts the stages r, r + n, ... of its cut.

    Its first worker reads the images, its last one the targets. Batch normalisation looks at one micro-batch.
    """

    def __init__(self, place: Mesh, config: Resolved, asked: SystemRequest) -> None:
        assert asked.cut is not None and asked.micro_batches is not None
        where = select_device(config.run.device, place.local_rank)
        join_world_group(place.store, place.rank, place.world, place.local, where)
        blueprint = network_of(config)
        self.entry = build_entry(config).to(where)
        own = range(place.rank, len(asked.cut), place.world)
        self.parts = [Part(blueprint, *asked.cut[stage], config, where) for stage in own]
        size = config.data.batch_size // asked.micro_batches
        stages = [
            _stage(part, blueprint, asked.cut, i, size, where)
            for part, i in zip(self.parts, own, strict=True)
        ]
        schedule = SCHEDULES[asked.system]
        single = asked.system in ("gpipe", "1f1b")
        self.schedule = schedule(
            stages[0] if single else stages, asked.micro_batches, loss_fn=blueprint.task.loss
        )
        optimizer = build_optimizer(
            config.optim, [p for part in self.parts for p in part.parameters()]
        )
        self.optimizer = optimizer
        self.batches = Batches(config, where) if place.rank == 0 else None
        self.targets = Targets(config, where)
        self._last = place.rank == place.world - 1
        # Older versions always merge the outputs.
        known = inspect.signature(self.schedule.step).parameters
        self._quiet = {"return_outputs": False} if "return_outputs" in known else {}
        self.clock = StepTimer(where)
        self.clock.send = None
        for stage in stages:
            for name, phase in _COMPUTE.items():
                setattr(
                    stage, name, self.clock.work(getattr(stage, name), stage.stage_index, phase)
                )
        self._update = self.clock.work(self._updated, own[0])

    def warm(self) -> None:
        for _ in range(WARM_UP):
            self.step()

    def step(self) -> None:
        begin, busy = time.perf_counter(), self.clock.busy
        self.clock.begin_step()
        target, rate = self.targets.next()
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        given = [] if self.batches is None else [self.entry(self.batches.next()[0])]
        self.schedule.step(*given, target=target if self._last else None, **self._quiet)
        self._update(rate)
        if busy is not None and self.clock.busy is not None and self.clock.receive is not None:
            self.clock.receive += time.perf_counter() - begin - (self.clock.busy - busy)

    def _updated(self, rate: float) -> None:
        if self.optimizer is not None:
            set_rate(self.optimizer, rate)
            self.optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        return {name: value for part in self.parts for name, value in part.weights().items()}

    def close(self) -> None:
        dist.destroy_process_group()


def _stage(
    part: Part,
    blueprint: Blueprint,
    cut: tuple[tuple[int, int], ...],
    index: int,
    size: int,
    where: torch.device,
) -> PipelineStage:
    """Return a stage that knows the shapes of its micro-batches, so that none has to be sent."""
    shapes = blueprint.shapes()
    first, last = cut[index]
    came_in = blueprint.image if first == 0 else shapes[first - 1]
    goes_out = (blueprint.task.num_classes,) if index == len(cut) - 1 else shapes[last]
    if index > 0:
        part.spare_input(came_in)
    takes = torch.empty(size, *came_in, device="meta", requires_grad=index > 0)
    gives = torch.empty(size, *goes_out, device="meta", requires_grad=True)
    return PipelineStage(part, index, len(cut), where, input_args=takes, output_args=gives)

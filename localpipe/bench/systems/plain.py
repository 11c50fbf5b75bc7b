"""Back-propagation through the whole network: in one process, with its activations checkpointed, or data-parallel."""

from __future__ import annotations

import inspect
import math
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parallel import DistributedDataParallel

from localpipe.bench.systems.shared import (
    Batches,
    Part,
    StepTimer,
    SystemRequest,
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
from localpipe.plan.costs import BATCH, SavedBytes

WARM_UP = 4


class Plain:
    """`e2e`, `checkpoint` and `ddp`: the network as one module, the task's loss, one optimizer.

    `ddp` is torch's DistributedDataParallel: each worker takes its share of the batch's rows, batch normalisation looks at
    that share, and running statistics are each worker's own.
    """

    def __init__(self, place: Mesh, config: Resolved, asked: SystemRequest) -> None:
        blueprint = network_of(config)
        self.task = blueprint.task
        where = select_device(config.run.device, place.local_rank)
        self.entry = build_entry(config).to(where)
        self.part = Part(blueprint, 0, len(blueprint.blocks) - 1, config, where)
        optimizer = build_optimizer(config.optim, self.part.parameters())
        assert optimizer is not None, "a head has parameters"
        self.optimizer = optimizer
        self.batches = Batches(config, where, (place.rank, place.world))
        self.clock = StepTimer(where)
        self.network: nn.Module = self.part
        self._parallel = asked.system == "ddp"
        if self._parallel:
            join_world_group(place.store, place.rank, place.world, place.local, where)
            known = inspect.signature(DistributedDataParallel).parameters
            quiet: Any = {
                "forward_sync_buffers"
                if "forward_sync_buffers" in known
                else "broadcast_buffers": False
            }
            self.network = DistributedDataParallel(self.part, gradient_as_bucket_view=True, **quiet)
            self.clock.busy = self.clock.receive = self.clock.send = (
                None  # the all-reduce hides in the backward
            )
        elif asked.system == "checkpoint":
            self.part.segments = choose_segments(blueprint, config)

    def warm(self) -> None:
        for _ in range(WARM_UP):
            self.step()

    def step(self) -> None:
        begin = time.perf_counter()
        image, target, rate = self.batches.next()
        arrived = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.task.loss(self.network(self.entry(image)), target)
        loss.backward()
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        if self.clock.busy is not None and self.clock.receive is not None:
            self.clock.receive += arrived - begin
            self.clock.busy += time.perf_counter() - arrived

    def weights(self) -> dict[str, Tensor]:
        return self.part.weights()

    def close(self) -> None:
        if self._parallel:
            dist.destroy_process_group()


def choose_segments(blueprint: Blueprint, config: Resolved) -> int:
    """Return into how many segments gradient checkpointing cuts a network: those that keep the fewest bytes."""
    blocks = len(blueprint.blocks)
    lengths = range(1, math.isqrt(blocks) + 2)
    counts = sorted({math.ceil(blocks / length) for length in lengths} - {1}) or [blocks]
    return min(counts, key=lambda count: count_plain_saved_bytes(blueprint, config, count))


def count_plain_saved_bytes(blueprint: Blueprint, config: Resolved, segments: int = 1) -> int:
    """Return the peak of bytes a sample that autograd holds in a step, as `plan` counts them for a stage.

    From one step on the meta device at a batch of 64. With segments, their recomputation counts too.
    """
    part = Part(blueprint, 0, len(blueprint.blocks) - 1, config, torch.device("meta"))
    part.segments, part.reentrant = segments, True  # the other kind hides what it computes again
    image = torch.empty(BATCH, *blueprint.image, device="meta", requires_grad=segments > 1)
    target = torch.empty(BATCH, dtype=torch.int64, device="meta")
    saved = SavedBytes([*part.parameters(), *part.buffers()])
    with saved_tensors_hooks(saved.hold, lambda holder: holder.tensor):
        blueprint.task.loss(part(image), target).backward()
    return saved.peak // BATCH

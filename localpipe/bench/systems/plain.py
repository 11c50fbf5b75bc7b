"""Back-propagation through the whole network as one module.

In one process, with its activations checkpointed, or data-parallel.
"""

from __future__ import annotations

import inspect
import math
import time
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from localpipe.bench.systems.batches import Batches
from localpipe.bench.systems.part import Part
from localpipe.bench.systems.spec import System, SystemRequest, SystemSpec
from localpipe.bench.systems.step_timer import StepTimer
from localpipe.config.resolved import Resolved
from localpipe.networks.blueprint import Blueprint
from localpipe.pipeline.channels.groups import join_world_group
from localpipe.pipeline.stages.boundary import build_entry
from localpipe.pipeline.stages.optimizer import build_update, set_rate
from localpipe.pipeline.stages.stage_plan import build_blueprint
from localpipe.pipeline.workers.device import select_worker_device
from localpipe.pipeline.workers.mesh import Mesh
from localpipe.plan.costs import BATCH
from localpipe.plan.saved_bytes import SavedBytes, fuse_attention
from localpipe.tasks.task import example_target

_FLOAT_BYTES = 4


class EndToEnd(System):
    """The network as one module, with the task's loss and one optimizer.

    It trains on this worker's part of every batch: all of it in a mesh of one. request: not used.
    """

    def __init__(self, mesh: Mesh, config: Resolved, request: SystemRequest) -> None:
        blueprint = build_blueprint(config)
        self.task = blueprint.task
        self._device = select_worker_device(config, mesh.rank, mesh.local_rank)
        self.entry = build_entry(config).to(self._device)
        self.part = Part(blueprint, 0, len(blueprint.blocks) - 1, config, self._device)
        update = build_update(config.optim, self.part.parameters())
        assert update is not None, "a head has parameters"
        self.update, self.optimizer = update, update.optimizer
        self.batches = Batches(config, self._device, (mesh.rank, mesh.world))
        self.timer = StepTimer(self._device)
        self.network: nn.Module = self.part
        self._has_group = False

    def join_replicas(self, mesh: Mesh) -> None:
        """Average the gradients with the other workers, by torch's DistributedDataParallel.

        Call it once, before the first step, in every worker, because it waits for all. Each worker
        takes its part of the batch's rows. Batch normalisation sees that part, and running
        statistics are each worker's own. Afterwards the timer counts no seconds but `cpu`.
        """
        join_world_group(mesh.store, mesh.rank, mesh.world, mesh.shares_memory, self._device)
        self._has_group = True
        # Older versions call it `broadcast_buffers`.
        setting = "broadcast_buffers"
        if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters:
            setting = "forward_sync_buffers"
        settings: Any = {"gradient_as_bucket_view": True, setting: False}
        self.network = DistributedDataParallel(self.part, **settings)
        # The all-reduce hides in the backward pass.
        self.timer.count_nothing()

    def step(self) -> None:
        """Train on the next batch, or this worker's part of it."""
        start = time.perf_counter()
        image, target, rate = self.batches.next()
        arrival = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.task.loss(self.network(self.entry(image)), target)
        loss.backward()
        set_rate(self.optimizer, rate)
        self.update.run()
        self.timer.add(busy=time.perf_counter() - arrival, receive=arrival - start)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights and buffers of the whole network."""
        return self.part.weights()

    def close(self) -> None:
        """Leave the process group, if `join_replicas` made one. Call it once."""
        if self._has_group:
            dist.destroy_process_group()


def build_with_checkpoints(mesh: Mesh, config: Resolved, request: SystemRequest) -> EndToEnd:
    """Return the network with gradient checkpointing, in the segments that save most.

    request: not used. The segments are those of `choose_segments`.
    """
    system = EndToEnd(mesh, config, request)
    system.part.segments = choose_segments(build_blueprint(config), config)
    return system


def build_data_parallel(mesh: Mesh, config: Resolved, request: SystemRequest) -> EndToEnd:
    """Return one worker's replica of the network, joined to all others.

    request: not used. Every worker calls it, because it waits for all.
    """
    system = EndToEnd(mesh, config, request)
    system.join_replicas(mesh)
    return system


def choose_segments(blueprint: Blueprint, config: Resolved) -> int:
    """Return the number of segments of gradient checkpointing that saves the fewest bytes.

    It is at least 2, or 1 for a network of one block. Segments of 1 to about the square root of the
    blocks in length are counted, each on the meta device. Among equals the smallest number is
    chosen.
    """
    blocks = len(blueprint.blocks)
    lengths = range(1, math.isqrt(blocks) + 2)
    counts = {math.ceil(blocks / length) for length in lengths}
    counts.discard(1)
    if not counts:
        counts = {blocks}

    def count_bytes(count: int) -> int:
        return count_plain_saved_bytes(blueprint, config, count)

    return min(sorted(counts), key=count_bytes)


def count_plain_saved_bytes(blueprint: Blueprint, config: Resolved, segments: int = 1) -> int:
    """Return the peak of bytes a sample that autograd holds in a step of the whole network.

    It is counted as `plan` counts a stage's, from one step on the meta device at a batch of 64, and
    rounded down. Parameters and buffers are left out. With more than one of `segments`, their
    recomputation counts too.
    """
    part = Part(blueprint, 0, len(blueprint.blocks) - 1, config, torch.device("meta"))
    part.segments = segments
    part.reentrant = True  # the other kind hides what it computes again
    inputs = blueprint.example_inputs(BATCH)
    if segments > 1 and inputs.is_floating_point():
        inputs.requires_grad_()  # else the first segment would hold nothing
    target = example_target(blueprint.task, BATCH, "meta")
    saved = SavedBytes([*part.parameters(), *part.buffers()])
    with saved.hooks(), fuse_attention():
        blueprint.task.loss(part(inputs), target).backward()
    return saved.peak // BATCH


def _count_saved_bytes(config: Resolved) -> list[int]:
    return _divide_by_rank(config, count_plain_saved_bytes(build_blueprint(config), config))


def _count_checkpointed_bytes(config: Resolved) -> list[int]:
    blueprint = build_blueprint(config)
    segments = choose_segments(blueprint, config)
    return _divide_by_rank(config, count_plain_saved_bytes(blueprint, config, segments))


def _divide_by_rank(config: Resolved, nbytes: int) -> list[int]:
    """Return by rank the bytes for a sample of the whole batch, of which each has its part."""
    processes = config.pipeline.processes
    return [nbytes // processes] * processes


def _count_reduced_bytes(config: Resolved, request: SystemRequest) -> int:
    """Return the bytes of a ring all-reduce: each of n workers sends 2 (n - 1) / n gradients."""
    blueprint = build_blueprint(config)
    part = Part(blueprint, 0, len(blueprint.blocks) - 1, config, torch.device("meta"))
    trained = [parameter for parameter in part.parameters() if parameter.requires_grad]
    parameters = sum(parameter.numel() for parameter in trained)
    return 2 * (config.pipeline.processes - 1) * _FLOAT_BYTES * parameters


E2E = SystemSpec(build=EndToEnd, count_saved_bytes=_count_saved_bytes, one_process=True)
E2E_1 = replace(E2E, uses_all_threads=False)
CHECKPOINT = SystemSpec(
    build=build_with_checkpoints,
    count_saved_bytes=_count_checkpointed_bytes,
    one_process=True,
    trains_frozen=False,
)
DDP = SystemSpec(
    build=build_data_parallel,
    count_sent_bytes=_count_reduced_bytes,
    count_saved_bytes=_count_saved_bytes,
    needs_two_processes=True,
    splits_batch=True,
)

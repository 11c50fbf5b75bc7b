"""The cuts of the peers: the measured seconds of every block, and the best cut of them.

The blocks are measured while the other workers run the same block. A peer's stage costs the forward
and backward pass of its blocks for every micro-batch, and one update. It has no auxiliary network,
and the last one has the head.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import combinations

import torch

from localpipe.bench.processes import StopRequested
from localpipe.bench.systems.part import Part
from localpipe.bench.systems.spec import Cut
from localpipe.config.load import to_dict
from localpipe.config.resolved import Resolved
from localpipe.errors import RunError, UserError
from localpipe.networks.blueprint import Blueprint
from localpipe.networks.cuts import balance, cut_blocks
from localpipe.pipeline.launch.job import Job
from localpipe.pipeline.launch.launcher import Workers
from localpipe.pipeline.launch.process import prepare_process, run_worker
from localpipe.pipeline.stages.optimizer import build_update
from localpipe.pipeline.stages.stage_plan import build_blueprint
from localpipe.pipeline.workers.device import device_time_s, select_worker_device
from localpipe.pipeline.workers.mesh import Mesh
from localpipe.plan.measure import hold_weights
from localpipe.tasks.task import example_target

MICRO_BATCHES_KEY = "micro_batches"  # of the store, for the launcher's request
_MAX_TRIED_CUTS = 50_000  # where there are more, not all are tried
_BLOCK_S = 0.2  # of measuring a block at one size
_MIN_REPEATS = 3


# -- the launcher -------------------------------------------------------------------------------


def measure_blocks(config: Resolved, counts: Sequence[int]) -> dict[int, list[float]]:
    """Return the mean seconds of every block over the workers, by the number of micro-batches.

    Seconds are those of a step: all micro-batches and one update. The last block has the tail.
    counts: each at most the batch size. They are the keys, in this order. It starts processes, from
    the main thread only. Raises StopRequested for a signal, and RunError if a worker fails, after
    its cause was printed.
    """
    values = to_dict(hold_weights(config))
    job = Job(values, values, 0, 0.0, time.time())
    with Workers(config, job, __name__) as workers:
        workers.store.set(MICRO_BATCHES_KEY, json.dumps(counts))
        status = workers.follow(_do_nothing)
        if workers.stop_signal:
            raise StopRequested(workers.stop_signal)
        if status:
            raise RunError("bench: the blocks of the network could not be measured")
        seconds = {}
        for count in counts:
            by_rank = []
            for rank in range(config.pipeline.processes):
                by_rank.append(json.loads(workers.store.get(_seconds_key(count, rank))))
            seconds[count] = mean_seconds(by_rank)
    return seconds


def has_companions(blueprint: Blueprint) -> bool:
    """Return whether a block before the last one gives more tensors than one."""
    indices = range(len(blueprint.blocks) - 1)
    return any(blueprint.output(index).companions for index in indices)


def mean_seconds(by_rank: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean over workers of every block's seconds.

    by_rank: by worker, then block. Raises ValueError for different numbers of blocks. Empty for no
    worker.
    """
    return [statistics.mean(block) for block in zip(*by_rank, strict=True)]


def _do_nothing() -> None:
    pass


def _seconds_key(count: int, rank: int) -> str:
    return f"seconds/{count}/{rank}"


# -- a worker -----------------------------------------------------------------------------------


def main() -> int:
    """Measure every block, and leave a step's seconds in the store. The process ends here."""
    return run_worker(_measure)


def _measure(mesh: Mesh, job: Job) -> None:
    config = job.parse_config()
    prepare_process(config, mesh.rank)
    device = select_worker_device(config, mesh.rank, mesh.local_rank)
    blueprint = build_blueprint(config)
    for count in json.loads(mesh.store.get(MICRO_BATCHES_KEY)):
        size = config.data.batch_size // count
        seconds = []
        for block in range(len(blueprint.blocks)):
            probe = _BlockProbe(blueprint, block, config, size, device)
            mesh.barrier(f"{count}/{block}")
            seconds.append(count * probe.pass_s() + probe.update_s())
        mesh.store.set(_seconds_key(count, mesh.rank), json.dumps(seconds))
    mesh.barrier("end")


class _BlockProbe:
    """One block, the last one with the tail, on one stored micro-batch of `size` samples."""

    def __init__(
        self, blueprint: Blueprint, block: int, config: Resolved, size: int, device: torch.device
    ) -> None:
        self.part = Part(blueprint, block, block, config, device)
        self.x = blueprint.example_inputs(size, device)
        if block > 0:
            shape = blueprint.shapes()[block - 1]
            self.part.protect_input(shape)
            self.x = torch.rand(size, *shape, device=device, requires_grad=True)
        self.task = None
        if block == len(blueprint.blocks) - 1:
            self.task = blueprint.task
        self.target = example_target(blueprint.task, size, device)
        self.update = build_update(config.optim, self.part.parameters())

    def pass_s(self) -> float:
        """Return the median seconds of a forward and a backward pass."""
        self._pass()
        return _median_s(self._pass)

    def update_s(self) -> float:
        """Return the median seconds of an update; 0 where there is nothing to train."""
        if self.update is None:
            return 0.0
        return _median_s(self.update.run)

    def _pass(self) -> None:
        h = self.part(self.x)
        if self.task is None:
            torch.autograd.backward(h, torch.ones_like(h))
        else:
            torch.autograd.backward(self.task.loss(h, self.target))
        self.x.grad = None


def _median_s(call: Callable[[], object]) -> float:
    times: list[float] = []
    while len(times) < _MIN_REPEATS or sum(times) < _BLOCK_S:
        start = device_time_s()
        call()
        times.append(device_time_s() - start)
    return statistics.median(times)


# -- the cut ------------------------------------------------------------------------------------


def best_cut(costs: Sequence[float], workers: int, stages_per_worker: int) -> Cut:
    """Return the cut with the least busy busiest worker; stage s runs on worker s % workers.

    It is the (first, last) block of every stage, both included. Among equals, the largest stage is
    the smallest. All cuts are tried where they are few. Else the largest stage alone decides.
    costs: seconds of every block. Raises UserError with fewer blocks than stages.
    """
    blocks = len(costs)
    stages = workers * stages_per_worker
    if stages > blocks:
        raise UserError(f"{blocks} blocks make no {stages} stages")

    def sum_costs(first: int, last: int) -> float:
        return sum(costs[first : last + 1])

    def rate_cut(cuts: Sequence[int]) -> tuple[float, float]:
        stage_costs = []
        for first, last in cut_blocks(blocks, stages, tuple(cuts)):
            stage_costs.append(sum_costs(first, last))
        busiest = max(sum(stage_costs[worker::workers]) for worker in range(workers))
        return busiest, max(stage_costs)

    if math.comb(blocks - 1, stages - 1) > _MAX_TRIED_CUTS:
        cuts = balance(blocks, stages, lambda first, last, _: sum_costs(first, last))
    else:
        cuts = min(combinations(range(blocks - 1), stages - 1), key=rate_cut)
    return tuple(cut_blocks(blocks, stages, cuts))

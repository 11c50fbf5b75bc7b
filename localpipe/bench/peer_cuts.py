"""Where the peers cut: measured seconds of every block, while the other workers run the same block, and the best cut.

A peer's stage costs the forward and backward of its blocks for every micro-batch, and one update; it has no auxiliary
network, and the last one has the head.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from itertools import combinations

import torch

from localpipe.bench.systems.shared import Cut, Part, network_of
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.networks.blueprint import Blueprint
from localpipe.networks.cuts import balance, cut_blocks
from localpipe.pipeline.launch.job import Job
from localpipe.pipeline.launch.process import prepare_process, run_worker
from localpipe.pipeline.stages.optimizer import build_optimizer
from localpipe.pipeline.workers.device import device_time_s, select_device
from localpipe.pipeline.workers.mesh import Mesh

MICRO_BATCHES_KEY = "micro_batches"  # the store's key for what the launcher asks
_MOST_CUTS = 50_000  # so many are all tried
_BLOCK_S = 0.2  # of measuring a block at one size
_FEWEST = 3


def main() -> int:
    """Measure every block, and leave the seconds of a step in the store."""
    return run_worker(_measure)


def _measure(place: Mesh, decided: Job) -> None:
    config = decided.parsed()
    prepare_process(config)
    where = select_device(config.run.device, place.local_rank)
    blueprint = network_of(config)
    inputs = [blueprint.image, *blueprint.shapes()]
    for count in json.loads(place.store.get(MICRO_BATCHES_KEY)):
        seconds = []
        for block in range(len(blueprint.blocks)):
            probe = _Probe(
                blueprint, block, inputs[block], config, config.data.batch_size // count, where
            )
            place.barrier(f"{count}/{block}")
            seconds.append(count * probe.pass_s() + probe.update_s())
        place.store.set(f"seconds/{count}/{place.rank}", json.dumps(seconds))
    place.barrier("end")


class _Probe:
    """One block, the tail with the last, on one micro-batch that it already holds."""

    def __init__(
        self,
        blueprint: Blueprint,
        block: int,
        shape: tuple[int, ...],
        config: Resolved,
        size: int,
        where: torch.device,
    ) -> None:
        self.part = Part(blueprint, block, block, config, where)
        if block > 0:
            self.part.spare_input(shape)
        self.x = torch.rand(size, *shape, device=where, requires_grad=block > 0)
        self.task = blueprint.task if block == len(blueprint.blocks) - 1 else None
        self.target = torch.zeros(size, dtype=torch.int64, device=where)
        self.optimizer = build_optimizer(config.optim, self.part.parameters())

    def pass_s(self) -> float:
        """Return the median seconds of a forward and a backward."""
        self._pass()
        return _median_s(self._pass)

    def update_s(self) -> float:
        """Return the median seconds of an update."""
        return 0.0 if self.optimizer is None else _median_s(self.optimizer.step)

    def _pass(self) -> None:
        h = self.part(self.x)
        loss = h if self.task is None else self.task.loss(h, self.target)
        torch.autograd.backward(loss, None if self.task is not None else torch.ones_like(h))
        self.x.grad = None


def _median_s(call: object) -> float:
    assert callable(call)
    times: list[float] = []
    while len(times) < _FEWEST or sum(times) < _BLOCK_S:
        begin = device_time_s()
        call()
        times.append(device_time_s() - begin)
    return statistics.median(times)


def mean_seconds(told: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean over workers of every block's seconds."""
    return [statistics.mean(block) for block in zip(*told, strict=True)]


def best_cut(costs: Sequence[float], workers: int, each: int) -> Cut:
    """Return the cut into workers * each stages, stage s on worker s % workers, with the least busy busiest worker.

    Among equals, the one with the smallest largest stage. All cuts are tried where they are few; else the smallest largest
    stage alone decides. Raises UserError with fewer blocks than stages.
    """
    blocks, stages = len(costs), workers * each
    if stages > blocks:
        raise UserError(f"{blocks} blocks make no {stages} stages")
    if math.comb(blocks - 1, stages - 1) > _MOST_CUTS:
        return tuple(
            cut_blocks(
                blocks,
                stages,
                balance(blocks, stages, lambda first, last, _: sum(costs[first : last + 1])),
            )
        )

    def price(ends: Sequence[int]) -> tuple[float, float]:
        sums = [
            sum(costs[first : last + 1]) for first, last in cut_blocks(blocks, stages, tuple(ends))
        ]
        return max(sum(sums[worker::workers]) for worker in range(workers)), max(sums)

    return tuple(
        cut_blocks(blocks, stages, min(combinations(range(blocks - 1), stages - 1), key=price))
    )

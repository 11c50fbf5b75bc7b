"""Where to cut a network: equal, layerwise, explicit, or the best cut for a given cost.

`plan.balanced_cuts` holds the costs of `cuts: memory` and `cuts: time`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

from localpipe.errors import UserError

Cost = Callable[[int, int, int], float]
Cut = tuple[int, ...]  # the last block of every stage but the last


def split_evenly(blocks: int, stages: int) -> list[tuple[int, int]]:
    """Return the (first, last) block of every stage. Sizes differ by at most one block.

    Up to three stages, the longer stages come first. With more stages, they come last. This rule
    gives all ten published tables of ResNet-32 and ResNet-110 (InfoPro and ContSup, released code).
    Both bounds are 0-based and inclusive. `check_stages` must hold: it is not checked here.
    """
    size, longer_stages = divmod(blocks, stages)
    sizes = [size + 1] * longer_stages + [size] * (stages - longer_stages)
    if stages > 3:
        sizes.reverse()
    return _sizes_to_bounds(sizes)


def split_layerwise(blocks: int, stages: int) -> list[tuple[int, int]]:
    """Return the (first, last) block of every stage: one block each, the rest in the last stage.

    It is AugLocal's published cut of n blocks with depth d, where stages = n - d. Both bounds are
    0-based and inclusive. `check_stages` must hold: it is not checked here.
    """
    return _sizes_to_bounds([1] * (stages - 1) + [blocks - stages + 1])


def cut_blocks(blocks: int, stages: int, cuts: str | tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the (first, last) block of every stage, both 0-based and inclusive.

    cuts: `equal`, `layerwise`, or the last block of every stage but the last, rising. With such a
    list, its length decides the number of stages. Raises UserError if there are more stages than
    blocks, or the last cut is not before the last block. Raises AssertionError for another text, as
    `memory`.
    """
    if isinstance(cuts, tuple):
        return _explicit_bounds(blocks, cuts)
    check_stages(blocks, stages)
    assert cuts in ("equal", "layerwise"), "measured cuts are made explicit before a plan is"
    if cuts == "equal":
        return split_evenly(blocks, stages)
    return split_layerwise(blocks, stages)


def _explicit_bounds(blocks: int, cuts: tuple[int, ...]) -> list[tuple[int, int]]:
    if cuts and cuts[-1] >= blocks - 1:
        advice = f"end every stage but the last at block {blocks - 2} or before"
        if blocks == 1:
            advice = "leave pipeline.cuts out, and set pipeline.stages=1"
        raise UserError(
            f"partition: pipeline.cuts ends a stage after block {cuts[-1]}, "
            f"but the last of {blocks} blocks is {blocks - 1}; {advice}"
        )
    first_blocks = [0, *(cut + 1 for cut in cuts)]
    last_blocks = [*cuts, blocks - 1]
    return list(zip(first_blocks, last_blocks, strict=True))


def balance(blocks: int, stages: int, cost: Cost) -> tuple[int, ...]:
    """Return the cut whose largest stage costs least.

    It is the last block, 0-based, of every stage but the last, and () for one stage. cost(first,
    last, stage) is any figure of one candidate stage, whose blocks are first..last. It is called at
    most once for each. The search is exact. Among the best cuts, the one with the least sum of
    squares is chosen, then the earliest. Raises UserError if there are more stages than blocks.
    """
    check_stages(blocks, stages)
    cached_cost = cache(cost)
    largest, _ = _find_cheapest_cut(blocks, stages, cached_cost, max)

    def squared_cost(first: int, last: int, stage: int) -> float:
        stage_cost = cached_cost(first, last, stage)
        if stage_cost <= largest:
            return stage_cost * stage_cost
        return math.inf

    _, cut = _find_cheapest_cut(blocks, stages, squared_cost, lambda a, b: a + b)
    return cut


def balance_workers(
    blocks: int, stages: Sequence[int], split: Callable[[int, int, int], tuple[float, Cut]]
) -> Cut:
    """Return the cut whose costliest worker costs least, as `balance` does.

    stages: how many each worker hosts, worker after worker. split(first, last, worker) gives the
    cost of a worker that hosts blocks first..last, at least as many as its stages, and the last
    block of each of its stages but its last. Raises UserError if there are more stages than blocks.
    """
    check_stages(blocks, sum(stages))
    split_once = cache(split)

    def cost(first: int, last: int, worker: int) -> float:
        if last - first + 1 < stages[worker]:
            return math.inf
        return split_once(first, last, worker)[0]

    # Between the workers' ends stand the cuts inside each.
    ends = (*balance(blocks, len(stages), cost), blocks - 1)
    cut: list[int] = []
    first = 0
    for worker, last in enumerate(ends):
        cut += [*split_once(first, last, worker)[1], last]
        first = last + 1
    return tuple(cut[:-1])


def balance_part(
    first: int, last: int, stages: range, cost: Cost, join: Callable[[float, float], float]
) -> tuple[float, Cut]:
    """Return the least joined cost of blocks first..last as consecutive stages, and their cut.

    cost: as of `balance`. join: of two costs to one, as their sum or the larger. The blocks are at
    least as many as the stages, else KeyError.
    """

    def shifted_cost(start: int, end: int, stage: int) -> float:
        return cost(first + start, first + end, stages[stage])

    joined, cut = _find_cheapest_cut(last - first + 1, len(stages), shifted_cost, join)
    return joined, tuple(first + end for end in cut)


def _find_cheapest_cut(
    blocks: int, stages: int, cost: Cost, join: Callable[[float, float], float]
) -> tuple[float, tuple[int, ...]]:
    """Return the least joined cost of a cut, and the cut, by dynamic programming.

    best[last] is the result for blocks 0..last and the stages so far.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {}
    for last in _possible_last_blocks(0, blocks, stages):
        best[last] = (cost(0, last, 0), ())

    # Each stage extends every result of the stages before it. Equal costs fall to the earlier cut.
    for stage in range(1, stages):
        extended = {}
        for last in _possible_last_blocks(stage, blocks, stages):
            candidates = []
            for previous_last, (previous_cost, previous_cut) in best.items():
                if previous_last < last:
                    stage_cost = cost(previous_last + 1, last, stage)
                    joined_cost = join(previous_cost, stage_cost)
                    candidates.append((joined_cost, (*previous_cut, previous_last)))
            extended[last] = min(candidates)
        best = extended
    return best[blocks - 1]


def _possible_last_blocks(stage: int, blocks: int, stages: int) -> range:
    """Return the blocks that may end a stage: every other stage has at least one block."""
    if stage == stages - 1:
        return range(blocks - 1, blocks)
    return range(stage, blocks - stages + stage + 1)


def check_stages(blocks: int, stages: int) -> None:
    """Raise UserError if there are more stages than blocks. As many are allowed."""
    if stages > blocks:
        raise UserError(
            f"partition: cannot cut {blocks} blocks into {stages} stages; "
            f"set pipeline.stages to at most {blocks}"
        )


def _sizes_to_bounds(sizes: list[int]) -> list[tuple[int, int]]:
    bounds = []
    first = 0
    for size in sizes:
        bounds.append((first, first + size - 1))
        first += size
    return bounds

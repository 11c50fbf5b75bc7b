"""Where to cut a network: equal, layerwise, explicit, or the best cut for a given cost.

`plan.balanced_cuts` holds the costs of `cuts: memory` and `cuts: time`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

from localpipe.errors import UserError

Cost = Callable[[int, int, int], float]


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

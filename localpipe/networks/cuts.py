"""Where to cut a network: equal, layerwise, explicit, or balanced by a cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

from localpipe.errors import UserError


def split_evenly(blocks: int, stages: int) -> list[tuple[int, int]]:
    """Return (first, last) of each stage, sizes differing by at most one.

    The longer stages come first for up to three stages and last for more: the rule behind all ten published tables of
    ResNet-32 and ResNet-110 (InfoPro and ContSup, released code).
    """
    size, longer = divmod(blocks, stages)
    sizes = [size + 1] * longer + [size] * (stages - longer)
    return _bounds(sizes if stages <= 3 else sizes[::-1])


def split_layerwise(blocks: int, stages: int) -> list[tuple[int, int]]:
    """Return one block a stage, the last stage taking the rest (AugLocal's published cut with depth d: stages = n - d)."""
    return _bounds([1] * (stages - 1) + [blocks - stages + 1])


def cut_blocks(blocks: int, stages: int, cuts: str | tuple[int, ...]) -> list[tuple[int, int]]:
    """Return (first, last) block of every stage for `equal`, `layerwise` or the last block of all stages but the last."""
    check_stages(blocks, stages)
    if isinstance(cuts, tuple):
        if cuts and cuts[-1] >= blocks - 1:
            raise UserError(
                f"partition: pipeline.cuts ends a stage after block {cuts[-1]}, but the last of {blocks} blocks is "
                f"{blocks - 1}; end every stage but the last at block {blocks - 2} or before"
            )
        ends = [*cuts, blocks - 1]
        return list(zip([0, *(end + 1 for end in cuts)], ends, strict=True))
    assert cuts in ("equal", "layerwise"), "measured cuts are made explicit before a plan is"
    return split_evenly(blocks, stages) if cuts == "equal" else split_layerwise(blocks, stages)


def balance(blocks: int, stages: int, cost: Callable[[int, int, int], float]) -> tuple[int, ...]:
    """Return the cut whose largest stage costs least, as the last block of every stage but the last.

    cost(first, last, stage) is any figure of one candidate stage. Dynamic programming over (stage, last block), exact; among
    the best cuts the one with the least sum of squares.
    """
    check_stages(blocks, stages)
    price = cache(cost)
    largest, _ = _cheapest(blocks, stages, price, max)

    def squared(first: int, last: int, stage: int) -> float:
        found = price(first, last, stage)
        return found * found if found <= largest else math.inf

    return _cheapest(blocks, stages, squared, lambda before, own: before + own)[1]


def _cheapest(
    blocks: int,
    stages: int,
    cost: Callable[[int, int, int], float],
    join: Callable[[float, float], float],
) -> tuple[float, tuple[int, ...]]:
    """Return the least joined cost of a cut, and the cut. best[last]: of stages 0..stage over blocks 0..last."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {
        last: (cost(0, last, 0), ())
        for last in range(blocks - stages + 1)
        if stages > 1 or last == blocks - 1
    }
    for stage in range(1, stages):
        ends = range(stage, blocks - stages + stage + 1) if stage < stages - 1 else [blocks - 1]
        best = {
            last: min(
                (join(before, cost(end + 1, last, stage)), (*cut, end))
                for end, (before, cut) in best.items()
                if end < last
            )
            for last in ends
        }
    return best[blocks - 1]


def check_stages(blocks: int, stages: int) -> None:
    """Raise UserError when there are more stages than blocks."""
    if stages > blocks:
        raise UserError(
            f"partition: cannot cut {blocks} blocks into {stages} stages; set pipeline.stages to at most {blocks}"
        )


def _bounds(sizes: list[int]) -> list[tuple[int, int]]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [(start, start + size - 1) for start, size in zip(starts, sizes, strict=True)]

"""Where to cut, and which tensors cross. Pure functions: a plan is frozen data, printed and tested without a process."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from localpipe.blueprint import Blueprint
from localpipe.errors import UserError
from localpipe.message import Field, Schema

IMAGE = "image"


@dataclass(frozen=True)
class StagePlan:
    """One stage: blocks first..last of the network (the tail too, for the last stage), and the schemas of its edges."""

    stage: int
    stages: int
    first: int
    last: int
    blocks: tuple[str, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    receives: Schema
    sends: Schema | None

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    @property
    def input(self) -> str:
        """The name of the activation that comes in: the image, or the predecessor's output."""
        return IMAGE if self.is_first else f"h.{self.stage - 1}"


def split(blocks: int, stages: int) -> list[tuple[int, int]]:
    """Return (first, last) of each stage, sizes differing by at most one.

    The longer stages come first for up to three stages and last for more: the rule behind all ten published tables of
    ResNet-32 and ResNet-110 (InfoPro and ContSup, released code).
    """
    size, longer = divmod(blocks, stages)
    sizes = [size + 1] * longer + [size] * (stages - longer)
    return _bounds(sizes if stages <= 3 else sizes[::-1])


def layerwise(blocks: int, stages: int) -> list[tuple[int, int]]:
    """Return one block a stage, the last stage taking the rest (AugLocal's published cut with depth d: stages = n - d)."""
    return _bounds([1] * (stages - 1) + [blocks - stages + 1])


def cut(blocks: int, stages: int, cuts: str | tuple[int, ...]) -> list[tuple[int, int]]:
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
    return split(blocks, stages) if cuts == "equal" else layerwise(blocks, stages)


def balanced(blocks: int, stages: int, cost: Callable[[int, int, int], float]) -> tuple[int, ...]:
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


def candidate(
    blueprint: Blueprint,
    shapes: list[tuple[int, ...]],
    bounds: tuple[int, int],
    stage: int,
    stages: int,
    batch: int,
    reads: frozenset[str],
    gradients: bool = False,
) -> StagePlan:
    """Return the plan of one stage, blocks bounds[0]..bounds[1], wherever the others are cut.

    `shapes` are blueprint.shapes(). What the stage reads of earlier boundaries is taken to have its own input's shape.
    """
    first, last = bounds
    came_in = blueprint.image if stage == 0 else shapes[first - 1]
    target, image = blueprint.task.target, Field(IMAGE, blueprint.image, "uint8")
    fields = [image if stage == 0 else Field(f"h.{stage - 1}", came_in, "float32"), target]
    fields += [
        image if name == IMAGE else Field(name, came_in, "float32") for name in sorted(reads)
    ]
    if gradients and stage:
        fields.append(Field(f"grad.{stage - 1}", came_in, "float32"))
    fields = list(dict.fromkeys(fields))
    names = tuple(block.name for block in blueprint.blocks[first : last + 1])
    sends = (
        Schema((Field(f"h.{stage}", shapes[last], "float32"), target), batch)
        if stage < stages - 1
        else None
    )
    received = Schema(tuple(fields), batch)
    return StagePlan(stage, stages, first, last, names, came_in, shapes[last], received, sends)


def plan(
    blueprint: Blueprint,
    stages: int,
    cuts: str | tuple[int, ...],
    batch: int,
    reads: Callable[[int], frozenset[str]] = lambda stage: frozenset(),
    gradients: bool = False,
    wire: str = "float32",
) -> tuple[StagePlan, ...]:
    """Return the plan of every stage. Which tensors cross a boundary follows from the configuration alone.

    `reads` says what a stage looks at beside its predecessor's output and the target: `image`, or `ctx.j`, the merged
    activation at boundary j. A stage passes on only what a later one still reads. With `gradients` every activation has its
    sender's gradient beside it. `wire` is the dtype in which activations, contexts and gradients travel; `batch` the most
    samples of a message.
    """
    shapes = blueprint.shapes()
    bounds = cut(len(blueprint.blocks), stages, cuts)
    target = blueprint.task.target
    received = Schema((Field(IMAGE, blueprint.image, "uint8"), target), batch)
    plans = []
    for stage, (first, last) in enumerate(bounds):
        sends = None
        if stage < stages - 1:
            later = frozenset(name for after in range(stage + 1, stages) for name in reads(after))
            fields = [Field(f"h.{stage}", shapes[last], wire), target]
            if IMAGE in later:
                fields.append(Field(IMAGE, blueprint.image, "uint8"))
            merged = [j for j in range(stage) if context(j) in later]
            fields += [Field(context(j), shapes[bounds[j][1]], wire) for j in merged]
            if gradients:
                fields.append(Field(f"grad.{stage}", shapes[last], wire))
            sends = Schema(tuple(fields), batch)
        names = tuple(block.name for block in blueprint.blocks[first : last + 1])
        came_in = blueprint.image if stage == 0 else shapes[first - 1]
        plans.append(
            StagePlan(stage, stages, first, last, names, came_in, shapes[last], received, sends)
        )
        received = sends if sends is not None else received
    return tuple(plans)


def context(boundary: int) -> str:
    """Return the field of the merged activation at a boundary."""
    return f"ctx.{boundary}"


def _bounds(sizes: list[int]) -> list[tuple[int, int]]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [(start, start + size - 1) for start, size in zip(starts, sizes, strict=True)]

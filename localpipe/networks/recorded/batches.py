"""One tape for all batch sizes: every int that differs between recordings grows with the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from localpipe.networks.recorded.tape import (
    BatchSize,
    RecordingError,
    Step,
    Tape,
    TensorFacts,
    list_leaves,
    map_tree,
)


def merge_tapes(tapes: Sequence[Tape], batches: Sequence[int]) -> Tape:
    """Return one tape whose sizes are linear in the batch.

    tapes: one for each batch. The first two give the sizes, the others check them. Raises
    RecordingError where other steps run for another batch, or a size is not linear in it.
    """
    first = _merge_two(tapes[0], tapes[1], (batches[0], batches[1]))
    for tape, batch in zip(tapes[2:], batches[2:], strict=True):
        other = _merge_two(tapes[0], tape, (batches[0], batch))
        for one, two in zip(first.steps, other.steps, strict=True):
            if _list_sizes(one) != _list_sizes(two):
                raise RecordingError(
                    f"{_describe(one)} uses a size that is not linear in the batch; compute it "
                    "from the size of a sample alone, or offer blocks()"
                )
    return first


def _merge_two(first: Tape, second: Tape, batches: tuple[int, int]) -> Tape:
    """Return the tape of two recordings, with a BatchSize for each int that differs."""
    _check_steps(first, second, batches)
    steps = []
    for one, two in zip(first.steps, second.steps, strict=True):
        args, kwargs = _merge_arguments(one, two, batches)
        steps.append(replace(one, args=args, kwargs=kwargs))
    tensors = {}
    for number, facts in first.tensors.items():
        tensors[number] = _merge_facts(facts, second.tensors[number], batches)
    return replace(first, steps=steps, tensors=tensors)


def _check_steps(first: Tape, second: Tape, batches: tuple[int, int]) -> None:
    """Raise RecordingError for the first step that only one of two batches has."""
    for one, two in zip(first.steps, second.steps, strict=False):
        has_same_tensors = (one.outputs, one.writes, one.reads) == (
            two.outputs,
            two.writes,
            two.reads,
        )
        if one.name != two.name or not has_same_tensors:
            raise RecordingError(_describe_difference(one, batches))
    if len(first.steps) != len(second.steps):
        longer = max(first.steps, second.steps, key=len)
        step = longer[min(len(first.steps), len(second.steps))]
        raise RecordingError(_describe_difference(step, batches))


def _describe_difference(step: Step, batches: tuple[int, int]) -> str:
    return (
        f"{_describe(step)} does other things for {batches[0]} than for {batches[1]} samples, as a "
        "loop over the batch does; compute all samples at once, or offer blocks()"
    )


def _describe(step: Step) -> str:
    """Return a step as the subject of a sentence."""
    if step.module is not None:
        return step.module
    function = step.name.rpartition(":")[2]
    return f"{step.parent or 'the network'} ({function})"


def _merge_arguments(one: Step, two: Step, batches: tuple[int, int]) -> Any:
    others = iter(list_leaves((two.args, two.kwargs)))

    def merge(leaf: Any) -> Any:
        other = next(others)
        if isinstance(leaf, Tensor) or not isinstance(leaf, int | float | str) or leaf == other:
            return leaf
        if type(leaf) is int and type(other) is int:
            return _merge_sizes(leaf, other, batches, one)
        raise RecordingError(
            f"{_describe(one)} takes {leaf} for {batches[0]} samples and {other} for {batches[1]}; "
            "compute it from the size of a sample alone, or offer blocks()"
        )

    return map_tree(merge, (one.args, one.kwargs))


def _merge_facts(one: TensorFacts, two: TensorFacts, batches: tuple[int, int]) -> TensorFacts:
    shape = []
    for size, other in zip(one.shape, two.shape, strict=True):
        shape.append(size if size == other else _merge_sizes(size, other, batches, None))
    order = one.order if one.order == two.order else None
    return replace(one, shape=tuple(shape), order=order)


def _merge_sizes(one: int, two: int, batches: tuple[int, int], step: Step | None) -> BatchSize:
    """Return the line through two sizes. Raises RecordingError if it is not of whole numbers."""
    scale, rest = divmod(two - one, batches[1] - batches[0])
    if rest:
        where = _describe(step) if step is not None else "its forward"
        raise RecordingError(
            f"{where} uses a size that is {one} for {batches[0]} samples and {two} for "
            f"{batches[1]}, which is not linear in the batch; compute it from the size of a "
            "sample alone, or offer blocks()"
        )
    return BatchSize(scale, one - scale * batches[0])


def _list_sizes(step: Step) -> list[BatchSize]:
    leaves = list_leaves((step.args, step.kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, BatchSize)]

"""Where a network can be cut, that is where few tensors are alive, and which cuts are chosen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from localpipe.networks.recorded.program import Program
from localpipe.networks.recorded.tape import BATCH, Step

# Functions that apply a weight of two dimensions or more.
_WEIGHTED_FUNCTIONS = frozenset(
    ("conv1d", "conv2d", "conv3d", "linear", "matmul", "__matmul__", "einsum", "bmm")
)


@dataclass(frozen=True)
class Cut:
    """A place after the step `after`, and the numbers of the tensors that cross it, the main first.

    key: which calls made them. It is the same in training and evaluation.
    """

    after: int
    crossing: tuple[int, ...]
    key: tuple[str, ...]


@dataclass(frozen=True)
class _Span:
    """The first and the last step that use a parameter or a written buffer."""

    first: int
    last: int


def find_cuts(program: Program, crossing: int, ignores_ties: bool = False) -> list[Cut]:
    """Return all places where at most `crossing` tensors are alive and no weight is on both sides.

    ignores_ties: weights on both sides do not matter. A tensor that crosses has the batch as its
    first dimension, and a memory of its own. At least one has floating point.
    """
    last_read = _find_last_reads(program)
    keys = _name_tensors(program)
    spans = [] if ignores_ties else list(_find_spans(program).values())
    blocked = _mark_spans(spans, len(program.steps))

    cuts = []
    alive = {number for number in range(program.inputs) if last_read.get(number, -1) >= 0}
    for index, step in enumerate(program.steps[:-1]):
        for number in step.makes:
            if number in program.bound and last_read.get(number, -1) > index:
                alive.add(number)
        alive = {number for number in alive if last_read[number] > index}
        if not alive or len(alive) > crossing or blocked[index]:
            continue
        if _can_cross(program, alive):
            numbers = _put_main_first(program, alive)
            cuts.append(Cut(index, numbers, tuple(keys[number] for number in numbers)))
    return cuts


def cut_at_end(program: Program) -> Cut:
    """Return the place after the last step, where the outputs alone cross."""
    names = _name_tensors(program)
    keys = tuple(names[number] for number in program.outputs)
    return Cut(len(program.steps) - 1, program.outputs, keys)


def list_weights_before(program: Program, cuts: Sequence[Cut]) -> list[frozenset[str]]:
    """Return for every cut the first names of the weights that the steps before it use."""
    weights: set[str] = set()
    before = []
    begin = 0
    for cut in cuts:
        for names in program.owned[begin : cut.after + 1]:
            weights |= names
        begin = cut.after + 1
        before.append(frozenset(weights))
    return before


def find_split_weights(program: Program, crossing: int) -> set[str]:
    """Return the first names of the weights that are on both sides of a place to cut."""
    places = [cut.after for cut in find_cuts(program, crossing, ignores_ties=True)]
    split = set()
    for name, span in _find_spans(program).items():
        if any(span.first <= place < span.last for place in places):
            split.add(name)
    return split


def _find_last_reads(program: Program) -> dict[int, int]:
    """Return the last step that reads each tensor. The outputs are read after all steps."""
    last_read = {}
    for index, step in enumerate(program.steps):
        for number in step.reads:
            last_read[number] = index
    for number in program.outputs:
        last_read[number] = len(program.steps)
    return last_read


def _name_tensors(program: Program) -> dict[int, str]:
    """Return for every tensor the call that made it, as `layer1.0#1/0`."""
    names = {number: f"input/{number}" for number in range(program.inputs)}
    occurrences: Counter[str] = Counter()
    for step in program.steps:
        occurrences[step.name] += 1
        for place, number in enumerate(step.makes):
            names[number] = f"{step.name}#{occurrences[step.name]}/{place}"
    return names


def _find_spans(program: Program) -> dict[str, _Span]:
    """Return the span of every weight that more than one step uses."""
    spans: dict[str, _Span] = {}
    for index, names in enumerate(program.owned):
        for name in names:
            first = spans[name].first if name in spans else index
            spans[name] = _Span(first, index)
    return {name: span for name, span in spans.items() if span.first != span.last}


def _mark_spans(spans: Sequence[_Span], steps: int) -> list[bool]:
    """Return for every step whether some weight is used both before and after its end."""
    changes = [0] * (steps + 1)
    for span in spans:
        changes[span.first] += 1
        changes[span.last] -= 1
    marks = []
    depth = 0
    for change in changes:
        depth += change
        marks.append(depth > 0)
    return marks


def _can_cross(program: Program, numbers: set[int]) -> bool:
    facts = [program.tensors[number] for number in numbers]
    if not any(fact.dtype.is_floating_point for fact in facts):
        return False  # still the input: tokens, indices
    if len({fact.storage for fact in facts}) < len(facts):
        return False  # a write through one of them would be seen through the other
    return all(_is_batch_first(fact.shape) and fact.order is not None for fact in facts)


def _is_batch_first(shape: tuple[object, ...]) -> bool:
    """Whether the first dimension, and no other one, is the batch."""
    return shape[:1] == (BATCH,) and not any(type(size) is not int for size in shape[1:])


def _put_main_first(program: Program, numbers: set[int]) -> tuple[int, ...]:
    """Return tensors in the order in which they were made, but the main one first.

    The main tensor is the one of floating point that was made last.
    """
    ordered = sorted(numbers)
    main = max(n for n in ordered if program.tensors[n].dtype.is_floating_point)
    return (main, *(number for number in ordered if number != main))


# -- the cuts between blocks ---------------------------------------------------------------------


def choose_cuts(program: Program, network: nn.Module, cuts: Sequence[Cut]) -> list[Cut]:
    """Return the cuts between blocks.

    Each block has a weight, and layers without one stay with the layer before them. Everything
    after the last block that has no places any more, as a pooled vector, is the network's head. So
    is what stands between them and belongs to another module than the last block.
    """
    by_end = {cut.after: cut for cut in cuts}
    weighted = [
        index for index, step in enumerate(program.steps) if _applies_weight(step, program, network)
    ]
    # Between two steps with weights: the cuts after which nothing of the first one's parent comes.
    gaps = []
    for here, there in zip(weighted, weighted[1:], strict=False):
        options = [by_end[index] for index in range(here, there) if index in by_end]
        if not options:
            continue
        fewest = min(len(cut.crossing) for cut in options)
        options = [cut for cut in options if len(cut.crossing) == fewest]
        inside = [cut for cut in options if _is_inside(program, here, cut.after)]
        gaps.append(inside or options[:1])

    if all(_is_flat(program, cut) for gap in gaps for cut in gap):
        return [gap[-1] for gap in gaps]
    # The head begins where the places are lost, together with a pooling in front of them.
    while len(gaps) > 1 and _is_flat(program, gaps[-1][0]):
        gaps.pop()
    first = gaps[-1][0]
    kept = []
    for cut in gaps[-1]:
        if not _is_flat(program, cut) and _count(program, cut) >= _count(program, first):
            kept.append(cut)
    gaps[-1] = kept or gaps[-1][:1]
    return [gap[-1] for gap in gaps]


def _applies_weight(step: Step, program: Program, network: nn.Module) -> bool:
    """Whether a step applies a weight of two dimensions or more to what depends on the input."""
    if program.dependent.isdisjoint(step.reads):
        return False
    if step.module is not None:
        module = network.get_submodule(step.module)
        return any(parameter.dim() > 1 for parameter in module.parameters())
    if getattr(step.function, "__name__", "") not in _WEIGHTED_FUNCTIONS:
        return False
    parameters = dict(network.named_parameters(remove_duplicate=False))
    return any(name in parameters and parameters[name].dim() > 1 for name in step.state)


def _is_inside(program: Program, here: int, after: int) -> bool:
    """Whether all steps up to `after` belong to the parent of the step `here`."""
    parent = program.steps[here].parent
    return all(
        is_within(parent, program.steps[index].parent) for index in range(here + 1, after + 1)
    )


def is_within(outer: str, inner: str) -> bool:
    """Whether a module is another one, or holds it, by their names."""
    return not outer or inner == outer or inner.startswith(f"{outer}.")


def _is_flat(program: Program, cut: Cut) -> bool:
    """Whether only features are left of every sample."""
    return all(len(program.tensors[number].shape) <= 2 for number in cut.crossing)


def _count(program: Program, cut: Cut) -> int:
    """Return how many numbers of a sample cross a cut."""
    return sum(math.prod(program.tensors[number].shape[1:]) for number in cut.crossing)


# -- names ---------------------------------------------------------------------------------------


def name_blocks(program: Program, cuts: Sequence[Cut], network: nn.Module) -> list[str]:
    """Return a readable name for every piece, the head last.

    It is the path that the modules of a piece share with no other piece, else the piece's first
    module with a weight.
    """
    pieces = []
    begin = 0
    for end in [*(cut.after + 1 for cut in cuts), len(program.steps)]:
        pieces.append([step for step in program.steps[begin:end] if step.module is not None])
        begin = end

    names: list[str] = []
    for index, steps in enumerate(pieces):
        others = [step for other in (*pieces[:index], *pieces[index + 1 :]) for step in other]
        name = _find_common_path(steps)
        if not name or any(is_within(name, step.module or "") for step in others):
            weighted = [step for step in steps if _applies_weight(step, program, network)]
            first = next(iter((*weighted, *steps)), None)
            name = (first.module if first is not None else None) or "functions"
        names.append(_make_unique(name, names))
    return names


def _find_common_path(steps: Sequence[Step]) -> str:
    """Return the longest path that all modules of some steps begin with."""
    paths = [(step.module or "").split(".") for step in steps]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _make_unique(name: str, names: Sequence[str]) -> str:
    number = 2
    unique = name
    while unique in names:
        unique = f"{name}_{number}"
        number += 1
    return unique

"""A program split at its cuts: what each piece does, and which names it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from localpipe.networks.recorded.cut_points import Cut
from localpipe.networks.recorded.piece import Instruction, PieceProgram
from localpipe.networks.recorded.program import Program, list_state_names, list_tensor_names
from localpipe.networks.recorded.tape import Step


def split_program(program: Program, cuts: Sequence[Cut]) -> list[PieceProgram]:
    """Return the program of every piece between two cuts, the head's last."""
    ends: list[Cut | None] = [None, *cuts, None]
    pieces = []
    for before, after in zip(ends, ends[1:], strict=False):
        pieces.append(_cut_out(program, before, after))
    return pieces


def _cut_out(program: Program, before: Cut | None, after: Cut | None) -> PieceProgram:
    """Return what the piece between two cuts does.

    What depends on sizes alone, as a mask, is made in every piece that reads it.
    """
    begin = 0 if before is None else before.after + 1
    end = len(program.steps) if after is None else after.after + 1
    inputs = tuple(range(program.inputs)) if before is None else before.crossing
    outputs = program.outputs if after is None else after.crossing

    # From the last step to the first: what the outputs need, and what has an effect of its own.
    needed = set(outputs)
    made_before = set(inputs)
    indices = []
    for index in range(end - 1, -1, -1):
        step = program.steps[index]
        is_inside = index >= begin
        is_bound = not program.bound.isdisjoint(step.makes) or step.is_stateful
        is_needed = not needed.isdisjoint(set(step.makes) - made_before)
        if (is_inside and is_bound) or (is_needed and (is_inside or not is_bound)):
            indices.append(index)
            needed.update(step.reads)
    steps = [program.steps[index] for index in reversed(indices)]
    return PieceProgram(
        _make_instructions(steps, outputs), inputs, outputs, _find_copied(program, steps, inputs)
    )


def _make_instructions(steps: Sequence[Step], outputs: Sequence[int]) -> tuple[Instruction, ...]:
    """Return the instructions of some steps, each with the tensors that may be freed after it."""
    last_uses: dict[int, int] = {}
    for place, step in enumerate(steps):
        for number in (*step.reads, *step.makes):
            last_uses[number] = place
    freed: list[list[int]] = [[] for _ in steps]
    for number, place in last_uses.items():
        if number not in outputs:
            freed[place].append(number)
    return tuple(
        Instruction(step, tuple(numbers)) for step, numbers in zip(steps, freed, strict=True)
    )


def _find_copied(program: Program, steps: Sequence[Step], inputs: Sequence[int]) -> tuple[int, ...]:
    """Return the companions whose memory one of the steps writes into."""
    written = set()
    for step in steps:
        if step.is_writing:
            reads = {program.tensors[number].storage for number in step.reads}
            written |= reads & {program.tensors[number].storage for number in step.makes}
    return tuple(n for n in inputs[1:] if program.tensors[n].storage in written)


@dataclass(frozen=True)
class PieceNames:
    """The state of a piece beside that of its modules.

    extra: names that no step uses, or other names of tied tensors. borrowed: constant buffers that
    an earlier piece reads too, and holds in its state_dict.
    """

    extra: tuple[str, ...]
    borrowed: frozenset[str]


def assign_names(
    network: nn.Module, pieces: Sequence[Sequence[PieceProgram]], aliases: Mapping[str, str]
) -> tuple[PieceNames, ...]:
    """Return the names of every piece, so that all pieces together have each name once.

    pieces: the programs of every piece. Other names of a tied tensor go where its first use is.
    Names that no step uses go to the last piece.
    """
    owners: dict[str, int] = {}
    borrowed: list[set[str]] = [set() for _ in pieces]
    read: set[str] = set()
    for index, programs in enumerate(pieces):
        names = _list_names(programs, network)
        read |= names
        for name in names:
            owner = owners.setdefault(aliases.get(name, name), index)
            if owner != index:
                borrowed[index].add(name)

    extra: list[list[str]] = [[] for _ in pieces]
    for name in list_tensor_names(network):
        if name not in read:
            extra[owners.get(aliases[name], len(pieces) - 1)].append(name)
    return tuple(
        PieceNames(tuple(names), frozenset(others))
        for names, others in zip(extra, borrowed, strict=True)
    )


def find_unused(
    network: nn.Module, programs: Sequence[PieceProgram], aliases: Mapping[str, str]
) -> tuple[str, ...]:
    """Return the parameters that no step of these programs uses."""
    used = {aliases.get(name, name) for name in _list_names(programs, network)}
    parameters = network.named_parameters(remove_duplicate=False)
    return tuple(name for name, _ in parameters if aliases[name] not in used)


def _list_names(programs: Sequence[PieceProgram], network: nn.Module) -> set[str]:
    """Return the names of all tensors of a network that programs use."""
    names = set()
    for program in programs:
        for instruction in program.instructions:
            names.update(list_state_names(instruction.step, network))
    return names

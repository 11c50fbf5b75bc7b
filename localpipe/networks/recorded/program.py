"""A program: the steps of a tape that the main output needs, and the weights of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from localpipe.networks.recorded.opening import find_dependent, has_parameter
from localpipe.networks.recorded.recorder import draws_random
from localpipe.networks.recorded.tape import (
    RecordingError,
    Reference,
    Step,
    Tape,
    TensorFacts,
    list_leaves,
)

# Keys of the main tensor in an output that has several.
_MAIN_KEYS = ("logits", "out", "last_hidden_state")


@dataclass(frozen=True)
class Program:
    """What a network computes in one mode.

    main: the number of the network's main output. extra: those of other outputs that its loss reads
    in training. inputs: how many there are. bound: the tensors that depend on inputs, parameters or
    random draws, so that no piece can make them again.
    dependent: those that depend on inputs. owned: the trained parameters and the written buffers
    that each step uses, by their first name.
    """

    steps: tuple[Step, ...]
    tensors: Mapping[int, TensorFacts]
    main: int
    inputs: int
    bound: frozenset[int]
    dependent: frozenset[int]
    owned: tuple[frozenset[str], ...]
    extra: tuple[int, ...] = ()

    @property
    def outputs(self) -> tuple[int, ...]:
        """The numbers of all outputs, the main one first."""
        return (self.main, *self.extra)


def build_program(
    tape: Tape,
    network: nn.Module,
    inputs: int,
    written: Set[str],
    aliases: Mapping[str, str],
    extra_names: Sequence[str] = (),
) -> Program:
    """Return the program of a tape. written: the first names of buffers that training changes.

    extra_names: the keys of outputs beside the main one that are kept, where the network has them.
    Steps that no kept output needs fall away, as those of an auxiliary classifier, even where its
    modules have buffers. Raises RecordingError where the network returns no tensor.
    """
    main = _find_main(tape.output)
    extra = tuple(_find_extra(tape.output, extra_names))
    steps = _find_live_steps(tape.steps, (main, *extra))
    parameters = {aliases[name] for name, _ in network.named_parameters(remove_duplicate=False)}
    trained = parameters | written
    owned = []
    for step in steps:
        names = {aliases.get(name, name) for name in list_state_names(step, network)}
        owned.append(frozenset(names & trained))
    return Program(
        tuple(steps),
        tape.tensors,
        main,
        inputs,
        frozenset(_find_bound(tape, network, inputs, parameters)),
        frozenset(find_dependent(tape, inputs)),
        tuple(owned),
        extra,
    )


def drop_extra(
    program: Program, places: Sequence[int], crossing: Iterable[int]
) -> tuple[Program, list[int]]:
    """Return a program without its extra outputs, and where some of its steps are then.

    crossing: the numbers of tensors that are made all the same. places: indices of steps. One that
    falls away gives the index of the last kept step before it.
    """
    steps = _find_live_steps(program.steps, (program.main, *crossing))
    kept = {id(step) for step in steps}
    owned: list[frozenset[str]] = []
    new_places = []
    for step, names in zip(program.steps, program.owned, strict=True):
        if id(step) in kept:
            owned.append(names)
        new_places.append(len(owned) - 1)
    smaller = replace(program, steps=tuple(steps), owned=tuple(owned), extra=())
    return smaller, [new_places[place] for place in places]


def list_state_names(step: Step, network: nn.Module) -> list[str]:
    """Return the names of all parameters and buffers that a step reads or its module holds."""
    names = list(step.state)
    if step.module is not None:
        for name in list_tensor_names(network.get_submodule(step.module)):
            names.append(f"{step.module}.{name}")
    return names


def list_tensor_names(module: nn.Module) -> list[str]:
    """Return all names of a module's parameters and buffers."""
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    names.extend(name for name, _ in module.named_buffers(remove_duplicate=False))
    return names


def _find_main(output: Any) -> int:
    """Return the number of the network's main output."""
    if isinstance(output, Reference):
        return output.number
    for number in _find_extra(output, _MAIN_KEYS):
        return number
    for leaf in list_leaves(output):
        if isinstance(leaf, Reference):
            return leaf.number
    raise RecordingError(
        "the network's output holds no tensor that depends on its input; return the logits, or "
        "offer blocks()"
    )


def _find_extra(output: Any, keys: Sequence[str]) -> Iterator[int]:
    """Yield the numbers of the outputs of these keys, those that there are."""
    for key in keys:
        found = output.get(key) if hasattr(output, "get") else getattr(output, key, None)
        if isinstance(found, Reference):
            yield found.number


def _find_live_steps(steps: Sequence[Step], outputs: Sequence[int]) -> list[Step]:
    """Return the steps that some outputs depend on, and functions that write into buffers."""
    needed = set(outputs)
    live = []
    for step in reversed(steps):
        if step.is_stateful or not needed.isdisjoint(step.makes):
            live.append(step)
            needed.update(step.reads)
    live.reverse()
    return live


def _find_bound(tape: Tape, network: nn.Module, inputs: int, parameters: Set[str]) -> set[int]:
    """Return the tensors that no piece can make again."""
    bound = set(range(inputs))
    for step in tape.steps:
        is_bound = not bound.isdisjoint(step.reads) or not parameters.isdisjoint(step.state)
        is_bound = is_bound or bool(step.writes)
        if step.module is not None:
            is_bound = is_bound or has_parameter(network.get_submodule(step.module))
        if is_bound or draws_random(step.function):
            bound.update(step.makes)
    return bound

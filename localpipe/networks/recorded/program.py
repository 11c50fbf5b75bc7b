"""A program: the steps of a tape that the main output needs, and the weights of each."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
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

    main: the number of the network's main output. inputs: how many there are. bound: the tensors
    that depend on inputs, parameters or random draws, so that no piece can make them again.
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


def build_program(
    tape: Tape,
    network: nn.Module,
    inputs: int,
    written: Set[str],
    aliases: Mapping[str, str],
) -> Program:
    """Return the program of a tape. written: the first names of buffers that training changes.

    Steps that the main output does not need fall away, as those of an auxiliary classifier, even
    where its modules have buffers. Raises RecordingError where the network returns no tensor.
    """
    main = _find_main(tape.output)
    steps = _find_live_steps(tape, main)
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
    )


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
    for key in _MAIN_KEYS:
        found = output.get(key) if hasattr(output, "get") else getattr(output, key, None)
        if isinstance(found, Reference):
            return found.number
    for leaf in list_leaves(output):
        if isinstance(leaf, Reference):
            return leaf.number
    raise RecordingError(
        "the network's output holds no tensor that depends on its input; return the logits, or "
        "offer blocks()"
    )


def _find_live_steps(tape: Tape, main: int) -> list[Step]:
    """Return the steps that the main output depends on, and functions that write into buffers."""
    needed = {main}
    live = []
    for step in reversed(tape.steps):
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

"""Which modules are opened: those whose body is a plain chain of children. All others are one step.

A stage of a ResNet is opened, since it is a chain of blocks. A residual block is not, since its
input is read twice.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.utils import parametrize

from localpipe.networks.recorded.tape import ModuleCall, Step, Tape

# A module with more of the network's parameters is a network of its own inside a wrapper.
_LARGE = 0.25


def is_layer(name: str, module: nn.Module) -> bool:
    """Whether nothing inside a module is ever recorded: torch's layers and parametrized ones."""
    if parametrize.is_parametrized(module) or isinstance(module, nn.MultiheadAttention):
        return True
    has_children = next(module.children(), None) is not None
    return not has_children and type(module).__module__.startswith("torch.nn")


def find_open_modules(tapes: Sequence[Tape], network: nn.Module, inputs: int) -> set[str]:
    """Return the names of the modules that are opened.

    tapes: of passes in which everything but layers was open. inputs: the number of the network's
    inputs. A class is opened in all places or in none, apart from nn.Sequential.
    """
    chains: dict[str, bool] = {}
    classes: dict[type, bool] = {}
    for tape in tapes:
        dependent = find_dependent(tape, inputs)
        for call in tape.calls[1:]:
            is_chain = _is_chain(call, dependent, network)
            chains[call.name] = chains.get(call.name, True) and is_chain
            kind = type(network.get_submodule(call.name))
            if kind is not nn.Sequential:
                classes[kind] = classes.get(kind, True) and is_chain

    opened = set()
    for name, is_chain in chains.items():
        module = network.get_submodule(name)
        if (is_chain and classes.get(type(module), True)) or _is_large(name, network):
            opened.add(name)
    return opened


def find_dependent(tape: Tape, inputs: int) -> set[int]:
    """Return the numbers of the tensors that depend on the network's inputs, or that may."""
    dependent = set(range(inputs)) | tape.unseen
    for step in tape.steps:
        if not dependent.isdisjoint(step.reads):
            dependent.update(step.makes)
    return dependent


def _is_large(name: str, network: nn.Module) -> bool:
    """Whether a module has a quarter of all parameters, and is not one of a row of its kind."""
    module = network.get_submodule(name)
    parent = network.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.ModuleList | nn.Sequential | nn.ModuleDict):
        kinds = [type(child) for child in parent.children()]
        if kinds.count(type(module)) > 1:
            return False
    if next(module.children(), None) is None:
        return False
    return _count_parameters(module) > _LARGE * _count_parameters(network)


def _count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _is_chain(call: ModuleCall, dependent: set[int], network: nn.Module) -> bool:
    """Whether a module takes one tensor, and each of its steps reads the one before it alone."""
    module = network.get_submodule(call.name)
    inputs = dependent.intersection(call.inputs)
    has_parameters = has_parameter(module)
    if inputs and call.outputs and not dependent.intersection(call.outputs) and not has_parameters:
        # It reads sizes alone. Opened, what it makes is known not to depend on the input.
        return True
    if len(inputs) != 1 or next(module.children(), None) is None:
        return False
    if module._parameters or module._buffers:
        return False  # a layer with weights of its own stays one, so that a stage can replace it

    (current,) = inputs
    for item in call.items:
        reads, makes, has_weight = _list_effects(item, network)
        reads &= dependent
        makes &= dependent
        if not reads:
            if has_weight:
                return False
            continue
        if reads != {current} or len(makes) != 1:
            return False
        (current,) = makes
    return dependent.intersection(call.outputs) == {current}


def _list_effects(item: Step | ModuleCall, network: nn.Module) -> tuple[set[int], set[int], bool]:
    """Return what a call reads and makes, and whether its module has parameters."""
    if isinstance(item, ModuleCall):
        return set(item.inputs), set(item.outputs), has_parameter(network.get_submodule(item.name))
    has_weight = item.module is not None and has_parameter(network.get_submodule(item.module))
    return set(item.reads), set(item.makes), has_weight


def has_parameter(module: nn.Module) -> bool:
    """Whether a module or one inside it has a parameter."""
    return next(module.parameters(), None) is not None

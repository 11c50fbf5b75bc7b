"""Checks of a network that comes as one object, and how it is called to be built."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from localpipe import seeds
from localpipe.config.user_code import describe_exception
from localpipe.errors import UserError

# Weights that localpipe adds to a network's have these names: `aux.STAGE.`, `context.STAGE.`.
_OWN_NAMES = re.compile(r"(aux|context)\.\d+\.")
EXIT = "exit"  # the child of an exported network that is a stage's own classifier


def call_builder(name: str, build: Callable[[], Any]) -> nn.Module:
    """Return the network that `build` returns. The random generators stay as they are.

    Raises UserError if it fails, or returns no nn.Module.
    """
    with seeds.preserved_generators():
        try:
            network = build()
        except (Exception, SystemExit) as error:
            raise UserError(
                f"model: {name} cannot be called: {describe_exception(error)}; see model.args"
            ) from None
    return _require_module(name, network)


def build_empty(name: str, build: Callable[[], Any]) -> nn.Module:
    """Return the network that `build` returns without values, on the meta device where it can.

    A constructor that reads values gets the CPU. The random generators stay as they are. Raises
    UserError if it fails there, or returns no nn.Module.
    """
    try:
        with seeds.preserved_generators(), torch.device("meta"):
            network = build()
    except (Exception, SystemExit):
        return call_builder(name, build)
    return _require_module(name, network)


def _require_module(name: str, network: Any) -> nn.Module:
    if not isinstance(network, nn.Module):
        raise UserError(f"model: {name} returned {type(network).__name__}; expected an nn.Module")
    return network


def check_state(name: str, network: nn.Module) -> None:
    """Raise UserError for a layer without shapes, and for state that is no tensor."""
    for path, module in network.named_modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(is_lazy(tensor) for tensor in tensors):
            raise UserError(
                f"model: {path} of {name} is a {type(module).__name__}, whose shapes are not known "
                "before it runs; expected layers with their sizes; give them, or run the network "
                "on an image inside the function"
            )
    for key, value in network.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"model: {key} of {name} is {type(value).__name__} in its state_dict; "
                "expected tensors alone, which a checkpoint holds; keep this state in buffers "
                "instead of get_extra_state"
            )


def check_names(name: str, network: nn.Module) -> None:
    """Raise UserError for a child whose weights would have the names of localpipe's own."""
    taken = {key.split(".")[0] for key in network.state_dict() if _OWN_NAMES.match(key)}
    # The last child of an nn.Sequential is its head, which no export keeps beside an exit.
    children = list(network._modules)
    kept = children[:-1] if isinstance(network, nn.Sequential) else children
    if EXIT in kept:
        taken.add(EXIT)
    for child in children:
        if child in taken:
            raise UserError(
                f"model: child {child} of {name} has the name of networks that localpipe adds "
                "(aux, context, exit); give the child another name"
            )


def check_built_anew(name: str, first: nn.Module, second: nn.Module) -> None:
    """Raise UserError unless two calls of the function gave two networks of one architecture."""
    known = {id(module) for module in first.modules() if _has_tensors(module)}
    for child, module in second.named_children():
        if any(id(layer) in known for layer in module.modules()):
            raise UserError(
                f"model: {name} returns the same child {child} at every call; expected a new "
                "network, whose weights follow from run.seed; build it inside the function, "
                "without a cache"
            )
    if _list_shapes(first) != _list_shapes(second):
        raise UserError(
            f"model: {name} returns another architecture at every call; expected the same names "
            "and shapes; draw random numbers for weights alone"
        )


def _has_tensors(module: nn.Module) -> bool:
    return bool(module._parameters or module._buffers)


def _list_shapes(network: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """Return the name and the shape of every tensor, after the names of the children."""
    shapes: list[tuple[str, tuple[int, ...]]] = [(child, ()) for child in network._modules]
    for key, tensor in network.state_dict().items():
        shapes.append((key, tuple(tensor.shape)))
    return shapes

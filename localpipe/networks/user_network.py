"""A user's own network: a function that returns an nn.Sequential whose children are the blocks and, last, the head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from localpipe.config.user_code import describe_exception, import_named, parameter_names
from localpipe.errors import UserError
from localpipe.networks.blueprint import Block, Blueprint
from localpipe.tasks.classification import Classification


def user_blueprint(
    name: str, image: tuple[int, int, int], num_classes: int, args: Mapping[str, Any]
) -> Blueprint:
    """Import `package.module:function`, call it once to see its children, and check that stages can be cut from it.

    The function gets `args`, and `num_classes` where it takes one. Every child but the last is a block; the last is the
    network's own head and must give (B, num_classes) logits.
    """
    function = import_named(name, "model.name")
    parameters = parameter_names(function)
    takes_classes = "num_classes" in parameters and "num_classes" not in args
    make = partial(function, **args, **({"num_classes": num_classes} if takes_classes else {}))
    network = _make(name, make)
    children = list(
        network._modules
    )  # named_children would leave out a module that stands there twice
    if len(children) < 2:
        raise UserError(
            f"model: {name} has {len(children)} children; expected at least one block and a head"
        )
    _check_shared(name, network)
    _check_output(name, network, image, num_classes)
    blocks = [
        Block(child, f"{child}.", partial(_child, make, i)) for i, child in enumerate(children)
    ]
    return Blueprint(
        name, tuple(blocks[:-1]), blocks[-1], Classification(num_classes), image, whole=make
    )


def _child(make: Callable[[], nn.Sequential], index: int) -> nn.Module:
    return list(make())[index]


def _make(name: str, make: Callable[[], Any]) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        try:
            network = make()
        except Exception as error:
            raise UserError(
                f"model: {name} cannot be called: {describe_exception(error)}; see model.args"
            ) from None
    if not isinstance(network, nn.Sequential):
        raise UserError(
            f"model: {name} returned {type(network).__name__}; expected an nn.Sequential of blocks and a head"
        )
    if type(network).forward is not nn.Sequential.forward:
        raise UserError(
            f"model: {name} returned an nn.Sequential with a forward of its own, which stages cannot follow"
        )
    return network


def _check_shared(name: str, network: nn.Sequential) -> None:
    owner: dict[int, str] = {}
    for child, module in network._modules.items():
        for parameter in module.parameters() if module is not None else ():
            first = owner.setdefault(id(parameter), child)
            if first != child:
                raise UserError(
                    f"model: children {first} and {child} of {name} share a parameter; blocks that share weights cannot be "
                    "cut apart, put them into one nested nn.Sequential"
                )


def _check_output(
    name: str, network: nn.Sequential, image: tuple[int, int, int], num_classes: int
) -> None:
    try:
        with torch.no_grad():
            shape = tuple(network.to("meta")(torch.empty(2, *image, device="meta")).shape)
    except Exception as error:
        raise UserError(
            f"model: {name} does not take images of shape {image}: {describe_exception(error)}"
        ) from None
    if shape != (2, num_classes):
        raise UserError(
            f"model: {name} gives {shape} for 2 images; expected (2, {num_classes}), one logit a class"
        )

"""A user's own network: a function that returns an nn.Sequential of blocks and, last, the head."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from localpipe.config.user_code import describe_exception, import_user_code, parameter_names
from localpipe.errors import UserError
from localpipe.networks.blueprint import Block, Blueprint
from localpipe.tasks.classification import Classification


def user_blueprint(
    name: str, image: tuple[int, int, int], num_classes: int, args: Mapping[str, Any]
) -> Blueprint:
    """Return the blueprint of a function `package.module:function`, or `file.py:function`.

    The function gets `args`, and `num_classes` where it has such a parameter that `args` does not
    set. It is called once here to check its result, and again whenever parts are built. Every child
    of its result but the last is a block. The last is the network's own head, of (B, num_classes)
    logits. Raises UserError if the function cannot be imported or called, or its result cannot be
    cut. That is so for no plain nn.Sequential, fewer than two children, a shared parameter, or
    other shapes.
    """
    function = import_user_code(name, "model.name")
    arguments = dict(args)
    if "num_classes" in parameter_names(function):
        arguments.setdefault("num_classes", num_classes)
    build_network = partial(function, **arguments)

    network = _call_function(name, build_network)
    # `named_children` would leave out a module that is used twice.
    children = list(network._modules)
    if len(children) < 2:
        raise UserError(
            f"model: {name} has {len(children)} children; expected at least one block and a head"
        )
    _check_shared_parameters(name, network)
    _check_output(name, network, image, num_classes)

    parts = []
    for index, child in enumerate(children):
        build = partial(_build_child, build_network, index)
        parts.append(Block(child, f"{child}.", build))
    return Blueprint(
        name,
        tuple(parts[:-1]),
        parts[-1],
        Classification(num_classes),
        image,
        build_network=build_network,
    )


def _build_child(build_network: Callable[[], nn.Sequential], index: int) -> nn.Module:
    return list(build_network())[index]


def _call_function(name: str, build_network: Callable[[], Any]) -> nn.Sequential:
    """Return the function's network. The caller's random generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        try:
            network = build_network()
        except Exception as error:
            raise UserError(
                f"model: {name} cannot be called: {describe_exception(error)}; see model.args"
            ) from None
    if not isinstance(network, nn.Sequential):
        raise UserError(
            f"model: {name} returned {type(network).__name__}; "
            "expected an nn.Sequential of blocks and a head"
        )
    if type(network).forward is not nn.Sequential.forward:
        raise UserError(
            f"model: {name} returned an nn.Sequential with a forward of its own, "
            "which stages cannot follow"
        )
    return network


def _check_shared_parameters(name: str, network: nn.Sequential) -> None:
    """Raise UserError where two children share a parameter."""
    first_users: dict[int, str] = {}
    for child, module in network._modules.items():
        if module is None:
            continue
        for parameter in module.parameters():
            first_user = first_users.setdefault(id(parameter), child)
            if first_user != child:
                raise UserError(
                    f"model: children {first_user} and {child} of {name} share a parameter; "
                    "blocks that share weights cannot be cut apart, "
                    "put them into one nested nn.Sequential"
                )


def _check_output(
    name: str, network: nn.Sequential, image: tuple[int, int, int], num_classes: int
) -> None:
    """Raise UserError where the network does not turn images into (B, num_classes) logits."""
    try:
        with torch.no_grad():
            images = torch.empty(2, *image, device="meta")
            logits = network.to("meta")(images)
            shape = tuple(logits.shape)
    except Exception as error:
        raise UserError(
            f"model: {name} does not take images of shape {image}: {describe_exception(error)}"
        ) from None
    if shape != (2, num_classes):
        raise UserError(
            f"model: {name} gives {shape} for 2 images; "
            f"expected (2, {num_classes}), one logit a class"
        )

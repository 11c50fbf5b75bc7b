"""A user's own network: a function or class, named `package.module:function` or `file.py:function`.

An nn.Sequential with torch's own forward is cut between its children. A class may say its blocks
by a method `blocks`. Any other network is recorded, and cut where few tensors are alive.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from localpipe.config.keys import Model
from localpipe.config.user_code import import_user_code, parameter_names
from localpipe.networks.architecture import call_builder
from localpipe.networks.blueprint import Blueprint
from localpipe.networks.recorded_network import module_blueprint
from localpipe.networks.sequential_network import (
    offered_blueprint,
    offers_blocks,
    sequential_blueprint,
)
from localpipe.tasks.classification import Classification
from localpipe.tasks.task import Task


def user_blueprint(
    name: str,
    image: tuple[int, ...],
    num_classes: int,
    args: Mapping[str, Any],
    model: Model | None = None,
    task: Task | None = None,
    dtype: str = "uint8",
) -> Blueprint:
    """Return the blueprint of a function `package.module:function`, or `file.py:function`.

    The function gets `args`, and `num_classes` where it has such a parameter that `args` does not
    set. It is called here to check its result, and again whenever parts are built. model: its other
    keys say how a network is recorded. Without it they are the defaults. task: what it is trained
    for, classification by default. dtype: of the inputs. Raises UserError if the
    function cannot be imported or called, or its result cannot be trained. That is so for layers
    without shapes, state that no checkpoint holds, names that localpipe uses itself, an object that
    is returned twice, and for networks that fail or cannot be cut.
    """
    function = import_user_code(name, "model.name")
    arguments = dict(args)
    if "num_classes" in parameter_names(function):
        arguments.setdefault("num_classes", num_classes)
    build = partial(function, **arguments)
    network = call_builder(name, build)
    if isinstance(network, nn.Sequential) and type(network).forward is nn.Sequential.forward:
        return sequential_blueprint(name, build, image, num_classes, task=task, dtype=dtype)
    if offers_blocks(network):
        return offered_blueprint(name, network, build, image, num_classes, task, dtype)
    task = task or Classification(num_classes)
    return module_blueprint(name, build, image, task, model or Model(), dtype, first=network)

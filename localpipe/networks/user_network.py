"""A user's own network: a function that returns an nn.Sequential of blocks and, last, the head."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from localpipe import seeds
from localpipe.config.user_code import describe_exception, import_user_code, parameter_names
from localpipe.errors import UserError
from localpipe.fields import dtype_name
from localpipe.networks.blueprint import Block, Blueprint, to_meta
from localpipe.tasks.classification import Classification

# Two batches of images tell a dimension of the batch from one that happens to have its size.
_BATCHES = (2, 4)
# Weights that localpipe adds to a network's have these names: `aux.STAGE.`, `context.STAGE.`.
_OWN_NAMES = re.compile(r"(aux|context)\.\d+\.")
_EXIT = "exit"  # the child of an exported network that is a stage's own classifier


def user_blueprint(
    name: str, image: tuple[int, int, int], num_classes: int, args: Mapping[str, Any]
) -> Blueprint:
    """Return the blueprint of a function `package.module:function`, or `file.py:function`.

    The function gets `args`, and `num_classes` where it has such a parameter that `args` does not
    set. It is called twice here to check its result, and again whenever parts are built. Every
    child of its result but the last is a block. The last is the network's own head, of
    (B, num_classes) logits. Raises UserError if the function cannot be imported or called, or its
    result cannot be trained. That is so for no plain nn.Sequential, fewer than two children, a
    shared parameter, layers without shapes, state that no checkpoint holds, names that localpipe
    uses itself, an object that is returned twice, and for blocks that fail or give no tensor.
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
    _check_state(name, network)
    _check_names(name, network)
    # Only a network that is surely not the user's own object may lose its values.
    second = _call_function(name, build_network)
    _check_built_anew(name, network, second)
    uncut = _try_children(name, second, image, num_classes)

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
        uncut=uncut,
    )


def _build_child(build_network: Callable[[], nn.Sequential], index: int) -> nn.Module:
    return list(build_network())[index]


def _call_function(name: str, build_network: Callable[[], Any]) -> nn.Sequential:
    """Return the function's network. The random generators stay as they are."""
    with seeds.preserved_generators():
        try:
            network = build_network()
        except (Exception, SystemExit) as error:
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


def _check_state(name: str, network: nn.Sequential) -> None:
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


def _check_names(name: str, network: nn.Sequential) -> None:
    """Raise UserError for a child whose weights would have the names of localpipe's own."""
    taken = {key.split(".")[0] for key in network.state_dict() if _OWN_NAMES.match(key)}
    if _EXIT in list(network._modules)[:-1]:
        taken.add(_EXIT)
    for child in network._modules:
        if child in taken:
            raise UserError(
                f"model: child {child} of {name} has the name of networks that localpipe adds "
                "(aux, context, exit); give the child another name"
            )


def _check_built_anew(name: str, first: nn.Sequential, second: nn.Sequential) -> None:
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


def _list_shapes(network: nn.Sequential) -> list[tuple[str, tuple[int, ...]]]:
    """Return the name and the shape of every tensor, after the names of the children."""
    shapes: list[tuple[str, tuple[int, ...]]] = [(child, ()) for child in network._modules]
    for key, tensor in network.state_dict().items():
        shapes.append((key, tuple(tensor.shape)))
    return shapes


# -- the network without values ---------------------------------------------------------------


@dataclass(frozen=True)
class _Output:
    """What one child gave for `rows` images."""

    rows: int
    mode: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_dense: bool

    @property
    def fault(self) -> str | None:
        """What keeps this tensor from crossing to another stage, or None."""
        if not self.dtype.is_floating_point:
            return f"gives {dtype_name(self.dtype)} numbers"
        if not self.is_dense:
            return "gives a tensor that is not dense"
        if self.shape[:1] != (self.rows,):
            return f"gives the shape {self.shape} for {self.rows} images"
        return None


def _try_children(
    name: str, network: nn.Sequential, image: tuple[int, int, int], num_classes: int
) -> tuple[str | None, ...]:
    """Run a network on the meta device, and return for every block why no cut may follow, or None.

    Two batches run in training and in evaluation mode. network: not needed afterwards. Raises
    UserError where a child fails or gives no tensor, and where the logits are not (B, num_classes).
    """
    to_meta(network)
    runs = []
    for is_training in (True, False):
        network.train(is_training)
        for rows in _BATCHES:
            with seeds.preserved_generators():
                outputs = _run_children(name, network, image, rows, is_training)
            _check_logits(name, outputs[-1], num_classes)
            runs.append(outputs)
    return tuple(_find_fault(outputs) for outputs in list(zip(*runs, strict=True))[:-1])


def _run_children(
    name: str, network: nn.Sequential, image: tuple[int, int, int], rows: int, is_training: bool
) -> list[_Output]:
    """Return the output of every child for empty images."""
    mode = "training" if is_training else "evaluation"
    h: Any = torch.empty(rows, *image, device="meta")
    outputs = []
    for child, module in network._modules.items():
        try:
            with torch.no_grad():
                h = module(h)
        except (Exception, SystemExit) as error:
            cause = describe_exception(error).rstrip(".")
            raise UserError(
                f"model: {name} does not take images of shape {image}: child {child} fails in "
                f"{mode}: {cause}; every child runs once without values, on torch's meta device, "
                "so it may not read any"
            ) from None
        if not isinstance(h, Tensor):
            raise UserError(
                f"model: child {child} of {name} gives {type(h).__name__} in {mode}; expected one "
                "tensor; put children that hand on anything else into one nested nn.Sequential"
            )
        is_dense = h.layout == torch.strided
        outputs.append(_Output(rows, mode, tuple(h.shape), h.dtype, is_dense))
    return outputs


def _check_logits(name: str, output: _Output, num_classes: int) -> None:
    expected = (output.rows, num_classes)
    if output.shape != expected:
        raise UserError(
            f"model: {name} gives {output.shape} for {output.rows} images; "
            f"expected {expected}, one logit a class"
        )
    if output.fault is not None:
        raise UserError(f"model: {name} {output.fault}; expected one floating-point logit a class")


def _find_fault(outputs: Sequence[_Output]) -> str | None:
    """Return why no cut may follow a block that gave these outputs, or None."""
    first = outputs[0]
    for output in outputs:
        if output.fault is not None:
            return output.fault
        if output.shape[1:] != first.shape[1:]:
            return (
                f"gives the shape {first.shape} for {first.rows} images in {first.mode} and "
                f"{output.shape} for {output.rows} in {output.mode}"
            )
    return None

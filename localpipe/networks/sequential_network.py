"""A network that says its blocks itself: an nn.Sequential, or a class with a method `blocks`.

The children of an nn.Sequential are the blocks and, last, the head. Nothing is recorded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from localpipe import seeds
from localpipe.config.user_code import call_user_code, describe_exception
from localpipe.errors import UserError
from localpipe.fields import dtype_name
from localpipe.networks.architecture import call_builder, check_built_anew, check_names, check_state
from localpipe.networks.blueprint import Block, Blueprint, input_dtype, to_meta
from localpipe.tasks.classification import Classification
from localpipe.tasks.task import Task

# Two batches of images tell a dimension of the batch from one that happens to have its size.
_BATCHES = (2, 4)


def sequential_blueprint(
    name: str,
    build_network: Callable[[], nn.Sequential],
    image: tuple[int, ...],
    num_classes: int,
    paths: Sequence[str] = (),
    build_original: Callable[[], nn.Module] | None = None,
    task: Task | None = None,
    dtype: str = "uint8",
) -> Blueprint:
    """Return the blueprint of the nn.Sequential that `build_network` returns.

    It is called twice here, and again whenever parts are built. Every child but the last is a
    block. The last is the network's own head, whose outputs the task takes. task: by default the
    classification of `num_classes` classes. dtype: of the inputs. paths: the names of the
    children in the network that `build_original` returns. Without them the nn.Sequential is that
    network. Raises UserError for fewer than two children, a shared parameter, and for blocks that
    fail or give no tensor.
    """
    task = task or Classification(num_classes)
    network = _call_builder(name, build_network)
    # `named_children` would leave out a module that is used twice.
    children = list(network._modules)
    if len(children) < 2:
        raise UserError(
            f"model: {name} has {len(children)} children; expected at least one block and a head"
        )
    _check_shared_parameters(name, network)
    check_state(name, network)
    check_names(name, network)
    # Only a network that is surely not the user's own object may lose its values.
    second = _call_builder(name, build_network)
    check_built_anew(name, network, second)

    parts = []
    for index, path in enumerate(paths or children):
        build = partial(_build_child, build_network, index)
        parts.append(Block(path, f"{path}.", build))
    return Blueprint(
        name,
        tuple(parts[:-1]),
        parts[-1],
        task,
        image,
        build_network=build_network,
        uncut=_try_children(name, second, image, task, dtype),
        build_original=build_original or build_network,
        dtype=dtype,
        evaluation_sample=task.evaluation_sample,
    )


def offers_blocks(network: nn.Module) -> bool:
    """Return whether the class of a network has a method `blocks`.

    A child of that name, as some networks have, is no method.
    """
    return inspect.ismethod(getattr(network, "blocks", None))


def offered_blueprint(
    name: str,
    network: nn.Module,
    build: Callable[[], nn.Module],
    image: tuple[int, ...],
    num_classes: int,
    task: Task | None = None,
    dtype: str = "uint8",
) -> Blueprint:
    """Return the blueprint of a network whose method `blocks` returns its blocks and its head.

    They are modules of the network, which holds nothing else. network: what `build` has returned.
    Raises UserError otherwise, and as `sequential_blueprint`.
    """
    paths = _find_block_paths(name, network)
    row = partial(_build_row, build)
    return sequential_blueprint(name, row, image, num_classes, paths, build, task, dtype)


def _build_row(build: Callable[[], Any]) -> nn.Sequential:
    return nn.Sequential(*build().blocks())


def _find_block_paths(name: str, network: Any) -> list[str]:
    """Return the name in the network of every module that its method `blocks` returns."""
    expected = "expected its blocks and last its head, each a module of the network"
    names = {id(module): path for path, module in network.named_modules() if path}
    paths = []
    for block in call_user_code(f"model: blocks() of {name} fails", network.blocks):
        if id(block) not in names:
            raise UserError(
                f"model: blocks() of {name} gives a {type(block).__name__} that is no module of "
                f"the network; {expected}; make it a child in the constructor"
            )
        paths.append(names[id(block)])
    for key in network.state_dict():
        if not any(key.startswith(f"{path}.") for path in paths):
            raise UserError(f"model: {key} of {name} is in none of its blocks(); {expected}")
    return paths


def _call_builder(name: str, build: Callable[[], nn.Sequential]) -> nn.Sequential:
    network = call_builder(name, build)
    if not isinstance(network, nn.Sequential):
        raise UserError(f"model: {name} returns an nn.Sequential at one call, and none at another")
    return network


def _build_child(build_network: Callable[[], nn.Sequential], index: int) -> nn.Module:
    return list(build_network())[index]


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
    name: str, network: nn.Sequential, image: tuple[int, ...], task: Task, dtype: str
) -> tuple[str | None, ...]:
    """Run a network on the meta device, and return for every block why no cut may follow, or None.

    Two batches run in training and in evaluation mode. network: not needed afterwards. Raises
    UserError where a child fails or gives no tensor, and where the outputs are not the task's.
    """
    to_meta(network)
    runs = []
    for is_training in (True, False):
        network.train(is_training)
        for rows in _BATCHES:
            with seeds.preserved_generators():
                x = torch.empty(rows, *image, device="meta", dtype=input_dtype(dtype))
                outputs = _run_children(name, network, x, is_training)
            _check_outputs(name, outputs[-1], task.output_shape)
            runs.append(outputs)
    if task.evaluation_sample is not None:
        _try_evaluation(name, network, task, dtype)
    return tuple(_find_fault(outputs) for outputs in list(zip(*runs, strict=True))[:-1])


def _try_evaluation(name: str, network: nn.Sequential, task: Task, dtype: str) -> None:
    """Run a network without values on inputs of evaluations, which have another shape.

    Raises UserError as `_try_children`.
    """
    assert task.evaluation_sample is not None
    network.eval()
    with seeds.preserved_generators():
        shape = (_BATCHES[0], *task.evaluation_sample)
        x = torch.empty(shape, device="meta", dtype=input_dtype(dtype))
        outputs = _run_children(name, network, x, is_training=False)
    _check_outputs(name, outputs[-1], task.in_mode(is_training=False).output_shape)


def _run_children(
    name: str, network: nn.Sequential, inputs: Tensor, is_training: bool
) -> list[_Output]:
    """Return the output of every child for inputs without values."""
    mode = "training" if is_training else "evaluation"
    rows, image = len(inputs), tuple(inputs.shape[1:])
    h: Any = inputs
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


def _check_outputs(name: str, output: _Output, shape: tuple[int, ...]) -> None:
    expected = (output.rows, *shape)
    if output.shape != expected:
        raise UserError(
            f"model: {name} gives {output.shape} for {output.rows} images; "
            f"expected {expected}, one logit a class; let its last layer give that, or set "
            "model.num_classes and task.name to what it gives"
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

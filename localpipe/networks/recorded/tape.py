"""A tape: the steps of one forward pass outside the closed modules, with their arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.utils import _pytree as pytree


class RecordingError(Exception):
    """Why a network cannot be cut: the module, the reason and the way out, in one sentence."""


class NoCutError(RecordingError):
    """Why a recorded network has no place to cut. It can be replayed as one block."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A tensor that an earlier step made, or an input of the network, by its number."""

    number: int


@dataclass(frozen=True, slots=True)
class StateReference:
    """A parameter, a buffer or a plain tensor of the network, by its name there."""

    name: str


@dataclass(frozen=True, slots=True)
class BatchSize:
    """An int that grows with the batch: scale * batch + offset."""

    scale: int
    offset: int

    def at(self, batch: int) -> int:
        """Return the int for a batch, which torch.export may give as a symbol."""
        if self.scale == 1 and self.offset == 0:
            return batch
        return self.scale * batch + self.offset


def is_meta_device(leaf: Any) -> bool:
    """Whether a leaf of arguments is the device of a recording, or its name."""
    if type(leaf) is torch.device:
        return leaf.type == "meta"
    return type(leaf) is str and leaf == "meta"


# Alone in a dimension, it is the batch itself.
BATCH = BatchSize(1, 0)


@dataclass(frozen=True, slots=True)
class AutocastScope:
    """A `torch.autocast` of the network's own forward. Without a device type it is the input's."""

    device_type: str | None
    dtype: torch.dtype | None
    is_enabled: bool


@dataclass(frozen=True)
class Step:
    """One call: of the closed module `module`, or of a torch function.

    outputs: the numbers of its output's tensors, in order. writes: arguments that it wrote in
    place, as (leaf among the tensors of the arguments, new number). shadows: other tensors on the
    same memory, as (old number, new number). opened: the open modules around it, outermost first.
    has_grad: whether gradients were on. is_writing: it writes into an argument, and may return it.
    is_stateful: it is a function that writes into a buffer of the network.
    """

    module: str | None
    function: Callable[..., Any] | None
    args: Any
    kwargs: Any
    outputs: tuple[int, ...]
    writes: tuple[tuple[int, int], ...] = ()
    shadows: tuple[tuple[int, int], ...] = ()
    opened: tuple[str, ...] = ()
    has_grad: bool = True
    autocast: tuple[AutocastScope, ...] = ()
    is_writing: bool = False
    is_stateful: bool = False

    @property
    def parent(self) -> str:
        """The name of the open module that makes the call, "" for the network."""
        if self.module is None:
            return self.opened[-1] if self.opened else ""
        return self.module.rpartition(".")[0]

    @property
    def name(self) -> str:
        """A name that is the same on every tape of the network."""
        if self.module is not None:
            return self.module
        function = getattr(self.function, "__name__", type(self.function).__name__)
        return f"{self.parent}:{function}"

    @cached_property
    def reads(self) -> tuple[int, ...]:
        """The numbers of the tensors that it reads."""
        leaves = list_leaves((self.args, self.kwargs))
        numbers = [leaf.number for leaf in leaves if isinstance(leaf, Reference)]
        numbers.extend(old for old, _ in self.shadows)
        return tuple(numbers)

    @cached_property
    def state(self) -> tuple[str, ...]:
        """The names of the parameters and buffers that it reads directly."""
        leaves = list_leaves((self.args, self.kwargs))
        return tuple(leaf.name for leaf in leaves if isinstance(leaf, StateReference))

    @cached_property
    def makes(self) -> tuple[int, ...]:
        """The numbers of the tensors that it makes or writes."""
        numbers = list(self.outputs)
        numbers.extend(new for _, new in self.writes)
        numbers.extend(new for _, new in self.shadows)
        return tuple(numbers)


@dataclass
class ModuleCall:
    """One call of an open module: the tensors of its arguments and outputs, and what it did."""

    name: str
    inputs: list[int]
    outputs: list[int] = field(default_factory=list)
    items: list[Step | ModuleCall] = field(default_factory=list)


@dataclass(frozen=True)
class TensorFacts:
    """What is known of a numbered tensor. A dimension of `shape` may be a BatchSize.

    order: of the dimensions after the first in memory, as in BlockOutput, and None where it depends
    on the batch. storage: the same for tensors on one memory.
    """

    shape: tuple[Any, ...]
    order: tuple[int, ...] | None
    dtype: torch.dtype
    storage: int


@dataclass
class Tape:
    """All steps of one forward pass.

    output: what the network returned, with a Reference for every tensor. calls: of all open
    modules, the network's own first. unseen: the tensors that come from where nothing is recorded.
    """

    steps: list[Step]
    output: Any
    tensors: dict[int, TensorFacts]
    calls: list[ModuleCall]
    unseen: frozenset[int] = frozenset()


def map_tree(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return a tree of arguments with a function applied to every leaf.

    Lists, tuples, dicts, slices and pytree's nodes are trees. A torch.Size becomes a tuple.
    """
    kind = type(tree)
    if kind is tuple or kind is torch.Size:
        return tuple([map_tree(function, part) for part in tree])
    if kind is list:
        return [map_tree(function, part) for part in tree]
    if kind is dict:
        return {key: map_tree(function, part) for key, part in tree.items()}
    if kind is slice:
        return slice(*(map_tree(function, part) for part in (tree.start, tree.stop, tree.step)))
    if kind in _LEAVES or pytree.tree_is_leaf(tree):
        return function(tree)
    parts, spec = pytree.tree_flatten(tree, is_leaf=lambda part: part is not tree)
    return pytree.tree_unflatten([map_tree(function, part) for part in parts], spec)


_LEAVES = frozenset(
    (torch.Tensor, torch.nn.Parameter, Reference, StateReference, BatchSize, int, float, bool, str)
) | {type(None), torch.dtype, torch.device}


def list_leaves(tree: Any) -> list[Any]:
    """Return the leaves of a tree of arguments, in order."""
    leaves: list[Any] = []
    map_tree(leaves.append, tree)
    return leaves

"""A piece: a module that replays the steps between two cuts with the network's own modules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from localpipe.networks.recorded.tape import (
    AutocastScope,
    BatchSize,
    RecordingError,
    Reference,
    StateReference,
    Step,
    is_meta_device,
    list_leaves,
    map_tree,
)


class Instruction:
    """A step, made ready to be called often.

    freed: the numbers of the tensors that no later step of the piece needs.
    """

    def __init__(self, step: Step, freed: tuple[int, ...]) -> None:
        self.step = step
        self.path = tuple(step.module.split(".")) if step.module is not None else None
        self.freed = freed
        self.references: tuple[int, ...] | None = None
        if _is_plain(step):
            self.references = tuple(leaf.number for leaf in step.args)

    def run(self, piece: nn.Module, values: dict[int, Any], batch: int, device: Any) -> None:
        """Call the step, and put the tensors that it makes into `values`."""
        step = self.step
        function: Any = step.function
        if self.path is not None:
            # Looked up at every call, because a stage may have replaced the module.
            function = piece
            for name in self.path:
                function = function._modules[name]
        for old, new in step.shadows:
            if old in values:
                values[new] = values[old]

        if self.references is not None:
            output = function(*[values[number] for number in self.references])
        else:
            output = self._call(function, piece, values, batch, device)
        if isinstance(output, Tensor):
            made = [output]
        else:
            made = [leaf for leaf in list_leaves(output) if isinstance(leaf, Tensor)]
        values.update(zip(step.outputs, made, strict=True))
        for number in self.freed:
            values.pop(number, None)

    def _call(
        self,
        function: Callable[..., Any],
        piece: nn.Module,
        values: dict[int, Any],
        batch: int,
        device: Any,
    ) -> Any:
        """Call a function with arguments that are not tensors alone."""

        def resolve(leaf: Any) -> Any:
            kind = type(leaf)
            if kind is Reference:
                return values[leaf.number]
            if kind is StateReference:
                return _get_attribute(piece, leaf.name)
            if kind is BatchSize:
                return leaf.at(batch)
            if is_meta_device(leaf):
                return device
            return leaf

        step = self.step
        args, kwargs = map_tree(resolve, step.args), map_tree(resolve, step.kwargs)
        call = partial(function, *args, **kwargs)
        output = _call_in_scopes(call, step, step.autocast, device)
        # An argument that was written has another number from now on.
        if step.writes:
            tensors = [leaf for leaf in list_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            for place, number in step.writes:
                values[number] = tensors[place]
        return output


def _call_in_scopes(
    call: Callable[[], Any],
    step: Step,
    scopes: tuple[AutocastScope, ...],
    device: torch.device,
) -> Any:
    """Return a call's output, inside the scopes that the forward itself has around the step.

    They are plain `with` statements, because torch.compile follows no others.
    """
    if scopes:
        with _open_autocast(scopes[0], device):
            return _call_in_scopes(call, step, scopes[1:], device)
    if not step.has_grad:
        with torch.no_grad():
            return call()
    return call()


def _is_plain(step: Step) -> bool:
    """Whether a step takes tensors by position and nothing else, and writes into none."""
    if type(step.args) is not tuple or step.kwargs or step.writes or step.autocast:
        return False
    return step.has_grad and all(type(leaf) is Reference for leaf in step.args)


def _open_autocast(scope: AutocastScope, device: torch.device) -> torch.autocast:
    device_type = scope.device_type or device.type
    if device_type == "meta":
        return torch.autocast("cpu", enabled=False)
    return torch.autocast(device_type, dtype=scope.dtype, enabled=scope.is_enabled)


@dataclass(frozen=True)
class PieceProgram:
    """What a piece does in one mode.

    inputs and outputs: the numbers of the tensors that it takes and gives. copied: the companions
    among its inputs that a step writes into.
    """

    instructions: tuple[Instruction, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    copied: tuple[int, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> PieceProgram:
        """Return the program itself, which never changes."""
        return self


@dataclass(frozen=True)
class ResizedProgram:
    """What a piece does in an evaluation of inputs of another shape than in training.

    shape: of the main tensor that it takes then, per sample.
    """

    shape: tuple[int, ...]
    program: PieceProgram

    def __deepcopy__(self, memo: dict[int, Any]) -> ResizedProgram:
        """Return the program itself, which never changes."""
        return self


class Piece(nn.Module):
    """The steps between two cuts. It holds the network's own modules under their own names.

    It takes the main tensor, and after it the companions. It gives the main tensor alone, or a
    tuple of the main tensor and the companions. It shares its modules with `network`.

    programs: for training (True) and evaluation. names: the parameters and buffers that it holds
    beside those that its steps use. borrowed: buffers that belong to the state of an earlier piece.
    resized: for an evaluation of inputs of another shape, or None.
    """

    def __init__(
        self,
        network: nn.Module,
        programs: Mapping[bool, PieceProgram],
        names: Iterable[str] = (),
        borrowed: Collection[str] = (),
        resized: ResizedProgram | None = None,
    ) -> None:
        super().__init__()
        self._programs = dict(programs)
        self._resized = resized
        for program in self._programs.values():
            for instruction in program.instructions:
                step = instruction.step
                if step.module is not None:
                    _attach_module(self, step.module, _find_module(network, step.module))
                for name in step.state:
                    _attach_tensor(self, name, network, name in borrowed)
        for name in names:
            _attach_tensor(self, name, network)
        self.training = network.training

    def forward(self, *crossing: Tensor) -> Any:
        """Return the main tensor, or a tuple of it and the companions.

        crossing: the same for the piece before, each of shape (B, ...).
        """
        program = self._choose_program(crossing[0])
        values: dict[int, Any] = dict(zip(program.inputs, crossing, strict=True))
        for number in program.copied:
            values[number] = values[number].clone()
        batch, device = crossing[0].shape[0], crossing[0].device
        for instruction in program.instructions:
            instruction.run(self, values, batch, device)
        if len(program.outputs) == 1:
            return values[program.outputs[0]]
        return tuple(values[number] for number in program.outputs)

    def _choose_program(self, main: Tensor) -> PieceProgram:
        """Return the program of the mode. In an evaluation it may depend on the inputs' shape."""
        resized = self._resized
        if resized is None or self.training or main.shape[1:] != resized.shape:
            return self._programs[self.training]
        return resized.program


def _find_module(network: nn.Module, path: str) -> nn.Module:
    try:
        return network.get_submodule(path)
    except AttributeError:
        raise RecordingError(
            f"{type(network).__name__} has no module {path}, which its recording has; build the "
            "network with the arguments of the recorded one"
        ) from None


def _attach_module(piece: nn.Module, path: str, module: nn.Module) -> None:
    """Register a module under its name in the network."""
    parent = _make_parents(piece, path)
    last = path.rpartition(".")[2]
    if parent._modules.get(last) is not module:
        parent.add_module(last, module)


def _attach_tensor(
    piece: nn.Module, path: str, network: nn.Module, is_borrowed: bool = False
) -> None:
    """Register a parameter, a buffer or a plain tensor under its name in the network.

    A borrowed buffer is not in the piece's state_dict.
    """
    parent_path, _, last = path.rpartition(".")
    source = _find_module(network, parent_path)
    parent = _make_parents(piece, path)
    if parent is source:
        return
    tensor = getattr(source, last)
    if isinstance(tensor, nn.Parameter):
        parent.register_parameter(last, tensor)
    elif last in source._buffers:
        is_persistent = last not in source._non_persistent_buffers_set and not is_borrowed
        parent.register_buffer(last, tensor, persistent=is_persistent)
    else:
        setattr(parent, last, tensor)


def _make_parents(piece: nn.Module, path: str) -> nn.Module:
    """Return the module that holds a name, made of plain modules where none exists yet."""
    parent = piece
    for name in path.split(".")[:-1]:
        child = parent._modules.get(name)
        if child is None:
            child = nn.Module()
            parent.add_module(name, child)
        parent = child
    return parent


def _get_attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module

"""The blueprint of a network that is one nn.Module: recorded once, and built in pieces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from localpipe import seeds
from localpipe.config.keys import Model
from localpipe.config.user_code import describe_exception
from localpipe.errors import UserError, describe_names
from localpipe.networks.architecture import build_empty, check_built_anew, check_names, check_state
from localpipe.networks.blueprint import Block, Blueprint, input_dtype, to_meta
from localpipe.networks.library_network import find_library_network
from localpipe.networks.recorded.recording import (
    NoCutError,
    Recording,
    RecordingError,
    find_aliases,
    record,
)
from localpipe.tasks.layout import Grid
from localpipe.tasks.task import Task

_ROWS = 2  # of images that show what the whole network gives


def module_blueprint(
    name: str,
    build: Callable[[], nn.Module],
    image: tuple[int, ...],
    task: Task,
    model: Model,
    dtype: str = "uint8",
    first: nn.Module | None = None,
    library: str | None = None,
) -> Blueprint:
    """Return the blueprint of the network that `build` returns, a new one at every call.

    task: what it is trained for. model: how it is recorded, by `crossing`, `layout` and `untie`.
    dtype: of the inputs. first: what an earlier call of a
    user's code has returned. It stays as it is, and other calls are compared with it. library: with
    its version. Raises UserError for a network that cannot be built, run on images of this shape,
    or cut.
    """
    source = _Source(name, build, model.untie)
    if first is not None:
        # Only a network that is surely not the user's own object may lose its values.
        check_state(name, first)
        check_names(name, first)
        check_built_anew(name, first, build_empty(name, build))
    empty, aliases = source.build_empty()
    inputs = torch.empty(_ROWS, *image, device="meta", dtype=input_dtype(dtype))
    _check_modes(name, empty, inputs, task)
    recording, why_whole = _record(source, empty, aliases, inputs, model, task)

    build_network = partial(_build_pieces, source, recording)
    parts = []
    for index, block in enumerate([*recording.names, recording.tail_name]):
        parts.append(Block(block, "", partial(_build_piece, build_network, index)))
    return Blueprint(
        name,
        tuple(parts[:-1]),
        parts[-1],
        replace(task, grid=_find_grid(recording, empty, inputs)),
        image,
        build_network=build_network,
        recorded_outputs=recording.outputs,
        library=library,
        build_original=source.build,
        notes=_describe(recording, why_whole),
        why_whole=why_whole,
        functional_batch_norms=recording.functional_batch_norms,
        dtype=dtype,
        evaluation_sample=task.evaluation_sample,
        evaluation_outputs=recording.resized_outputs,
    )


def library_blueprint(
    name: str,
    library: str,
    network: str,
    image: tuple[int, ...],
    task: Task,
    model: Model,
    dtype: str = "uint8",
) -> Blueprint:
    """Return the blueprint of a library's network, `name` being LIBRARY:NETWORK.

    model: its arguments, and how it is recorded. Raises UserError as `find_library_network` and
    `module_blueprint` do.
    """
    found = find_library_network(library, network, image, task.num_classes, model.args, task.reads)
    return module_blueprint(name, found.build, image, task, model, dtype, library=found.version)


@dataclass(frozen=True)
class _Source:
    """What builds a network, and whether its tied weights are untied."""

    name: str
    build_tied: Callable[[], Any]
    is_untied: bool

    def build(self) -> nn.Module:
        """Return a new network on the default device."""
        network: nn.Module = self.build_tied()
        if self.is_untied:
            untie(network)
        return network

    def build_empty(self) -> tuple[nn.Module, dict[str, str]]:
        """Return a new network on the meta device, and the first name of each tied weight.

        Where its constructor reads values, it is built on the CPU first. Raises UserError where
        that fails too.
        """
        network = build_empty(self.name, self.build)
        # A move to the meta device unties.
        aliases = find_aliases(network)
        return to_meta(network), aliases


def untie(network: nn.Module) -> None:
    """Give every name of a parameter a parameter of its own, with equal values."""
    known: set[int] = set()
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) in known:
                copied = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                module._parameters[name] = copied
            known.add(id(parameter))


def _record(
    source: _Source,
    empty: nn.Module,
    aliases: Mapping[str, str],
    inputs: Tensor,
    model: Model,
    task: Task,
) -> tuple[Recording, str | None]:
    """Return a network's recording, and why it is one block, which is None where it has cuts."""

    def make_images(shape: tuple[int, ...], batch: int) -> tuple[Tensor, ...]:
        return (inputs.new_empty((batch, *shape)),)

    evaluation_sample = None
    if task.evaluation_sample is not None:
        evaluation_sample = partial(make_images, task.evaluation_sample)
    record_here = partial(
        record,
        empty,
        partial(make_images, tuple(inputs.shape[1:])),
        model.crossing,
        model.layout,
        aliases,
        extra_names=task.extra_outputs,
        evaluation_sample=evaluation_sample,
    )
    try:
        try:
            return record_here(), None
        except NoCutError as error:
            return record_here(is_whole=True), str(error)
    except RecordingError as error:
        raise UserError(f"model: {source.name}: {error}") from None


def _describe(recording: Recording, why_whole: str | None) -> tuple[str, ...]:
    """Return lines on unused and on tied weights, and on cuts that are missing."""
    notes = []
    if why_whole is not None:
        notes.append(f"note: {why_whole}")
    if recording.unused:
        names = describe_names(recording.unused)
        notes.append(f"note: no step of training uses {names}; they stay as they are")
    for group in recording.ties:
        notes.append(
            f"note: {' and '.join(group)} are one weight, which keeps their blocks together; "
            "model.untie=true copies it"
        )
    if recording.wide_boundaries and why_whole is None:
        blocks = ", ".join(block for block, _ in recording.wide_boundaries)
        notes.append(
            f"note: model.crossing=2 would also cut after {blocks}, where two tensors cross"
        )
    return tuple(notes)


def _build_pieces(source: _Source, recording: Recording) -> nn.Sequential:
    """Return new pieces on the default device: the blocks and, last, the tail."""
    if torch.empty(0).is_meta:
        network, _ = source.build_empty()
    else:
        network = source.build()
    return nn.Sequential(*recording.pieces(network))


def _build_piece(build_network: Callable[[], nn.Sequential], index: int) -> nn.Module:
    return build_network()[index]


def _check_modes(name: str, empty: nn.Module, inputs: Tensor, task: Task) -> None:
    """Raise UserError unless the network gives what the task takes, in both modes and sizes."""
    for is_training in (True, False):
        _check_outputs(name, empty, inputs, task, is_training)
    if task.evaluation_sample is not None:
        large = inputs.new_empty((_ROWS, *task.evaluation_sample))
        _check_outputs(name, empty, large, task.in_mode(is_training=False), is_training=False)


def _check_outputs(
    name: str, empty: nn.Module, inputs: Tensor, task: Task, is_training: bool
) -> None:
    """Raise UserError unless the network gives what the task's loss takes, in a mode.

    inputs: (rows, *sample), without values.
    """
    empty.train(is_training)
    try:
        with seeds.preserved_generators(), torch.no_grad():
            output = empty(inputs)
    except (Exception, SystemExit) as error:
        mode = "training" if is_training else "evaluation"
        raise UserError(
            f"model: {name} does not take images of shape {tuple(inputs.shape[1:])}: "
            f"it fails in {mode}: "
            f"{describe_exception(error).rstrip('.')}; it runs once without values, on torch's "
            "meta device, so it may not read any"
        ) from None
    _check_logits(name, find_logits(output), task)
    for key in task.extra_outputs:
        extra = output.get(key) if isinstance(output, Mapping) else None
        if extra is not None:
            _check_logits(f"output {key} of {name}", extra, task)


def _check_logits(name: str, logits: Tensor | None, task: Task) -> None:
    """Raise UserError unless an output has the shape that the task's loss takes."""
    expected = (_ROWS, *task.output_shape)
    if logits is None or tuple(logits.shape) != expected or not logits.is_floating_point():
        shape = None if logits is None else tuple(logits.shape)
        raise UserError(
            f"model: {name} gives {shape} for {_ROWS} images; expected {expected}, one logit a "
            "class"
        )


def find_logits(output: Any) -> Tensor | None:
    """Return the logits of what a network gives, or None.

    output: the tensor itself, a mapping or an object with `logits` or `out`, or a tuple whose first
    tensor they are.
    """
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "out"):
        value = getattr(output, name, None)
        if isinstance(output, Mapping):
            value = output.get(name)
        if isinstance(value, Tensor):
            return value
    if isinstance(output, tuple | list):
        for value in output:
            if isinstance(value, Tensor):
                return value
    return None


def _find_grid(recording: Recording, empty: nn.Module, inputs: Tensor) -> Grid | None:
    """Return the grid of the patches whose tokens cross the first boundary of tokens, if any.

    Patches are the places of a convolution. Of several that fit, as `Grid.at` says, the one with
    the most places is taken.
    """
    tokens = [output.shape[0] for output in recording.outputs if output.layout == "td"]
    if not tokens:
        return None
    fitting = []
    for height, width in _list_places(empty, inputs):
        grid = Grid(height, width).at(tokens[0])
        if grid is not None:
            fitting.append(grid)
    return max(fitting, key=lambda grid: grid.height * grid.width, default=None)


def _list_places(empty: nn.Module, inputs: Tensor) -> list[tuple[int, int]]:
    """Return (height, width) of the output of every convolution that runs."""
    places: list[tuple[int, int]] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        places.append((output.shape[2], output.shape[3]))

    convolutions = [module for module in empty.modules() if isinstance(module, nn.Conv2d)]
    hooks = [module.register_forward_hook(note) for module in convolutions]
    try:
        with seeds.preserved_generators(), torch.no_grad():
            empty.eval()(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return places

"""The layout of a tensor that crosses a cut: where its channels are, by the layers around it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from localpipe.networks.recorded.tape import ModuleCall, Step, Tape, list_leaves

# Layouts by the number of dimensions, with the channels in dimension 1 and in the last one.
_FIRST_LAYOUTS = {2: "d", 3: "ct", 4: "chw"}
_LAST_LAYOUTS = {2: "d", 3: "td", 4: "hwc"}
LAYOUTS = {1: ("d",), 2: ("td", "ct"), 3: ("chw", "hwc")}

_FIRST_LAYERS = (_ConvNd, _NormBase, nn.GroupNorm)
_LAST_LAYERS = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention)
_FIRST_FUNCTIONS = frozenset(
    (
        "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
        "batch_norm", "group_norm", "instance_norm",
    )
)  # fmt: skip
_LAST_FUNCTIONS = frozenset(("linear", "layer_norm", "rms_norm", "multi_head_attention_forward"))


class LayoutFinder:
    """Finds layouts in a tape in which everything but layers is open."""

    def __init__(self, tape: Tape, network: nn.Module) -> None:
        self._tape = tape
        self._network = network
        self._calls: dict[str, list[Step | ModuleCall]] = {}
        _index_calls(tape.calls[0], self._calls)
        self._places: dict[int, int] = {}  # the step that made each tensor
        for place, step in enumerate(tape.steps):
            for number in step.makes:
                self._places[number] = place

    def find(self, key: str) -> str:
        """Return the layout of the tensor that a call made, or "" where it is not known.

        key: of a cut, as `layer1.0#2/0`, the first output of the second call.
        """
        number = self._find_number(key)
        if number is None:
            return ""
        dimensions = len(self._tape.tensors[number].shape)
        if dimensions == 2:
            return "d"
        channels, is_sure = self._follow_forward(number)
        if not is_sure:
            before = self._follow_back(number)
            channels = channels if before is None else before
        if channels == 1:
            return _FIRST_LAYOUTS.get(dimensions, "")
        if channels == dimensions - 1:
            return _LAST_LAYOUTS.get(dimensions, "")
        return ""

    def _find_number(self, key: str) -> int | None:
        """Return the number on this tape of the tensor with a key."""
        name, _, rest = key.rpartition("#")
        occurrence, _, output = rest.partition("/")
        calls = self._calls.get(name, [])
        if int(occurrence) > len(calls):
            return None
        call = calls[int(occurrence) - 1]
        numbers = call.outputs if isinstance(call, ModuleCall) else call.makes
        if int(output) >= len(numbers):
            return None
        return numbers[int(output)]

    def _follow_forward(self, number: int) -> tuple[int | None, bool]:
        """Return the channels' dimension, by the first layer with weights that reads a tensor.

        Between the tensor and the layer stand functions, through which the dimension is followed
        back. It is None where no layer tells it. It is not sure where a linear layer reads another
        dimension than the last one, because it may mix tokens.
        """
        last = len(self._shape(number)) - 1
        sources: dict[int, tuple[int, Step]] = {}
        reached = {number}
        begin = self._places.get(number, -1) + 1
        for step in self._tape.steps[begin:]:
            read = [source for source in step.reads if source in reached]
            if not read:
                continue
            channels = self._channels_read(step, read[0])
            if channels is not None:
                found = self._trace_back(channels, read[0], number, sources)
                if found is not None:
                    return found, found == last or not self._is_linear(step)
                if step.module is not None:
                    # Another layout begins after a layer with weights.
                    continue
            for made in step.makes:
                if made not in reached:
                    reached.add(made)
                    sources[made] = (read[0], step)
        return None, False

    def _trace_back(
        self, channels: int, number: int, target: int, sources: Mapping[int, tuple[int, Step]]
    ) -> int | None:
        """Return the dimension of `target` that becomes dimension `channels` of `number`."""
        current: int | None = channels
        while number != target and current is not None:
            source, step = sources[number]
            dimensions = _map_dimensions(step, self._shape(source), self._shape(number))
            current = dimensions[current] if dimensions is not None else None
            number = source
        return current

    def _follow_back(self, number: int) -> int | None:
        """Return the channels' dimension, by the last layer with weights before a tensor."""
        channels_of: dict[int, int] = {}
        for step in self._tape.steps[: self._places.get(number, -1) + 1]:
            for made in step.makes:
                kind = self._channels_read(step, made)
                if kind is not None:
                    channels_of[made] = kind
                    continue
                for source in step.reads:
                    known = channels_of.get(source)
                    if known is None:
                        continue
                    dimensions = _map_dimensions(step, self._shape(source), self._shape(made))
                    if dimensions is not None and known in dimensions:
                        channels_of[made] = dimensions.index(known)
                        break
        return channels_of.get(number)

    def _channels_read(self, step: Step, number: int) -> int | None:
        """Return the channels' dimension of a tensor that a layer with weights reads or makes."""
        if step.module is not None:
            module = self._network.get_submodule(step.module)
            is_first = isinstance(module, _FIRST_LAYERS)
            is_last = isinstance(module, _LAST_LAYERS)
        else:
            name = getattr(step.function, "__name__", "")
            is_first, is_last = name in _FIRST_FUNCTIONS, name in _LAST_FUNCTIONS
        if is_first:
            return 1
        if is_last:
            return len(self._shape(number)) - 1
        return None

    def _is_linear(self, step: Step) -> bool:
        if step.module is None:
            return getattr(step.function, "__name__", "") == "linear"
        return isinstance(self._network.get_submodule(step.module), nn.Linear)

    def _shape(self, number: int) -> tuple[Any, ...]:
        return self._tape.tensors[number].shape


def _index_calls(call: ModuleCall, calls: dict[str, list[Step | ModuleCall]]) -> None:
    """Add all calls inside a call, by their names, in the order in which they began."""
    for item in call.items:
        calls.setdefault(item.name, []).append(item)
        if isinstance(item, ModuleCall):
            _index_calls(item, calls)


# Functions whose output has the same numbers in the same order, and another shape.
_RESHAPES = frozenset(
    (
        "reshape",
        "view",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "contiguous",
        "_unsafe_view",
    )
)
_REDUCTIONS = frozenset(("mean", "sum", "amax", "amin", "logsumexp", "std", "var"))


def _map_dimensions(
    step: Step, source: tuple[int, ...], made: tuple[int, ...]
) -> list[int | None] | None:
    """Return for every dimension that a step makes the one of its source, None where unknown."""
    name = getattr(step.function, "__name__", "")
    order = _find_permutation(step, name, len(source))
    if order is not None and len(made) == len(source):
        return list(order)
    if name in _RESHAPES and source != made:
        return [_match(place, made, source) for place in range(len(made))]
    if len(made) == len(source):
        return list(range(len(made)))  # a sum, a shift, a padding
    if name in _REDUCTIONS:
        removed = {value % len(source) for value in _list_ints(step)}
        kept = [place for place in range(len(source)) if place not in removed]
        return list(kept) if len(kept) == len(made) else None
    return None


def _match(dimension: int, shape: tuple[int, ...], other: tuple[int, ...]) -> int | None:
    """Return the dimension of another shape with the same size and as many numbers after it."""
    after = math.prod(shape[dimension + 1 :])
    for place, size in enumerate(other):
        if size == shape[dimension] and math.prod(other[place + 1 :]) == after:
            return place
    return None


def _find_permutation(step: Step, name: str, dimensions: int) -> list[int] | None:
    """Return the order of dimensions of a step that permutes them, else None."""
    values = [value % dimensions for value in _list_ints(step)]
    order = list(range(dimensions))
    if name == "permute":
        return values
    if name in ("transpose", "swapaxes", "swapdims", "transpose_") and len(values) == 2:
        first, second = values
        order[first], order[second] = second, first
        return order
    if name == "movedim" and len(values) == 2:
        order.remove(values[0])
        order.insert(values[1], values[0])
        return order
    return None


def _list_ints(step: Step) -> list[int]:
    """Return the ints among the arguments of a call, in order."""
    return [leaf for leaf in list_leaves((step.args, step.kwargs)) if type(leaf) is int]

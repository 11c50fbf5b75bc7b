"""The values of a tensor that depends on sizes alone, such as positions or a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from localpipe.networks.recorded.tape import (
    Reference,
    StateReference,
    Step,
    is_meta_device,
    map_tree,
)


class _UnknownError(Exception):
    """A value that is not known without running the network."""


def compute_value(steps: Sequence[Step], number: int) -> Tensor | None:
    """Return a numbered tensor with its values, on the CPU, or None if they are not known.

    steps: those recorded so far. The tensor may not depend on inputs, parameters or random draws.
    It is not known either where a module, a buffer or a write in place takes part.
    """
    makers = {made: step for step in steps for made in step.makes}
    values: dict[int, Any] = {}
    try:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            _compute(makers, number, values)
    except _UnknownError:
        return None
    value = values[number]
    return value if isinstance(value, Tensor) else None


def _compute(makers: dict[int, Step], number: int, values: dict[int, Any]) -> None:
    """Put the value of a tensor, and of those that it depends on, into `values`."""
    if number in values:
        return
    step = makers.get(number)
    if step is None or step.function is None or step.writes or step.shadows:
        raise _UnknownError

    def resolve(leaf: Any) -> Any:
        if isinstance(leaf, Reference):
            _compute(makers, leaf.number, values)
            return values[leaf.number]
        if isinstance(leaf, StateReference) or (isinstance(leaf, Tensor) and leaf.is_meta):
            raise _UnknownError
        if is_meta_device(leaf):
            return torch.device("cpu")
        return leaf

    args, kwargs = map_tree(resolve, step.args), map_tree(resolve, step.kwargs)
    with torch.device("cpu"):
        output = step.function(*args, **kwargs)
    made = [output] if isinstance(output, Tensor) else list(output)
    values.update(zip(step.outputs, made, strict=True))

"""The order of a tensor's dimensions in memory, as a device's kernels choose it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_CONVOLUTIONS = frozenset(
    (torch.conv2d, torch.conv3d, torch.conv_transpose2d, torch.conv_transpose3d)
)


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """Return the order in memory of the dimensions after the first, () where it is their own.

    It lists them from the outermost to the innermost. The first dimension, the batch, is left out
    wherever it stands in memory: a sender's copy makes it the outermost one. Strides decide for
    dimensions of one place too, because kernels choose a memory format by them.
    """
    strides = tensor.stride()[1:]
    order = tuple(sorted(range(len(strides)), key=lambda at: -strides[at]))
    if order == tuple(range(len(order))):
        return ()
    return order


def has_channels_last(tensor: Tensor) -> bool:
    """Whether kernels take a tensor of four or five dimensions for one with channels innermost.

    They look at strides alone, in dimensions of one place too.
    """
    sizes, strides = tensor.shape, tensor.stride()
    if tensor.dim() not in (4, 5) or strides[1] == 0:
        return False
    smallest = 0
    for at in (1, *range(tensor.dim() - 1, 1, -1), 0):
        if sizes[at] == 0 or strides[at] < smallest:
            return False
        if at == 0 and smallest == strides[1]:
            return False  # the strides say nothing, so the tensor counts as contiguous
        smallest = strides[at] * sizes[at]
    return True


def keep_channels_last(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> Any:
    """Return the output of a function of the meta device with the strides that kernels give it.

    A convolution keeps channels innermost that are so in its input or its weight. On the meta
    device it does not. The output of any other function stays as it is.
    """
    if function not in _CONVOLUTIONS or not isinstance(output, Tensor):
        return output
    tensors = [args[0] if args else kwargs["input"], *args[1:2]]
    with torch._C.DisableTorchFunction():
        if has_channels_last(output) or not any(map(has_channels_last, tensors)):
            return output
        # From the innermost dimension to the outermost one.
        strides = [1] * output.dim()
        count = 1
        for at in (1, *range(output.dim() - 1, 1, -1), 0):
            strides[at] = count
            count *= output.shape[at]
        return output.as_strided(output.shape, strides)

"""What a recording changes in a network for its time, and puts back after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def prepared(network: nn.Module) -> Iterator[None]:
    """Enter a context in which a network runs on the meta device. Its modes may be changed there.

    Tensors that modules hold as plain attributes are on the meta device. A batch normalisation
    with momentum=None has a momentum, because the number of its batches has no value.
    """
    modes = {module: module.training for module in network.modules()}
    tensors: list[tuple[nn.Module, str, Tensor]] = []
    layers = []
    for module in network.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_meta:
                tensors.append((module, name, value))
        if isinstance(module, _BatchNorm) and module.momentum is None:
            layers.append(module)

    for module, name, value in tensors:
        vars(module)[name] = value.to("meta")
    for layer in layers:
        layer.momentum = 0.1
    try:
        yield
    finally:
        for module, name, value in tensors:
            vars(module)[name] = value
        for layer in layers:
            layer.momentum = None
        for module, is_training in modes.items():
            module.training = is_training


@contextmanager
def preserved_attributes(network: nn.Module) -> Iterator[None]:
    """Enter a context that ends with the attributes of all modules as they were.

    A module may keep a tensor for its next call. Every recording is the first call.
    """
    attributes = {module: dict(vars(module)) for module in network.modules()}
    try:
        yield
    finally:
        for module, values in attributes.items():
            vars(module).clear()
            vars(module).update(values)

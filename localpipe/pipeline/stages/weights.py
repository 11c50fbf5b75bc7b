"""The weights of a stage: names in the whole network, loading, checks and digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from localpipe.errors import RunError
from localpipe.fields import dtype_name


def collect_weights(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    """Return the parameters and buffers of (prefix, module) pairs, each name after its prefix.

    The tensors are the modules' own, detached and not copied, in the order of their state_dicts. Of
    two equal names the later one counts.
    """
    weights = {}
    for prefix, module in modules:
        for name, tensor in module.state_dict().items():
            weights[prefix + name] = tensor
    return weights


def find_matching_names(weights: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> set[str]:
    """Return the names of the weights that `source` has with the same shape. dtypes may differ."""
    names = set()
    for name, tensor in weights.items():
        if name in source and source[name].shape == tensor.shape:
            names.add(name)
    return names


def copy_weights(weights: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copy every tensor of `source` into the weight of the same name, converted to its dtype.

    Raises KeyError for a name that `weights` lacks, and RuntimeError for a shape that does not fit.
    """
    with torch.no_grad():
        for name, tensor in source.items():
            weights[name].copy_(tensor)


def check_same_weights(
    stage: int, weights: Mapping[str, Tensor], checkpoint: Mapping[str, Tensor]
) -> None:
    """Raise RunError unless a checkpoint has exactly the names and shapes of a stage's weights.

    stage: for the error. dtypes may differ.
    """
    names = sorted(weights.keys() ^ checkpoint.keys())
    if names:
        raise RunError(f"stage {stage}: the checkpoint has other weights: {', '.join(names[:3])}")
    for name, tensor in weights.items():
        shape = tuple(checkpoint[name].shape)
        expected = tuple(tensor.shape)
        if shape != expected:
            raise RunError(
                f"stage {stage}: {name} is {shape} in the checkpoint, expected {expected}"
            )


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Raise RunError with the name of the first weight, in order, that is not finite.

    Integers are skipped. The host waits for a device.
    """
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise RunError(
                f"{name} is no longer finite; "
                "start a new run with a lower optim.lr, or look at the data"
            )


def weight_lines(weights: Mapping[str, Tensor]) -> list[str]:
    """Return `name dtype shape sha256` of every tensor, of its contiguous little-endian bytes.

    The lines have the order of the mapping, the shape is a list, the dtype has no `torch.`.
    """
    lines = []
    for name, tensor in weights.items():
        data = tensor.detach().cpu().contiguous()
        content = data.reshape(-1).view(torch.uint8).numpy().tobytes()
        digest = hashlib.sha256(content).hexdigest()
        lines.append(f"{name} {dtype_name(data.dtype)} {list(data.shape)} {digest}")
    return lines


def weights_digest(lines: Iterable[str]) -> str:
    """Return the SHA-256 of the lines in byte order, each with a newline at its end.

    64 hexadecimal digits. The order of the lines does not matter.
    """
    digest = hashlib.sha256()
    for line in sorted(line.encode() for line in lines):
        digest.update(line + b"\n")
    return digest.hexdigest()

"""A file of weights: reading it, finding the state_dict inside, and matching it to a network."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from localpipe.errors import UserError, first_line
from localpipe.fields import dtype_name
from localpipe.networks.blueprint import Blueprint

SUFFIXES = (".pt", ".pth", ".safetensors")
# Training scripts save a state_dict under one of these keys, beside an optimizer or an epoch.
_WRAPPERS = ("state_dict", "model")
# Data-parallel wrappers of torch put this before every name.
_PREFIX = "module."
_SHOWN = 3  # names of an error


@dataclass(frozen=True)
class WeightsFile:
    """The content of a file: tensors by name on the CPU, and the SHA-256 of its bytes.

    tensors: those of the state_dict inside, without wrappers and without the prefix `module.`.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    sha256: str


@dataclass(frozen=True)
class Match:
    """How a file fits a network. All blocks have their weights.

    taken: the names whose values are taken. total: how many the network has. initialised: names of
    the network that stay as they are initialised. unused: names that the file alone has.
    """

    taken: frozenset[str]
    total: int
    initialised: tuple[str, ...]
    unused: tuple[str, ...]


def read_weights(path: Path) -> WeightsFile:
    """Read a file with a state_dict: .pt or .pth by torch, .safetensors.

    Nothing is unpickled but tensors. The mappings `state_dict` and `model` are looked through, and
    a prefix `module.` of all names is dropped. Raises UserError for a file that cannot be read, and
    for one without a state_dict.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"model: cannot read model.weights {path}: {error.strerror}; "
            "give a .pt or .safetensors file with a state_dict"
        ) from None
    tensors = unwrap_state_dict(_decode(path, content))
    if tensors is None:
        raise UserError(
            f"model: model.weights {path} holds no state_dict; expected tensors by name, alone or "
            f"under {' or '.join(_WRAPPERS)}; write one by torch.save(network.state_dict(), FILE)"
        )
    return WeightsFile(path, tensors, hashlib.sha256(content).hexdigest())


def _decode(path: Path, content: bytes) -> Any:
    """Return what the bytes of a file hold. Raise UserError for anything but tensors."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(content)
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # torch's own text advises to load it unsafely.
        reason = "it is damaged, or holds other objects than tensors"
    except Exception as error:  # the readers raise errors of many kinds for foreign bytes
        reason = f"it is damaged: {first_line(error).rstrip('.')}"
    raise UserError(
        f"model: cannot read model.weights {path}: {reason}; "
        "write it by torch.save(network.state_dict(), FILE)"
    )


def unwrap_state_dict(content: Any) -> dict[str, Tensor] | None:
    """Return the state_dict inside the content of a file, or None if there is none.

    Every value is a tensor, and every name a text. The tensors are not copied.
    """
    while isinstance(content, Mapping) and not any(map(torch.is_tensor, content.values())):
        inner = [content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
        if not inner:
            return None
        content = inner[0]
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        return None
    if not all(map(torch.is_tensor, content.values())):
        return None
    tensors = dict(content)
    while all(name.startswith(_PREFIX) for name in tensors):
        tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    return tensors


def match_weights(blueprint: Blueprint, weights: WeightsFile) -> Match:
    """Return how a file fits a network.

    Every parameter and buffer of a block must be in the file, with its shape. Counts, which are
    integer buffers, may be missing. Tensors of the tail are taken where they fit. Raises UserError
    with the first three names that are missing, of another shape or kind of numbers, not finite, or
    of no part of the network.
    """
    *blocks, tail = blueprint.state
    required: dict[str, Tensor] = {}
    for state in blocks:
        required.update(state)
    tail = {name: tensor for name, tensor in tail.items() if name not in required}

    # The tail is taken where it fits. Another head may have other names below the same modules.
    fitting = {}
    for name, tensor in tail.items():
        if name in weights.tensors and weights.tensors[name].shape == tensor.shape:
            fitting[name] = tensor
    roots = {name.partition(".")[0] for name in tail}
    roots -= {name.partition(".")[0] for name in required}

    # What is taken must fit. Old files have no counts.
    problems = []
    taken = set()
    for name, tensor in {**required, **fitting}.items():
        found = weights.tensors.get(name)
        problem = _find_misfit(found, tensor)
        if problem is not None:
            problems.append(f"{name} {problem}")
        elif found is not None:
            taken.add(name)
    unused = []
    for name in weights.tensors:
        if name in required or name in tail:
            continue
        if name.partition(".")[0] in roots:
            unused.append(name)
        else:
            problems.append(f"{name} is unknown")
    if problems:
        raise _misfit(blueprint, weights, problems)

    names = {**required, **tail}
    initialised = tuple(name for name in names if name not in taken)
    return Match(frozenset(taken), len(names), initialised, tuple(unused))


def _find_misfit(found: Tensor | None, tensor: Tensor) -> str | None:
    """Return what is wrong with a file's tensor, or with its absence; None where it fits.

    tensor: the network's own, without values.
    """
    if found is None:
        return "is missing" if tensor.is_floating_point() else None
    if found.shape != tensor.shape:
        return f"has the shape {list(found.shape)}, expected {list(tensor.shape)}"
    if found.is_floating_point() != tensor.is_floating_point():
        return f"holds {dtype_name(found.dtype)} numbers, expected {dtype_name(tensor.dtype)}"
    if found.is_floating_point() and not found.isfinite().all():
        return "is not finite"
    return None


def _misfit(blueprint: Blueprint, weights: WeightsFile, problems: list[str]) -> UserError:
    shown = ", ".join(problems[:_SHOWN])
    if len(problems) > _SHOWN:
        shown += f", and {len(problems) - _SHOWN} more"
    return UserError(
        f"model: model.weights {weights.path} does not fit {blueprint.name}: {shown}; expected a "
        "state_dict of this network, in which only the head may differ; "
        "give its file, or change model.name or model.args"
    )

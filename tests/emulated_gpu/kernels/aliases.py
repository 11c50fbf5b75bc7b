"""Tensors on other devices in place of CUDA tensors: the same bytes, or no bytes at all."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor


def is_cuda(value: object) -> bool:
    """Return whether a value is a tensor on an emulated GPU."""
    return isinstance(value, Tensor) and value.is_cuda


def alias(tensor: Tensor) -> Tensor:
    """Return a CPU tensor over the same bytes as a CUDA tensor."""
    storage = tensor.untyped_storage()
    nbytes, address = storage.nbytes(), storage.data_ptr()
    if nbytes == 0 or address == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    buffer = (ctypes.c_uint8 * nbytes).from_address(address)
    same_bytes = torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()
    result = torch.empty(0, dtype=tensor.dtype)
    result.set_(same_bytes, tensor.storage_offset(), tensor.shape, tensor.stride())
    return result.conj() if tensor.is_conj() else result


def to_cpu(value: Any) -> Any:
    """Return an argument of an operation for its CPU function."""
    if isinstance(value, Tensor):
        return alias(value) if value.is_cuda else value
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value


def to_meta(value: Any) -> Any:
    """Return an argument of an operation for its meta function, which gives shapes alone."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("meta")
    return value


def shape_key(value: Any) -> object:
    """Return what the shapes of an operation's results depend on, of one argument."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if value is None or isinstance(value, int | float | bool | str):
        return type(value), value
    return repr(value)


def device_of(values: list[Any]) -> torch.device:
    """Return the emulated GPU that an operation runs on: of its tensors, or the current one."""
    for value in values:
        if is_cuda(value):
            device: torch.device = value.device
            return device
    for value in values:
        if isinstance(value, torch.device) and value.type == "cuda":
            return value
    return torch.device("cuda", torch.cuda.current_device())

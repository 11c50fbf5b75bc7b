"""One item of a user's Dataset as two arrays, an input and a target. Runs in loader processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localpipe.data.user.wire import ArrayFormat

Item = tuple[NDArray[Any], NDArray[Any]]
_TARGET_KEYS = ("label", "labels")
_CHANNELS = (1, 3, 4)  # of an array that may lie as (H, W, C)


class BadItemError(Exception):
    """An item that cannot be trained on. The text goes on after `item 3 of train`."""


@dataclass(frozen=True)
class ItemFormat:
    """What every item is: the format of its input and of its target.

    Inputs are uint8, float32 or int64, targets int64, float32, or uint8 for masks.
    """

    input: ArrayFormat
    target: ArrayFormat

    @staticmethod
    def of(item: Item) -> ItemFormat:
        """Return the format of one item. Raises BadItemError for an input of no known kind."""
        given, target = item
        if given.dtype == np.uint8:
            _check_image(given.shape)
        return ItemFormat(
            ArrayFormat(given.shape, given.dtype.name), ArrayFormat(target.shape, target.dtype.name)
        )

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> ItemFormat:
        """Return the format that `to_json` wrote."""
        shape, dtype, target_shape, target_dtype = (content[key] for key in _KEYS)
        return ItemFormat(
            ArrayFormat(tuple(shape), dtype), ArrayFormat(tuple(target_shape), target_dtype)
        )

    def to_json(self) -> dict[str, Any]:
        """Return the format as JSON can hold it."""
        values = (self.input.shape, self.input.dtype, self.target.shape, self.target.dtype)
        return dict(zip(_KEYS, values, strict=True))

    def check(self, item: Item) -> None:
        """Raise BadItemError if an item has another format."""
        parts = (("an input", item[0], self.input), ("a target", item[1], self.target))
        for name, array, form in parts:
            if array.dtype.name != form.dtype:
                raise BadItemError(
                    f"has {name} of {array.dtype.name}, expected {form.dtype} as item 0 of train; "
                    "give every item the same dtype"
                )
            if array.shape != form.shape:
                raise BadItemError(
                    f"has {name} of shape {array.shape}, expected {form.shape} as item 0 of train; "
                    "give every item the same shape, as by a crop or by padding"
                )


# Probabilities of float16 or with few decimals sum to 1 within this.
_TOLERANCE = 1e-3
_KEYS = ("shape", "dtype", "target_shape", "target_dtype")


def convert_item(item: Any) -> Item:
    """Return (input, target) of what a Dataset gave, as arrays on the CPU that may share memory.

    item: a pair, or a mapping with one target and one other tensor. Inputs become uint8, float32 or
    int64. Targets become int64 or float32, a single float of shape (1,). Masks of bytes stay uint8.
    Raises BadItemError for anything else.
    """
    given, target = _split_item(item)
    inputs = _to_array(given, "an input")
    if inputs.dtype.kind == "b":
        inputs = inputs.astype(np.float32)
    targets = _to_array(target, "a target")
    is_mask_of_bytes = targets.ndim == 2 and targets.dtype == np.uint8
    if targets.dtype.kind in "biu" and not is_mask_of_bytes:
        targets = targets.astype(np.int64)
    if targets.dtype.kind == "f":
        targets = np.atleast_1d(targets)
    return _unify(inputs, "an input"), _unify(targets, "a target")


def check_values(item: Item, classes: int | None, vocabulary: int | None) -> None:
    """Raise BadItemError for a class index or a token of an item that is out of range.

    classes, vocabulary: their numbers, None where they are not known. Other values are not checked.
    """
    given, target = item
    if given.dtype == np.int64 and vocabulary is not None:
        _check_range(given, vocabulary, "token", "set data.vocabulary to the number of tokens")
    if target.dtype == np.int64 and target.ndim == 0:
        advice = "number classes from 0, and let classes or model.num_classes be their number"
        _check_range(target, classes, "label", advice)


def check_mask(item: Item, classes: int, ignored: int | None) -> None:
    """Raise BadItemError for a pixel of a mask that is no class and not `ignored`."""
    _, target = item
    if ignored is not None:
        target = target[target != ignored]
    advice = "number classes from 0, and let task.ignore_index be that of pixels without a class"
    _check_range(target, classes, "pixel", advice)


def check_probabilities(item: Item) -> None:
    """Raise BadItemError for a target that is not a probability of every class."""
    _, target = item
    total = target.sum(dtype=np.float64)
    # Written so that a NaN is refused.
    if (target >= 0).all() and abs(total - 1) <= _TOLERANCE:
        return
    raise BadItemError(
        f"has a target from {target.min():g} that sums to {total:g}, expected probabilities, "
        "numbers of at least 0 that sum to 1; normalise it, or set task.name=regression"
    )


def _check_range(array: NDArray[Any], limit: int | None, what: str, advice: str) -> None:
    """Raise BadItemError if integers are not in 0 .. limit - 1, or negative without a limit."""
    if array.size == 0:
        return
    low, high = int(array.min()), int(array.max())
    if low >= 0 and (limit is None or high < limit):
        return
    value = low if low < 0 else high
    expected = "at least 0" if limit is None else f"0 to {limit - 1}"
    raise BadItemError(f"has the {what} {value}, expected {expected}; {advice}")


def _split_item(item: Any) -> tuple[Any, Any]:
    """Return the input and the target of an item."""
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    if not isinstance(item, Mapping):
        found = type(item).__name__
        if isinstance(item, tuple | list):
            found = f"{found} of {len(item)} values"
        raise BadItemError(f"is a {found}; expected (input, target), or a dict with label")
    targets = [key for key in _TARGET_KEYS if key in item]
    inputs = [key for key, value in item.items() if key not in targets and _is_tensor(value)]
    if len(targets) != 1 or len(inputs) != 1:
        names = ", ".join(str(key) for key in item)
        raise BadItemError(
            f"is a dict of {names}; expected label or labels, which is the target, and one other "
            "tensor, the input"
        )
    return item[inputs[0]], item[targets[0]]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _to_array(value: Any, what: str) -> NDArray[Any]:
    """Return a tensor, an array or a number as an array. what: `an input` or `a target`."""
    if isinstance(value, Tensor):
        return _tensor_to_array(value, what)
    if isinstance(value, np.ndarray | np.generic | bool | int | float):
        return np.asarray(value)
    kind = type(value)
    advice = "convert it to a tensor"
    if kind.__module__.startswith("PIL."):
        advice = "convert it, as by torchvision.transforms.v2.functional.pil_to_tensor"
    raise BadItemError(
        f"has {what} of class {kind.__module__}.{kind.__qualname__}, expected a tensor, an array "
        f"or a number; {advice}"
    )


def _tensor_to_array(value: Tensor, what: str) -> NDArray[Any]:
    if value.device.type != "cpu":
        raise BadItemError(
            f"has {what} on device {value.device}, expected cpu; localpipe moves whole batches, "
            "so leave tensors on the CPU"
        )
    if value.layout != torch.strided:
        raise BadItemError(f"has {what} of {value.layout}, expected a dense tensor")
    tensor = value.detach().as_subclass(Tensor)
    if tensor.is_floating_point():
        tensor = tensor.float()
    array: NDArray[Any] = tensor.resolve_conj().numpy()
    return array


def _unify(array: NDArray[Any], what: str) -> NDArray[Any]:
    """Return an array with one dtype a kind: uint8, int64 or float32."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind in "iu":
        return array.astype(np.int64, copy=False)
    if array.dtype.kind == "f":
        return array.astype(np.float32, copy=False)
    raise BadItemError(f"has {what} of {array.dtype}, expected real numbers")


def _check_image(shape: tuple[int, ...]) -> None:
    """Raise BadItemError for bytes that are no image (C, H, W)."""
    if len(shape) != 3:
        raise BadItemError(
            f"has a uint8 input of shape {shape}, expected an image (C, H, W); add the dimension "
            "of its channels, or convert other inputs to float32 or int64"
        )
    if shape[2] in _CHANNELS and shape[0] not in _CHANNELS:
        raise BadItemError(
            f"has a uint8 input of shape {shape}, which looks like (H, W, C); give images as "
            "(C, H, W)"
        )

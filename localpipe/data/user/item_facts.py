"""What follows from the items of a user's Dataset: its task, its outputs, names of its classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from localpipe.config.keys import Data
from localpipe.data.images import configured_size
from localpipe.data.user.items import ItemFormat
from localpipe.errors import UserError


def check_configured(config: Data, form: ItemFormat) -> None:
    """Raise UserError for keys that do not go with the items."""
    shape = form.input.shape
    if form.input.dtype == "int64" and config.vocabulary is None:
        raise UserError(
            f"data: {config.name} has integers of shape {shape} as inputs, which are tokens; set "
            "data.vocabulary to the number of tokens, or convert other inputs to float32"
        )
    if form.input.dtype != "uint8":
        return
    size = configured_size(config)
    if size not in (None, shape[1:]):
        raise UserError(
            f"data: data.image_size is {config.image_size}, but the images of {config.name} are "
            f"{shape[1]} x {shape[2]}; set it to auto"
        )


def find_classes(
    config: Data, found: Sequence[str] | int | None
) -> tuple[tuple[str, ...] | None, int | None]:
    """Return the names of the classes and their number, None for what is not known.

    found: what the user's function says. Names in data.classes name classes that have no names.
    Raises UserError where both have names, and other ones.
    """
    names = tuple(found) if isinstance(found, Sequence) else None
    count = found if isinstance(found, int) else None
    if names is not None:
        count = len(names)
    given = config.classes
    if not isinstance(given, tuple) or given == names:
        return names, count
    if names is not None or count not in (None, len(given)):
        described = f"classes {list(names)}" if names else f"{count} classes"
        raise UserError(
            f"data: data.classes has the names {list(given)}, but {config.name} has {described}; "
            "leave data.classes out"
        )
    return given, len(given)


def find_task(
    config: Data,
    form: ItemFormat,
    classes: int | None,
    labels: Mapping[str, Tensor],
) -> tuple[str, int]:
    """Return the task that task.name `auto` stands for, and the outputs of the network.

    The task is "" where the shapes do not say it, and the outputs are 0 where they are not known.
    classes: their number, or None. labels: of the splits where they are known.
    """
    shape, target = form.input.shape, form.target.shape
    outputs = classes or 0
    if form.target.dtype == "float32":
        if len(target) == 1:
            return "regression", target[0]
        return "", outputs
    if target == ():
        if not outputs and "train" in labels:
            outputs = 1 + max(int(known.max()) for known in labels.values())
        return "classification", outputs
    is_tokens = form.input.dtype == "int64" and len(shape) == 1
    if is_tokens and target == shape:
        return "next_token", config.vocabulary or 0
    if len(shape) == 3 and target == shape[1:]:
        return "segmentation", outputs
    return "", outputs

"""The forms of `model.name`: a shipped network, a library's, or a user's own code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localpipe.errors import UserError

# `torchvision:NAME`, `timm:NAME` and `transformers:FILE.json`. The libraries are trusted.
LIBRARIES = ("torchvision", "timm", "transformers")
# torchvision's networks that are shipped: the same layers, names of weights and initial weights.
_SHIPPED = frozenset(
    ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext101_32x8d"]
)


def split_library(name: str) -> tuple[str, str] | None:
    """Return (library, its name of the network) of a `model.name`, or None for another form."""
    library, colon, network = name.partition(":")
    if colon and library in LIBRARIES:
        return library, network
    return None


def find_shipped_name(name: str, args: Mapping[str, Any]) -> str:
    """Return the shipped network that torchvision's name stands for, else the name itself.

    args: `model.args`. With arguments of torchvision's own, the network is torchvision's.
    """
    library = split_library(name)
    if library is None or args:
        return name
    if library[0] == "torchvision" and library[1] in _SHIPPED:
        return library[1]
    return name


def complete_arguments(name: str, args: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `model.args` with the content of the file that a `transformers:FILE.json` names.

    Arguments that are given replace those of the file. Once `architectures` is among them, the file
    is not read again, so that a run needs it no more. Raises UserError for a file that cannot be
    read or is no JSON mapping.
    """
    library = split_library(name)
    if library is None or library[0] != "transformers" or "architectures" in args:
        return args
    path = Path(os.path.expanduser(library[1]))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"model: cannot read {path} of model.name {name}: {error.strerror}; expected the "
            "config.json of a network of transformers"
        ) from None
    except ValueError as error:
        raise UserError(f"model: {path} of model.name {name} is no JSON: {error}") from None
    if not isinstance(content, dict) or not content.get("architectures"):
        raise UserError(
            f"model: {path} of model.name {name} names no class; expected a mapping with "
            "`architectures`, a list whose first name is the class"
        )
    return {**content, **args}

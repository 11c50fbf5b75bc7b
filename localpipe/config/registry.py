"""Names to classes, imported only when they are named: a new method is one file and one line here."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from localpipe.config.user_code import import_named, is_user_code
from localpipe.errors import UserError, suggest

OBJECTIVES: Mapping[str, str] = {
    "greedy": "localpipe.methods.greedy:Greedy",
    "dgl": "localpipe.methods.dgl:DGL",
    "predsim": "localpipe.methods.predsim:PredSim",
    "infopro": "localpipe.methods.infopro:InfoPro",
    "auglocal": "localpipe.methods.auglocal:AugLocal",
}
# The networks whose published recipes are ImageNet's.
IMAGENET = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext101_32x8d")
MODELS: Mapping[str, str] = {
    **{
        f"resnet{depth}": "localpipe.networks.resnet_cifar:resnet_cifar_blueprint"
        for depth in (8, 14, 20, 32, 44, 56, 110)
    },
    **dict.fromkeys(IMAGENET, "localpipe.networks.resnet_imagenet:resnet_imagenet_blueprint"),
    **{f"vit_{size}": "localpipe.networks.vit:vit_blueprint" for size in ("tiny", "small", "base")},
    "chain": "localpipe.networks.chain:chain_blueprint",
}
DATASETS: Mapping[str, str] = {
    "digits": "localpipe.data.digits:load_digits",
    "npz": "localpipe.data.npz:load_npz",
    "cifar10": "localpipe.data.torchvision_sets:load_torchvision",
    "cifar100": "localpipe.data.torchvision_sets:load_torchvision",
    "svhn": "localpipe.data.torchvision_sets:load_torchvision",
    "stl10": "localpipe.data.torchvision_sets:load_torchvision",
    "imagenet": "localpipe.data.image_folder:load_imagenet",
    "image_folder": "localpipe.data.image_folder:load_image_folder",
    "synthetic": "localpipe.data.synthetic:load_synthetic",
}
# `method: NAME` expands to a point on the three axes.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"objective": {"name": "greedy"}},
    "dgl": {"objective": {"name": "dgl"}},
    "predsim": {"objective": {"name": "predsim"}},
    "infopro": {"objective": {"name": "infopro", "task": "contrast"}},
    "auglocal": {"objective": {"name": "auglocal"}},
    "contsup": {"objective": {"name": "dgl", "head": "1c2f"}, "context": {"mode": "R1E"}},
    "sgr": {"objective": {"name": "dgl"}, "reconcile": {"distance": "cosine"}},
}


def look_up(table: Mapping[str, str], name: str, where: str) -> Any:
    """Import and return what `name` stands for in `table`; raise UserError with the nearest name otherwise."""
    if name not in table:
        raise UserError(f"{where} has no {name!r}; {suggest(name, table)}")
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def find_objective_class(name: str, where: str) -> Any:
    """Return the class of an objective: the registry's, or a user's own `package.module:Class`."""
    if not is_user_code(name):
        return look_up(OBJECTIVES, name, where)
    cls = import_named(name, "method.objective.name")
    if not dataclasses.is_dataclass(getattr(cls, "Options", None)) or not hasattr(cls, "exit"):
        raise UserError(
            f"objective: {name} is no local loss; expected a subclass of localpipe.LocalLoss with Options, a frozen "
            "dataclass, and exit"
        )
    return cls

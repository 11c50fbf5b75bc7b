"""The tables of names: every name that a user may write, and the code that it stands for.

One file and one line in a table add an objective, a network, a data set, a task, an optimizer, a
back end, a benchmark system or a command. Code is imported when its name is looked up.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from localpipe.config.user_code import import_user_code, is_user_code
from localpipe.errors import UserError, suggest

_CIFAR_RESNET = "localpipe.networks.resnet_cifar:resnet_cifar_blueprint"
_IMAGENET_RESNET = "localpipe.networks.resnet_imagenet:resnet_imagenet_blueprint"
_VGG = "localpipe.networks.papers.vgg:vgg_blueprint"
_VGG_B = "localpipe.networks.papers.vgg_b:vgg_b_blueprint"
_VIT = "localpipe.networks.vit:vit_blueprint"
_TORCHVISION = "localpipe.data.torchvision_sets:load_torchvision"
_USER_DATASET = "localpipe.data.user.user_dataset:load_user_dataset"
_TORCHVISION_TEST = "localpipe.data.torchvision_sets:load_torchvision_test"

# Subclasses of localpipe.LocalLoss.
OBJECTIVES: Mapping[str, str] = {
    "greedy": "localpipe.methods.greedy:Greedy",
    "dgl": "localpipe.methods.dgl:DGL",
    "predsim": "localpipe.methods.predsim:PredSim",
    "infopro": "localpipe.methods.infopro:InfoPro",
    "auglocal": "localpipe.methods.auglocal:AugLocal",
}
# Networks: functions (name, image, num_classes, **arguments) -> Blueprint. A network that takes
# tokens (T,) names its second parameter `tokens`.
MODELS: Mapping[str, str] = {
    "resnet8": _CIFAR_RESNET,
    "resnet14": _CIFAR_RESNET,
    "resnet20": _CIFAR_RESNET,
    "resnet32": _CIFAR_RESNET,
    "resnet44": _CIFAR_RESNET,
    "resnet56": _CIFAR_RESNET,
    "resnet110": _CIFAR_RESNET,
    "resnet18": _IMAGENET_RESNET,
    "resnet34": _IMAGENET_RESNET,
    "resnet50": _IMAGENET_RESNET,
    "resnet101": _IMAGENET_RESNET,
    "resnet152": _IMAGENET_RESNET,
    "resnext101_32x8d": _IMAGENET_RESNET,
    "vgg13_bn": _VGG,
    "vgg19_bn": _VGG,
    "densenet_bc_100_12": "localpipe.networks.papers.densenet:densenet_blueprint",
    "vgg8b": _VGG_B,
    "vgg11b": _VGG_B,
    "mlp": "localpipe.networks.papers.mlp:mlp_blueprint",
    "simple_cnn": "localpipe.networks.papers.simple_cnn:simple_cnn_blueprint",
    "vit_tiny": _VIT,
    "vit_small": _VIT,
    "vit_base": _VIT,
    "gpt": "localpipe.networks.gpt:gpt_blueprint",
    "chain": "localpipe.networks.chain:chain_blueprint",
}
# Data sets: functions of the configuration's `data` section that return the raw images.
DATASETS: Mapping[str, str] = {
    "digits": "localpipe.data.digits:load_digits",
    "npz": "localpipe.data.npz:load_npz",
    "cifar10": _TORCHVISION,
    "cifar100": _TORCHVISION,
    "svhn": _TORCHVISION,
    "stl10": _TORCHVISION,
    "imagenet": "localpipe.data.folders.image_folder:load_imagenet",
    "image_folder": "localpipe.data.folders.image_folder:load_image_folder",
    "cityscapes": "localpipe.data.scenes.cityscapes:load_cityscapes",
    "bytes": "localpipe.data.text.byte_files:load_bytes",
    "tokens": "localpipe.data.text.token_files:load_tokens",
    "synthetic": "localpipe.data.synthetic:load_synthetic",
    "shapes": "localpipe.data.shapes:load_shapes",
    "areas": "localpipe.data.shapes:load_areas",
}
# Functions that read the test images of a data set alone, where that is not a part of all images.
TEST_READERS: Mapping[str, str] = {
    "npz": "localpipe.data.npz:load_npz_test",
    "cifar10": _TORCHVISION_TEST,
    "cifar100": _TORCHVISION_TEST,
    "svhn": _TORCHVISION_TEST,
    "stl10": _TORCHVISION_TEST,
    "imagenet": "localpipe.data.folders.test_folder:load_imagenet_test",
    "image_folder": "localpipe.data.folders.test_folder:load_folder_test",
}
# Classes like tasks.task.Task: the loss, the metric, and what an exit pools.
TASKS: Mapping[str, str] = {
    "classification": "localpipe.tasks.classification:Classification",
    "next_token": "localpipe.tasks.next_token:NextToken",
    "segmentation": "localpipe.tasks.segmentation:Segmentation",
    "regression": "localpipe.tasks.regression:Regression",
}
# OptimizerSpec objects: how a stage's optimizer is built, and which keys of `optim` it reads.
OPTIMIZERS: Mapping[str, str] = {
    "sgd": "localpipe.pipeline.stages.optimizer:SGD",
    "adamw": "localpipe.pipeline.stages.optimizer:ADAMW",
}
# ChannelBackend objects: what carries messages between the processes of neighbouring stages.
BACKENDS: Mapping[str, str] = {
    "gloo": "localpipe.pipeline.channels.gloo:GLOO",
    "nccl": "localpipe.pipeline.channels.nccl:NCCL",
}
# SystemSpec objects, in the order of the benchmark's table.
SYSTEMS: Mapping[str, str] = {
    "localpipe": "localpipe.bench.systems.local:LOCALPIPE",
    "frozen-copies": "localpipe.bench.systems.local:FROZEN_COPIES",
    "sequential": "localpipe.bench.systems.local:SEQUENTIAL",
    "e2e": "localpipe.bench.systems.plain:E2E",
    "e2e-1": "localpipe.bench.systems.plain:E2E_1",
    "checkpoint": "localpipe.bench.systems.plain:CHECKPOINT",
    "ddp": "localpipe.bench.systems.plain:DDP",
    "gpipe": "localpipe.bench.systems.torch_pipeline:GPIPE",
    "1f1b": "localpipe.bench.systems.torch_pipeline:ONE_F_ONE_B",
    "interleaved": "localpipe.bench.systems.torch_pipeline:INTERLEAVED",
    "zb": "localpipe.bench.systems.torch_pipeline:ZERO_BUBBLE",
}
# Command objects, in the order of `localpipe --help`.
COMMANDS: Mapping[str, str] = {
    "train": "localpipe.cli.train:COMMAND",
    "eval": "localpipe.cli.evaluate:COMMAND",
    "export": "localpipe.cli.export:COMMAND",
    "plan": "localpipe.cli.plan:COMMAND",
    "bench": "localpipe.cli.bench:COMMAND",
    "report": "localpipe.cli.report:COMMAND",
    "compare": "localpipe.cli.compare:COMMAND",
    "doctor": "localpipe.cli.doctor:COMMAND",
    "configs": "localpipe.cli.configs:COMMAND",
}
# `method: NAME` expands to a point on the axes.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"objective": {"name": "greedy"}},
    "dgl": {"objective": {"name": "dgl"}},
    "predsim": {"objective": {"name": "predsim"}},
    "infopro": {"objective": {"name": "infopro", "task": "contrast"}},
    "auglocal": {"objective": {"name": "auglocal"}},
    "contsup": {"objective": {"name": "dgl", "head": "1c2f"}, "context": {"mode": "R1E"}},
    "sgr": {"objective": {"name": "dgl"}, "reconcile": {"distance": "cosine"}},
    "man": {"objective": {"name": "dgl"}, "feedback": {"mode": "block"}},
    "man_plusplus": {
        "objective": {"name": "dgl"},
        "feedback": {"mode": "block", "combine": "scaled"},
    },
}
# The networks whose published recipes are ImageNet's.
IMAGENET = tuple(name for name, target in MODELS.items() if target in (_IMAGENET_RESNET, _VGG))


def look_up(table: Mapping[str, str], name: str, prefix: str) -> Any:
    """Import and return the object that `name` stands for in a table.

    A second call returns the same object. `prefix` begins the error. Raises UserError, with the
    nearest name of the table, if the table lacks the name. Raises ImportError if a package is
    missing that the object's module needs.
    """
    if name not in table:
        raise UserError(f"{prefix} has no {name!r}; {suggest(name, table)}")
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def find_data_loader(name: str, prefix: str) -> Any:
    """Return the function that reads a data set, from the table or for a user's own.

    A user's `package.module:function` is not imported. Raises UserError, begun by `prefix`, for a
    name that the table lacks.
    """
    if not is_user_code(name):
        return look_up(DATASETS, name, prefix)
    return look_up({name: _USER_DATASET}, name, prefix)


def find_task_class(name: str, prefix: str) -> Any:
    """Return the class of a task, from the table or from a user's `package.module:Class`.

    Raises UserError, begun by `prefix`, for a name that the table lacks, and if a user's class
    cannot be imported. Whether it is a task is not looked at.
    """
    if not is_user_code(name):
        return look_up(TASKS, name, prefix)
    return import_user_code(name, "task.name")


def find_objective_class(name: str, prefix: str) -> Any:
    """Return the class of an objective, from the table or from a user's `package.module:Class`.

    Raises UserError if a name without a colon is not in the table: `prefix` begins this error.
    Raises UserError if a user's class cannot be imported, has no `Options` dataclass or no `exit`.
    It need not be a subclass of LocalLoss.
    """
    if not is_user_code(name):
        return look_up(OBJECTIVES, name, prefix)
    cls = import_user_code(name, "method.objective.name")
    has_options = dataclasses.is_dataclass(getattr(cls, "Options", None))
    if not has_options or not hasattr(cls, "exit"):
        raise UserError(
            f"objective: {name} is no local loss; expected a subclass of localpipe.LocalLoss with "
            "Options, a frozen dataclass, and exit"
        )
    return cls

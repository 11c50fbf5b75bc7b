"""Decides every `auto` of a configuration, once: a pure function of the configuration and of facts.

The facts are the data set's and the machine's. So a test resolves for eight GPUs without one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from localpipe.config.keys import Config
from localpipe.config.load import parse_resolved, to_dict
from localpipe.config.resolved import Resolved, count_stages, replica_counts
from localpipe.config.rules import check_precision, worker_count_error
from localpipe.errors import UserError


@dataclass(frozen=True)
class DataFacts:
    """What a data set decides. image: (C, H, W); mean, std: per channel, of images in 0..1."""

    image: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str


@dataclass(frozen=True)
class MachineFacts:
    """What a machine decides.

    `cuda_devices` and `cores` are those of this machine. `world` is torchrun's number of workers, None without torchrun;
    `local_workers` are those on this machine, None where that is all of them.
    """

    cores: int
    cuda_devices: int = 0
    cuda_has_bf16: bool = True
    world: int | None = None
    local_workers: int | None = None


@dataclass(frozen=True)
class Facts:
    """Everything outside the configuration that an `auto` depends on."""

    data: DataFacts
    machine: MachineFacts


def resolve(config: Config, facts: Facts) -> Resolved:
    """Return the configuration with every `auto` decided; raise UserError where the machine cannot run it.

    Measured cuts stay as they are, and an objective's `auto` weights are then the general ones.
    """
    machine = facts.machine
    device = _device(config, machine)
    check_precision(config, device, machine.cuda_has_bf16)
    processes = _processes(config, device, machine)
    local = processes if machine.local_workers is None else machine.local_workers
    stages = count_stages(config)

    data = to_dict(config)
    data["method"]["objective"] = _objective(config, stages)
    _fill(data["model"], num_classes=facts.data.num_classes)
    data["pipeline"].update(stages=stages, processes=processes)
    _fill(data["pipeline"], backend="nccl" if device == "cuda" else "gloo")
    # What the configuration gives of the data is part of the data set's facts already.
    data["data"].update(
        mean=list(facts.data.mean),
        std=list(facts.data.std),
        augment=facts.data.augment,
        image_size=_image_size(facts.data.image),
    )
    _fill(
        data["optim"],
        lr=0.8 * config.data.batch_size / 1024,
        warmup_epochs=auto_warmup(config.optim.epochs),
    )
    data["run"]["device"] = device
    _fill(data["run"], threads=max(1, machine.cores // local), deterministic=device == "cpu")
    return parse_resolved(data, "resolved configuration")


def auto_warmup(epochs: int) -> int:
    """Return the published 10 warm-up epochs of 160, and fewer for shorter runs."""
    return min(10, epochs // 16)


def _fill(section: dict[str, Any], **values: Any) -> None:
    """Replace the keys of a section that are `auto`."""
    for key, value in values.items():
        if section[key] == "auto":
            section[key] = value


def _image_size(image: tuple[int, int, int]) -> int | list[int]:
    _, height, width = image
    return height if height == width else [height, width]


def _objective(config: Config, stages: int) -> dict[str, Any]:
    """Return the objective's options with its own `auto` values decided."""
    cls, options = config.objective
    decided = cls.resolved(
        options, config.model.name, config.data.name, config.pipeline.cuts, stages
    )
    return {"name": config.method.objective["name"], **asdict(decided)}


def _device(config: Config, machine: MachineFacts) -> str:
    if config.run.device != "auto":
        return config.run.device
    return "cuda" if machine.cuda_devices else "cpu"


def _processes(config: Config, device: str, machine: MachineFacts) -> int:
    """Return the number of workers: torchrun's, the one asked for, or one a device or core."""
    replicas = replica_counts(config)
    if machine.world is not None:
        if wrong := worker_count_error(machine.world, replicas, "start"):
            raise UserError(f"config: torchrun started {machine.world} workers, but {wrong}")
        return machine.world
    if config.pipeline.processes != "auto":
        return config.pipeline.processes
    if len(set(replicas)) > 1:
        return sum(replicas)
    pipelines = replicas[0]
    places = machine.cuda_devices if device == "cuda" else machine.cores
    return pipelines * max(1, min(len(replicas), places // pipelines))

"""Decides every `auto` of a configuration, once, before a worker starts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from localpipe.config.keys import MEASURED, Config
from localpipe.config.load import update
from localpipe.config.options import find_objective
from localpipe.config.resolved import count_stages, replica_counts
from localpipe.config.rules import worker_count_error
from localpipe.data.dataset import Dataset, check_labels
from localpipe.environment import available_cores, workers_here
from localpipe.errors import UserError
from localpipe.pipeline.stages.precision import check_precision
from localpipe.pipeline.workers.device import check_devices
from localpipe.plan.measured_cuts import _decided_cuts
from localpipe.plan.profile import Profile


def auto_warmup(epochs: int) -> int:
    """Return the published 10 warm-up epochs of 160, and fewer for shorter runs."""
    return min(10, epochs // 16)


def resolve(
    config: Config,
    dataset: Dataset,
    world: int | None = None,
    profile: Profile | None = None,
) -> Config:
    """Return the configuration with every `auto` replaced and measured cuts made explicit.

    `world` is torchrun's number of workers. `cuts: time` is decided from the profile, measured here where none is given.
    """
    classes = (
        dataset.num_classes if config.model.num_classes == "auto" else config.model.num_classes
    )
    check_labels(dataset, classes)
    stages = count_stages(config)
    device = _device(config)
    check_precision(config, device)
    processes = _processes(config, device, world)
    here = workers_here(processes)
    check_devices(device, config.pipeline.backend, here)
    threads = (
        config.run.threads if config.run.threads != "auto" else max(1, available_cores() // here)
    )
    epochs = config.optim.epochs
    rate, warmup = config.optim.lr, config.optim.warmup_epochs
    resolved = update(
        config,
        {
            "method.objective": _objective(config, stages),
            "model.num_classes": classes,
            "pipeline.stages": stages,
            "pipeline.processes": processes,
            "pipeline.backend": _backend(config, device),
            "data.mean": list(dataset.mean),
            "data.std": list(dataset.std),
            "data.augment": dataset.augment,
            "data.image_size": dataset.image[1]
            if dataset.image[1] == dataset.image[2]
            else list(dataset.image[1:]),
            "optim.lr": 0.8 * config.data.batch_size / 1024 if rate == "auto" else rate,
            "optim.warmup_epochs": auto_warmup(epochs) if warmup == "auto" else warmup,
            "run.device": device,
            "run.threads": threads,
            "run.deterministic": device == "cpu"
            if config.run.deterministic == "auto"
            else config.run.deterministic,
        },
    )
    if config.pipeline.cuts not in MEASURED:
        return resolved
    explicit = update(config, {"pipeline.cuts": list(_decided_cuts(resolved, profile))})
    # The published weights of a local loss go with a cut, so they are looked up again.
    objective = _objective(explicit, stages)
    return update(
        resolved, {"pipeline.cuts": list(explicit.pipeline.cuts), "method.objective": objective}
    )


def fits_cores(config: Config) -> bool:
    """Return whether an efficiency can be told here: every worker's threads have a core, or the stages only wait."""
    processes, threads = config.pipeline.processes, config.run.threads
    assert isinstance(processes, int) and isinstance(threads, int), "resolved before it is asked"
    return workers_here(processes) * threads <= available_cores() or only_waits(config)


def only_waits(config: Config) -> bool:
    """Return whether the stages wait instead of computing, so that they may outnumber the cores."""
    return config.model.name == "chain"


def _objective(config: Config, stages: int) -> dict[str, Any]:
    """Return the objective's options with its own `auto` values decided."""
    cls, options = find_objective(config)
    resolved = cls.resolved(
        options, config.model.name, config.data.name, config.pipeline.cuts, stages
    )
    return {"name": config.method.objective["name"], **asdict(resolved)}


def _device(config: Config) -> str:
    if config.run.device != "auto":
        return config.run.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _backend(config: Config, device: str) -> str:
    if config.pipeline.backend != "auto":
        return config.pipeline.backend
    return "nccl" if device == "cuda" else "gloo"


def _processes(config: Config, device: str, world: int | None) -> int:
    replicas = replica_counts(config)
    asked = config.pipeline.processes
    if world is not None:
        if wrong := worker_count_error(world, replicas):
            raise UserError(
                f"config: torchrun started {world} workers, but {wrong.replace('set it to', 'start')}"
            )
        return world
    if asked != "auto":
        return asked
    if len(set(replicas)) > 1:
        return sum(replicas)
    pipelines = replicas[0]
    places = torch.cuda.device_count() if device == "cuda" else available_cores()
    return pipelines * max(1, min(len(replicas), places // pipelines))

"""Rules on combinations of keys: what cannot run is one line before anything starts."""

from __future__ import annotations

from collections.abc import Callable

from localpipe.config import registry
from localpipe.config.keys import Config
from localpipe.config.resolved import count_stages, reconciles, replica_counts
from localpipe.config.user_code import is_user_code
from localpipe.errors import UserError, suggest


def check_combinations(config: Config, source: str) -> None:
    pipeline, data, optim = config.pipeline, config.data, config.optim

    def refuse(what: str) -> None:
        raise UserError(f"config: {what} ({source})")

    if data.name not in registry.DATASETS:
        refuse(f"data.name has no {data.name!r}; {suggest(data.name, registry.DATASETS)}")
    if config.model.name not in registry.MODELS and not is_user_code(config.model.name):
        advice = suggest(config.model.name, registry.MODELS)
        refuse(
            f"model.name has no {config.model.name!r}; {advice} (or name a function of yours, package.module:function)"
        )
    if isinstance(pipeline.cuts, tuple):
        if pipeline.stages is not None and pipeline.stages != len(pipeline.cuts) + 1:
            refuse(
                f"pipeline.cuts {list(pipeline.cuts)} makes {len(pipeline.cuts) + 1} stages, but pipeline.stages is "
                f"{pipeline.stages}; leave one of them out"
            )
        if list(pipeline.cuts) != sorted(set(pipeline.cuts)):
            refuse(f"pipeline.cuts must rise; got {list(pipeline.cuts)}")
    if data.batch_size < 2:
        refuse("data.batch_size must be at least 2, batch normalisation needs two images; got 1")
    stages = count_stages(config)
    if isinstance(pipeline.replicas, tuple) and len(pipeline.replicas) != stages:
        refuse(
            f"pipeline.replicas lists {len(pipeline.replicas)} stages, but there are {stages}; give one number for each"
        )
    replicas = replica_counts(config)
    for count in replicas:
        if data.batch_size % count or data.batch_size < 2 * count:
            refuse(
                f"pipeline.replicas {count} does not divide data.batch_size {data.batch_size} into at least two images "
                "each; choose another batch size, or another number of replicas"
            )
    if pipeline.processes != "auto" and (wrong := worker_count_error(pipeline.processes, replicas)):
        refuse(f"pipeline.processes is {pipeline.processes}, but {wrong}")
    _check_accumulation(optim.accumulate, data.batch_size, max(replicas), refuse)
    rows = data.batch_size // optim.accumulate
    for count in replicas:
        if rows % count:
            refuse(
                f"pipeline.replicas {count} does not divide a message of {rows} images, data.batch_size over "
                "optim.accumulate; choose another optim.accumulate"
            )
    _check_capture(config, refuse)
    if config.run.checkpointing != "none" and reconciles(config):
        refuse(
            "run.checkpointing saves nothing with method.reconcile, whose double backward pass holds what is computed "
            "again; set run.checkpointing=none, or leave method.reconcile out"
        )
    if optim.stages:
        refuse("optim.stages is reserved for a later version; leave it out")
    if config.run.stop_when is not None:
        refuse("run.stop_when is reserved for a later version; leave it out")
    if config.method.reconcile.distance == "l2" and not _is_cross_entropy(config):
        refuse(
            "method.reconcile.distance l2 needs local losses that are one cross-entropy each, so that gradients have a "
            f"scale; {config.method.objective['name']} as set is not, choose cosine"
        )
    if optim.name == "sgd" and optim.nesterov and optim.momentum == 0:
        refuse(
            "optim.nesterov needs a momentum above 0; got optim.momentum 0; set optim.nesterov=false"
        )
    if isinstance(data.std, tuple) and any(value <= 0 for value in data.std):
        refuse(f"data.std must be above 0 in every channel; got {list(data.std)}")


def _check_accumulation(
    messages: int, batch_size: int, replicas: int, refuse: Callable[[str], None]
) -> None:
    """Refuse messages so small that a remainder of an epoch may not divide into such with two images a replica."""
    least = 4 * replicas - 1
    if batch_size % messages:
        refuse(
            f"optim.accumulate {messages} does not divide data.batch_size {batch_size}; choose a divisor"
        )
    if messages > 1 and batch_size // messages < least:
        refuse(
            f"optim.accumulate {messages} leaves {batch_size // messages} of {batch_size} images a message, expected at "
            f"least {least} with {replicas} {'replicas' if replicas > 1 else 'replica'}; lower optim.accumulate"
        )


def _check_capture(config: Config, refuse: Callable[[str], None]) -> None:
    capture = config.run.capture
    if capture == "none":
        return
    others = (
        ("method.reconcile", reconciles(config)),
        ("pipeline.replicas", max(replica_counts(config)) > 1),
        ("run.checkpointing", config.run.checkpointing != "none"),
        ("optim.accumulate", config.optim.accumulate > 1 and capture == "graphs"),
    )
    for key, used in others:
        if used:
            refuse(
                f"run.capture {capture} does not go with {key}; set run.capture=none, or leave {key} out"
            )


def _is_cross_entropy(config: Config) -> bool:
    cls, options = config.objective
    return bool(cls.is_cross_entropy(options))


def worker_count_error(
    processes: int, replicas: tuple[int, ...], advice: str = "set it to"
) -> str | None:
    """Return why a number of workers cannot host every replica of every stage, None where it can.

    A worker hosts stages of one replica. Where stages have different numbers of replicas, it hosts one stage.
    """
    total, counts = sum(replicas), list(replicas)
    if processes > total:
        return f"{len(replicas)} stages with {counts} replicas are all there is to run; {advice} at most {total}"
    uneven = len(set(replicas)) > 1
    if uneven and processes != total:
        return f"with different numbers of replicas {counts} every one has a worker of its own; {advice} {total}"
    if not uneven and processes % replicas[0]:
        return f"{replicas[0]} replicas need workers of their own; {advice} a multiple of {replicas[0]}"
    return None


def check_precision(config: Config, device: str, cuda_has_bf16: bool) -> None:
    """Raise UserError for numbers, or a way to run them, that the device (`cpu` or `cuda`) does not have."""
    run = config.run
    if run.precision == "tf32" and device != "cuda":
        raise UserError(
            f"config: run.precision is tf32, which {device} does not have; set run.precision=fp32"
        )
    if run.capture == "graphs" and device != "cuda":
        raise UserError(
            f"config: run.capture is graphs, which {device} does not have; set run.capture=none"
        )
    dtypes = {"run.precision": run.precision, "pipeline.wire_dtype": config.pipeline.wire_dtype}
    for key, name in dtypes.items():
        if name == "bf16" and device == "cuda" and not cuda_has_bf16:
            raise UserError(
                f"config: {key} is bf16, which this CUDA device does not have; set {key}=fp16"
            )

"""The rules on combinations of keys: each refuses what cannot run before anything starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from localpipe.config import registry
from localpipe.config.augmentation import find_problem, read_words
from localpipe.config.keys import Config
from localpipe.config.network_name import split_library
from localpipe.config.options import call_objective
from localpipe.config.resolved import (
    count_stages,
    feeds_back,
    least_replay,
    reconciles,
    replica_counts,
)
from localpipe.config.user_code import is_user_code
from localpipe.errors import UserError, find_nearest, suggest

# The schedules that end at optim.min_lr.
FLOORED_SCHEDULES = ("cosine_step", "poly")
# Arguments of libraries that would fetch weights, or code to run.
_FETCHING = (
    "pretrained",
    "weights",
    "weights_backbone",
    "pretrained_cfg",
    "checkpoint_path",
    "auto_map",
    "trust_remote_code",
)


def check_combinations(config: Config, source: str) -> None:
    """Raise UserError for the first rule that the configuration breaks. `source` ends the error.

    The names of data set and network, and limits of single values that types do not hold, are among
    the rules. The machine is not looked at.
    """
    for rule in _RULES:
        problem = rule(config)
        if problem is not None:
            raise UserError(f"config: {problem} ({source})")


# Every rule returns what is wrong and what to do, or None. A rule may rely on the rules before it.


def _check_data_name(config: Config) -> str | None:
    name = config.data.name
    if name in registry.DATASETS or is_user_code(name):
        return None
    return (
        f"data.name has no {name!r}; {suggest(name, registry.DATASETS)} "
        "(or a function of yours, package.module:function)"
    )


def _check_root(config: Config) -> str | None:
    if config.data.root or config.data.name == "bytes":
        return None
    return (
        f"data.root is null, but {config.data.name} is read from a folder or a file; "
        "set data.root to it"
    )


def _check_model_name(config: Config) -> str | None:
    name = config.model.name
    if name in registry.MODELS or is_user_code(name):
        return None
    library = split_library(name)
    if library is not None:
        return _check_library_network(*library, config.model.args)
    advice = suggest(name, registry.MODELS)
    return (
        f"model.name has no {name!r}; {advice} "
        "(or torchvision:NAME, timm:NAME, or a function of yours, package.module:function)"
    )


def _check_task_name(config: Config) -> str | None:
    name = config.task.name
    if name == "auto" or name in registry.TASKS or is_user_code(name):
        return None
    return (
        f"task.name has no {name!r}; {suggest(name, registry.TASKS)} "
        "(or a class of yours, package.module:Class)"
    )


def _check_library_network(library: str, network: str, args: Mapping[str, Any]) -> str | None:
    """Check what would fetch weights or code, which localpipe does not."""
    if not network:
        return f"model.name {library}: lacks a name; give {library}:NAME"
    if network.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return (
            f"model.name {library}:{network} fetches a network from elsewhere; expected a name "
            f"that {library} knows; give its weights by model.weights"
        )
    for key in _FETCHING:
        if key in args:
            return (
                f"model.args.{key} would fetch weights or code; leave it out, and give the weights "
                "by model.weights"
            )
    return None


def _check_weights(config: Config) -> str | None:
    model = config.model
    if model.weights is not None and config.run.init_from is not None:
        return (
            f"model.weights {model.weights} and run.init_from {config.run.init_from} are both "
            "weights to begin with; leave one of them out"
        )
    if model.weights is None and model.weights_sha256 is not None:
        return (
            "model.weights_sha256 is the digest of model.weights, which is null; "
            "set model.weights, or leave model.weights_sha256 out"
        )
    return None


def _check_frozen_time(config: Config) -> str | None:
    if config.model.freeze and config.pipeline.cuts == "time":
        return (
            "pipeline.cuts time measures blocks that are trained, and model.freeze is "
            f"{list(config.model.freeze)}; set pipeline.cuts=memory, or list the cuts"
        )
    return None


def _check_cuts(config: Config) -> str | None:
    pipeline = config.pipeline
    if not isinstance(pipeline.cuts, tuple):
        return None
    cuts: list[Any] = list(pipeline.cuts)
    stages = len(cuts) + 1
    if pipeline.stages is not None and pipeline.stages != stages:
        return (
            f"pipeline.cuts {cuts} makes {stages} stages, but pipeline.stages is "
            f"{pipeline.stages}; leave one of them out"
        )
    if all(isinstance(cut, str) for cut in cuts):
        return None  # the network says where its blocks are
    if cuts != sorted(set(cuts)):
        return f"pipeline.cuts must rise; got {cuts}"
    return None


def _check_batch_size(config: Config) -> str | None:
    if config.data.batch_size < 2:
        return "data.batch_size must be at least 2, batch normalisation needs two images; got 1"
    return None


def _check_replicas(config: Config) -> str | None:
    replicas, batch_size = config.pipeline.replicas, config.data.batch_size
    stages = count_stages(config)
    if isinstance(replicas, tuple) and len(replicas) != stages:
        return (
            f"pipeline.replicas lists {len(replicas)} stages, but there are {stages}; "
            "give one number for each"
        )
    for count in replica_counts(config):
        if batch_size % count or batch_size < 2 * count:
            return (
                f"pipeline.replicas {count} does not divide data.batch_size {batch_size} into at "
                "least two images each; choose another batch size, or another number of replicas"
            )
    return None


def _check_processes(config: Config) -> str | None:
    processes = config.pipeline.processes
    if processes == "auto":
        return None
    problem = worker_count_error(processes, replica_counts(config))
    if problem is None:
        return None
    return f"pipeline.processes is {processes}, but {problem}"


def _check_worker_lists(config: Config) -> str | None:
    """Check that the keys with a value for each worker have as many values as there are workers."""
    processes = config.pipeline.processes
    lengths = {key: len(values) for key, values in list_worker_values(config).items()}
    if not lengths:
        return None
    key, length = next(iter(lengths.items()))
    if len(set(lengths.values())) > 1:
        texts = " and ".join(f"{key} lists {length}" for key, length in lengths.items())
        return f"{texts} workers; give one value for each worker in all of them"
    if processes not in ("auto", length):
        return (
            f"{key} lists {length} workers, but pipeline.processes is {processes}; "
            "give one value for each worker"
        )
    problem = worker_count_error(length, replica_counts(config))
    return None if problem is None else f"{key} lists {length} workers, but {problem}"


def _check_device_types(config: Config) -> str | None:
    """Check that the workers of a run have one type of device."""
    types = sorted({name.partition(":")[0] for name in config.pipeline.devices or ()})
    if len(types) > 1:
        return "pipeline.devices has both cpu and cuda; give devices of one type"
    if types and config.run.device not in ("auto", types[0]):
        return (
            f"run.device is {config.run.device}, but pipeline.devices are of {types[0]}; "
            f"set run.device={types[0]}"
        )
    return None


def _check_threads_of_cores(config: Config) -> str | None:
    """Check that no worker has several threads on one core, where each waits for the others."""
    devices, threads = config.pipeline.devices or (), config.run.threads
    for rank, device in enumerate(devices):
        count = threads[rank] if isinstance(threads, tuple) else threads
        if device.startswith("cpu:") and isinstance(count, int) and count > 1:
            return (
                f"run.threads gives rank {rank} {count} threads, but pipeline.devices gives it one "
                f"core, {device}, on which they wait for each other; set run.threads=auto"
            )
    return None


def list_worker_values(config: Config) -> dict[str, tuple[object, ...]]:
    """Return the keys that list a value for each worker, with their values."""
    lists = {
        "pipeline.devices": config.pipeline.devices,
        "pipeline.memory": config.pipeline.memory,
        "run.threads": config.run.threads,
    }
    return {key: values for key, values in lists.items() if isinstance(values, tuple)}


def _check_accumulation(config: Config) -> str | None:
    messages, batch_size = config.optim.accumulate, config.data.batch_size
    if batch_size % messages:
        return (
            f"optim.accumulate {messages} does not divide data.batch_size {batch_size}; "
            "choose a divisor"
        )
    # A smaller message might not give every replica two images at the end of an epoch.
    replicas = max(replica_counts(config))
    least = 4 * replicas - 1
    size = batch_size // messages
    if messages > 1 and size < least:
        noun = "replicas" if replicas > 1 else "replica"
        return (
            f"optim.accumulate {messages} leaves {size} of {batch_size} images a message, "
            f"expected at least {least} with {replicas} {noun}; lower optim.accumulate"
        )
    return None


def _check_message_rows(config: Config) -> str | None:
    rows = config.data.batch_size // config.optim.accumulate
    for count in replica_counts(config):
        if rows % count:
            return (
                f"pipeline.replicas {count} does not divide a message of {rows} images, "
                "data.batch_size over optim.accumulate; choose another optim.accumulate"
            )
    return None


def _check_capture(config: Config) -> str | None:
    capture = config.run.capture
    if capture == "none":
        return None
    conflicts = {
        "method.reconcile": reconciles(config),
        "pipeline.replicas": max(replica_counts(config)) > 1,
        "run.checkpointing": config.run.checkpointing != "none",
        "optim.accumulate": capture == "graphs" and config.optim.accumulate > 1,
    }
    for key, is_used in conflicts.items():
        if is_used:
            return (
                f"run.capture {capture} does not go with {key}; "
                f"set run.capture=none, or leave {key} out"
            )
    return None


def _check_checkpointing(config: Config) -> str | None:
    if config.run.checkpointing == "none" or not reconciles(config):
        return None
    return (
        "run.checkpointing saves nothing with method.reconcile, whose double backward pass holds "
        "what is computed again; set run.checkpointing=none, or leave method.reconcile out"
    )


def _check_reserved(config: Config) -> str | None:
    if config.optim.stages:
        return "optim.stages is reserved for a later version; leave it out"
    if config.run.stop_when is not None:
        return "run.stop_when is reserved for a later version; leave it out"
    return None


def _check_reconcile(config: Config) -> str | None:
    if config.method.reconcile.distance != "l2":
        return None
    if not config.has_objective:
        return None  # the run checked it when it began
    cls, options = config.objective
    name = config.method.objective["name"]
    if call_objective(name, lambda: cls.is_cross_entropy(options)):
        return None
    return (
        "method.reconcile.distance l2 needs local losses that are one cross-entropy each, so that "
        f"gradients have a scale; {name} as set is not, choose cosine"
    )


def _check_feedback(config: Config) -> str | None:
    mode = config.method.feedback.mode
    name = config.method.objective["name"]
    if not feeds_back(config):
        return None
    if mode == "block" and name == "auglocal":
        return (
            "method.feedback.mode block does not go with auglocal, which copies later blocks "
            "already; choose dgl, greedy or infopro, or set method.feedback.mode=none"
        )
    if mode != "readout" or not config.has_objective:
        return None
    cls, options = config.objective
    if not call_objective(name, lambda: cls.is_over_pairs(options)):
        return None
    return (
        "method.feedback.mode readout needs local losses of a classifier alone, and "
        f"{name} as set compares samples; choose dgl or greedy, or set method.feedback.mode=none"
    )


def _check_recovery(config: Config) -> str | None:
    """Check what run.recover=stage goes with, and that its rings hold enough messages."""
    if config.run.recover == "none":
        return None
    if max(replica_counts(config)) > 1:
        return (
            "run.recover stage replaces a worker alone, but with pipeline.replicas above 1 the "
            "other replicas wait for its gradients; set pipeline.replicas=1, or run.recover=none"
        )
    if config.pipeline.backend == "nccl":
        return (
            "run.recover stage keeps messages in shared memory, but pipeline.backend is nccl, "
            "whose messages die with their sender; set pipeline.backend=gloo"
        )
    replay, least = config.pipeline.replay, least_replay(config)
    if isinstance(replay, int) and replay < least:
        return (
            f"pipeline.replay is {replay}, expected at least {least}, twice the messages of a step "
            f"and those in flight; set pipeline.replay={least}"
        )
    return None


def _check_nesterov(config: Config) -> str | None:
    optim = config.optim
    if optim.name == "sgd" and optim.nesterov and optim.momentum == 0:
        return (
            "optim.nesterov needs a momentum above 0; "
            "got optim.momentum 0; set optim.nesterov=false"
        )
    return None


def _check_length(config: Config) -> str | None:
    if config.optim.epochs is None and config.optim.max_steps is None:
        return "optim.epochs and optim.max_steps are both null, so no run ends; set one of them"
    return None


def _check_warmup(config: Config) -> str | None:
    optim = config.optim
    if optim.warmup_steps is None or optim.warmup_epochs in ("auto", 0):
        return None
    return (
        f"optim.warmup_steps {optim.warmup_steps} and optim.warmup_epochs {optim.warmup_epochs:g} "
        "are both a warm-up; leave one of them out"
    )


def _check_least_rate(config: Config) -> str | None:
    optim = config.optim
    if optim.schedule not in FLOORED_SCHEDULES or optim.lr == "auto" or optim.min_lr <= optim.lr:
        return None
    return (
        f"optim.min_lr {optim.min_lr:g} is above the peak, optim.lr {optim.lr:g}; "
        "lower optim.min_lr"
    )


def _check_milestones(config: Config) -> str | None:
    optim = config.optim
    milestones = optim.milestones
    if optim.schedule != "multistep" and not isinstance(milestones, tuple):
        return None
    if not isinstance(milestones, tuple) or not milestones:
        return (
            "optim.schedule multistep needs optim.milestones, the first epoch of every lower rate; "
            "set it, as optim.milestones=16,31,46"
        )
    if list(milestones) != sorted(milestones):
        return f"optim.milestones must not fall; got {list(milestones)}; sort them"
    return None


def _check_std(config: Config) -> str | None:
    std = config.data.std
    if isinstance(std, tuple) and any(value <= 0 for value in std):
        return f"data.std must be above 0 in every channel; got {list(std)}"
    return None


def _check_augment(config: Config) -> str | None:
    problem = find_problem(config.data.augment)
    return None if problem is None else f"data.augment {problem}"


def _check_mixtures(config: Config) -> str | None:
    task = config.task
    words = read_words(config.data.augment)
    if not words.mixtures:
        return None
    word, _ = words.mixtures[0]
    if task.name not in ("auto", "classification"):
        return (
            f"data.augment {word} mixes two classes, which task.name {task.name} has not; "
            "set task.name=auto, or leave it out"
        )
    if task.targets == "index":
        return (
            f"data.augment {word} makes probabilities of classes, but task.targets is index; "
            "set task.targets=auto"
        )
    return None


def _check_extra(config: Config) -> str | None:
    if config.data.extra and config.data.name != "svhn":
        return (
            f"data.extra is for svhn, which alone has such a split; data.name is "
            f"{config.data.name}; set data.extra=false"
        )
    return None


def _check_skip_broken(config: Config) -> str | None:
    if config.data.skip_broken and config.data.verify == "none":
        return (
            "data.skip_broken leaves out the files that a check finds, but data.verify none finds "
            "none; set data.verify=auto"
        )
    return None


def _check_range(config: Config) -> str | None:
    if config.data.range is None:
        return None
    low, high = config.data.range
    # A width beyond the largest number would make every value black.
    if low < high and math.isfinite(high - low):
        return None
    return (
        "data.range must be two finite numbers, that of black below that of white; "
        f"got {[low, high]}"
    )


def _check_background(config: Config) -> str | None:
    name = config.data.background
    if name == "white" or not isinstance(name, str):
        return None
    from PIL import ImageColor

    expected = "expected a name, as white, or '#rrggbb' in quotes, or [r, g, b]"
    try:
        colour = ImageColor.getrgb(name)
    except ValueError:
        nearest = find_nearest(name.strip().lower(), ImageColor.colormap)
        advice = expected if nearest is None else f"did you mean {nearest}?"
        return f"data.background has no colour {name!r}; {advice}"
    if colour[3:] not in ((), (255,)):
        return f"data.background {name!r} is transparent itself; {expected}"
    return None


_RULES: tuple[Callable[[Config], str | None], ...] = (
    _check_data_name,
    _check_root,
    _check_model_name,
    _check_task_name,
    _check_weights,
    _check_frozen_time,
    _check_cuts,
    _check_batch_size,
    _check_replicas,
    _check_processes,
    _check_worker_lists,
    _check_device_types,
    _check_threads_of_cores,
    _check_accumulation,
    _check_message_rows,
    _check_capture,
    _check_checkpointing,
    _check_reserved,
    _check_reconcile,
    _check_feedback,
    _check_recovery,
    _check_nesterov,
    _check_length,
    _check_warmup,
    _check_least_rate,
    _check_milestones,
    _check_std,
    _check_augment,
    _check_mixtures,
    _check_extra,
    _check_skip_broken,
    _check_range,
    _check_background,
)


def worker_count_error(
    processes: int, replicas: tuple[int, ...], advice: str = "set it to"
) -> str | None:
    """Return why a number of workers cannot host every replica of every stage, None where it can.

    A worker hosts stages of one replica. Where stages have different numbers of replicas, it hosts
    one stage. processes: at least 1. replicas: the number of replicas of every stage, not empty.
    `advice` precedes the right number in the text. Nothing is raised.
    """
    total = sum(replicas)
    counts = list(replicas)
    if processes > total:
        return (
            f"{len(replicas)} stages with {counts} replicas are all there is to run; "
            f"{advice} at most {total}"
        )

    # No worker fits stages with different numbers of replicas.
    is_uneven = len(set(replicas)) > 1
    if is_uneven and processes != total:
        return (
            f"with different numbers of replicas {counts} every one has a worker of its own; "
            f"{advice} {total}"
        )
    if not is_uneven and processes % replicas[0]:
        return (
            f"{replicas[0]} replicas need workers of their own; "
            f"{advice} a multiple of {replicas[0]}"
        )
    return None


def check_precision(config: Config, device: str, cuda_has_bf16: bool) -> None:
    """Raise UserError for arithmetic or graphs that the device, `cpu` or `cuda`, does not have.

    These are tf32 and CUDA graphs on the CPU, and bf16 on a CUDA device without it. bf16 is looked
    for in run.precision and pipeline.wire_dtype. `cuda_has_bf16` is not read for the CPU.
    """
    run = config.run
    if run.precision == "tf32" and device != "cuda":
        raise UserError(
            f"config: run.precision is tf32, which {device} does not have; set run.precision=fp32"
        )
    if run.capture == "graphs" and device != "cuda":
        raise UserError(
            f"config: run.capture is graphs, which {device} does not have; set run.capture=none"
        )
    if device != "cuda" or cuda_has_bf16:
        return
    dtypes = {"run.precision": run.precision, "pipeline.wire_dtype": config.pipeline.wire_dtype}
    for key, dtype in dtypes.items():
        if dtype == "bf16":
            raise UserError(
                f"config: {key} is bf16, which this CUDA device does not have; set {key}=fp16"
            )

"""The decision of every `auto` key: a pure function of the configuration and of facts.

The facts are the data set's and the machine's. So a test can resolve for eight GPUs without one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from localpipe.config.augmentation import Augment, read_words
from localpipe.config.keys import Config, Data, Feedback, Level
from localpipe.config.load import parse_resolved, to_dict, update
from localpipe.config.options import call_objective
from localpipe.config.resolved import Resolved, count_stages, least_replay, replica_counts
from localpipe.config.rules import (
    check_precision,
    list_worker_values,
    worker_count_error,
)
from localpipe.config.user_code import is_user_code
from localpipe.errors import UserError

# The data sets that make images of any size.
RESIZING = ("image_folder", "imagenet", "synthetic", "shapes", "areas")
_MOST_LOADERS = 8
_MANY_FILES = 10_000  # for which processes are worth the seconds that they take to start
_SMALL_VOCABULARY = 2**16  # that 16 bits hold


@dataclass(frozen=True)
class DataFacts:
    """What a data set decides. mean, std: per channel, of images in 0..1, () for other inputs.

    sample: the shape of an input, (C, H, W) of an image. dtype: None for images of bytes, which
    are normalised, else that of the inputs. task: the name that task.name `auto` stands for, ""
    where the data do not say it. num_classes: 0 where the data do not say it.
    class_weights: those of `balanced`, where they are known. augment: words of data.augment,
    without `auto`. padding, padding_mode: of crops, None for other inputs. classes: the names of
    the classes in the order of their indices, None where they have none. verify: what data.verify:
    auto is. has_probabilities: whether a target may be a probability of every class, a row of
    float32 numbers. files: training images that are files to decode. evaluation_sample: the shape
    of an input in an evaluation, None where it is `sample`. has_loader: whether loader processes
    read the samples.
    """

    sample: tuple[int, ...]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment
    classes: tuple[str, ...] | None = None
    verify: Level = "full"
    dtype: str | None = None
    task: str = "classification"
    class_weights: tuple[float, ...] | None = None
    has_probabilities: bool = False
    padding: int | None = None
    padding_mode: str | None = None
    files: int = 0
    evaluation_sample: tuple[int, ...] | None = None
    has_loader: bool = False


@dataclass(frozen=True)
class WeightsFacts:
    """What the weights of `model.weights` decide.

    sha256: of their file. statistics: mean and std per channel, of images in 0..1, that they were
    trained with. image_size: the side of their images. Both are None where they are not known.
    """

    sha256: str
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    image_size: int | None = None


@dataclass(frozen=True)
class MachineFacts:
    """What a machine decides.

    `cuda_devices` and `cores` are those of this machine. `cuda_has_bf16` is whether its CUDA
    devices compute in bf16, and is not read without one. `world` is torchrun's number of workers,
    None without torchrun. `local_workers` are those on this machine, None where all of them are.
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


def take_weights_facts(config: Config, facts: WeightsFacts) -> Config:
    """Return the configuration with the digest of the weights, and their image size for `auto`.

    The size is taken where the data set resizes its images. The others keep their own. The result
    is a checked copy. The statistics are for `data.load`, which knows the channels of the data.
    """
    values: dict[str, Any] = {"model.weights_sha256": facts.sha256}
    data = config.data
    if facts.image_size is not None and data.image_size == "auto" and data.name in RESIZING:
        values["data.image_size"] = facts.image_size
    return update(config, values)


def resolve(config: Config, facts: Facts) -> Resolved:
    """Return the configuration with every `auto` decided.

    config: checked, with its objective looked up, else AssertionError. It is not changed. Measured
    cuts stay as they are, and an objective's `auto` weights are then the general ones. classes,
    mean, std, augment and image_size are always those of the facts. Raises UserError if the machine
    or torchrun's number of workers does not fit the configuration, or the objective's options do
    not.
    """
    machine = facts.machine
    device = _decide_device(config, machine)
    check_precision(config, device, machine.cuda_has_bf16)
    processes = _decide_processes(config, device, machine)
    stages = count_stages(config)

    data = to_dict(config)
    data["method"]["objective"] = _resolve_objective(config, stages)
    _fill(data["method"]["feedback"], lag=auto_lag(config.method.feedback, stages))
    data["pipeline"].update(stages=stages, processes=processes)
    data["pipeline"]["replay"] = _decide_replay(config)
    recovers = config.run.recover == "stage"
    _fill(data["pipeline"], backend="nccl" if device == "cuda" and not recovers else "gloo")
    _take_data_facts(data, config, facts.data)
    data["optim"]["schedule"] = auto_schedule(config)
    _fill(
        data["optim"],
        lr=auto_rate(config),
        milestones=_decide_milestones(config),
        warmup_epochs=_decide_warmup(config),
    )

    # The workers of a machine share its cores.
    local_workers = machine.local_workers
    if local_workers is None:
        local_workers = processes
    data["run"]["device"] = device
    threads = _decide_threads(config, machine.cores, local_workers)
    _fill(data["run"], threads=threads, deterministic=device == "cpu")
    _check_recovery(config, machine, device)
    used = _count_threads(data["run"]["threads"], local_workers)
    _fill(data["data"], workers=_decide_loaders(config, facts.data, machine.cores, used))
    return parse_resolved(data, "resolved configuration")


def _decide_replay(config: Config) -> int | None:
    """Return how many messages an edge keeps: the fewest where it is `auto`, None for none.

    `plan.resolve_here` raises it when the size of a message is known.
    """
    if config.run.recover == "none":
        return None
    if isinstance(config.pipeline.replay, int):
        return config.pipeline.replay
    return least_replay(config)


def _check_recovery(config: Config, machine: MachineFacts, device: str) -> None:
    """Raise UserError where no worker can be replaced: under torchrun, and by other arithmetic."""
    if config.run.recover == "none":
        return
    if machine.world is not None:
        raise UserError(
            "config: run.recover stage needs workers that localpipe starts, but torchrun has "
            "started them; set run.recover=none: with --max-restarts torchrun starts all workers "
            "again, and they go on from the last checkpoint"
        )
    if device == "cuda" and config.run.deterministic is not True:
        raise UserError(
            "config: run.recover stage computes the last steps of a worker again, but on CUDA they "
            "differ without run.deterministic; set run.deterministic=true"
        )


def _take_data_facts(sections: dict[str, Any], config: Config, facts: DataFacts) -> None:
    """Decide what the data decide: of the network, of the task, and of the data themselves."""
    # A network is recorded when it is built, which is later.
    _check_known(config, facts)
    _fill(sections["model"], num_classes=facts.num_classes, blocks=None, library=None)
    _fill(sections["task"], name=facts.task)
    _fill(sections["task"], targets=_decide_targets(sections["task"], facts))
    _resolve_class_weights(sections["task"], facts)

    # What the configuration gives of the data is part of the data set's facts already.
    sections["data"].update(
        classes=None if facts.classes is None else list(facts.classes),
        mean=list(facts.mean),
        std=list(facts.std),
        augment=_write_augment(facts.augment),
        padding=facts.padding,
        padding_mode=facts.padding_mode,
        **_input_values(facts),
    )
    _fill(sections["data"], verify=facts.verify, token_dtype=token_dtype(config.data))


def _decide_threads(config: Config, cores: int, local_workers: int) -> int:
    """Return the threads of a worker: its share of the machine's cores, or one on its own core."""
    if any(name.startswith("cpu:") for name in config.pipeline.devices or ()):
        return 1
    return max(1, cores // local_workers)


def auto_lag(feedback: Feedback, stages: int) -> int:
    """Return the lag of `auto`: the smallest multiple of `every` from 7 * distance + 1 on.

    The distance is that of the two stages that are farthest apart. A stage is at most 7 messages
    ahead of the next one up to `pipeline.depth` 4, so with this lag nothing waits there.
    """
    distance = 1
    if feedback.mode == "readout":
        distance = max(1, stages - 1)
    least = 7 * distance + 1
    return -(-least // feedback.every) * feedback.every


def auto_rate(config: Config) -> float:
    """Return the learning rate of `auto`, by the optimizer, the data set and the batch size.

    Trained weights, `model.weights`, get a tenth of it.
    """
    batch_size = config.data.batch_size
    rate = 0.8 * batch_size / 1024
    if config.optim.name == "adamw":
        rate = 5e-4 * batch_size / 512
    elif config.data.name == "imagenet":
        rate = 0.4 * batch_size / 1024
    if config.model.weights is not None:
        rate /= 10  # trained weights need small steps
    return rate


def auto_schedule(config: Config) -> str:
    """Return the schedule of a configuration.

    With the automatic rate of SGD on ImageNet, cosine_epoch is the papers' one for that data set,
    cosine_epoch_from_0.
    """
    if _follows_imagenet(config) and config.optim.schedule == "cosine_epoch":
        return "cosine_epoch_from_0"
    return config.optim.schedule


def _decide_milestones(config: Config) -> list[int] | None:
    """Return the milestones of `auto`: those of the schedule step, None for other schedules."""
    optim = config.optim
    if optim.schedule != "step":
        return None
    length = optim.epochs or optim.max_steps
    assert length is not None, "checked with the configuration"
    return auto_milestones(length)


def auto_milestones(epochs: int) -> list[int]:
    """Return the first epochs, counted from 1, of the two lower rates of the schedule step.

    They are epochs 80 and 120 of 160, as InfoPro's and ContSup's code has it (Wang et al. 2021).
    The rule for other lengths, half and three quarters, is AugLocal's code's. That no rate falls
    before epoch 2 is ours.
    """
    return [max(epochs // 2, 2), max(epochs * 3 // 4, 2)]


def _decide_warmup(config: Config) -> int:
    """Return the warm-up epochs of `auto`."""
    optim = config.optim
    if optim.warmup_steps is not None or optim.epochs is None or _follows_imagenet(config):
        return 0
    return auto_warmup(optim.epochs)


def _follows_imagenet(config: Config) -> bool:
    """Return whether the rate is to be the papers' one on ImageNet."""
    optim = config.optim
    return config.data.name == "imagenet" and optim.lr == "auto" and optim.name != "adamw"


def auto_warmup(epochs: int) -> int:
    """Return the warm-up epochs of `auto`: the published 10 of 160, and fewer of shorter runs.

    It is min(10, epochs // 16), so 0 below 16 epochs.
    """
    return min(10, epochs // 16)


def _check_known(config: Config, facts: DataFacts) -> None:
    """Raise UserError for an `auto` that the data set does not say: the task, or the classes."""
    if config.task.name == "auto" and not facts.task:
        raise UserError(
            f"config: task.name is auto, and the targets of {config.data.name} fit no task by "
            "their shape; set task.name"
        )
    if config.model.num_classes == "auto" and not facts.num_classes:
        raise UserError(
            f"config: model.num_classes is auto, and {config.data.name} does not say its classes; "
            "set model.num_classes, or let its data set have targets, a list of class indices"
        )


def _fill(section: dict[str, Any], **values: Any) -> None:
    """Replace those of the keys of a section that are `auto`."""
    for key, value in values.items():
        if section[key] == "auto":
            section[key] = value


def _count_threads(threads: int | list[int], workers: int) -> int:
    """Return the threads of the workers of this machine, of all workers where they are listed."""
    if isinstance(threads, list):
        return sum(threads)
    return workers * threads


def _decide_loaders(config: Config, facts: DataFacts, cores: int, used: int) -> int:
    """Return the processes that load the data: as many as cores are left, 1 to 8.

    Threads of the worker read a few image files, and many where not two cores are left: then it is
    0. cores: of this machine. used: by the threads of its workers. It is 1 for other data sets,
    which need none.
    """
    left, files = cores - used, facts.files
    if files:
        return min(_MOST_LOADERS, left) if files > _MANY_FILES and left >= 2 else 0
    if not (facts.has_loader or is_user_code(config.data.name)):
        return 1
    return max(1, min(_MOST_LOADERS, left))


def token_dtype(data: Data) -> str:
    """Return the dtype of the numbers in files of tokens. `auto` holds the vocabulary."""
    if data.token_dtype != "auto":
        return data.token_dtype
    return "uint16" if (data.vocabulary or 0) <= _SMALL_VOCABULARY else "uint32"


def _input_values(facts: DataFacts) -> dict[str, Any]:
    """Return the keys of `data` that say what an input is."""
    values: dict[str, Any] = {"shape": None, "dtype": None, "evaluation_size": None}
    if facts.dtype is not None:
        return {**values, "shape": list(facts.sample), "dtype": facts.dtype, "image_size": None}
    if facts.evaluation_sample is not None:
        values["evaluation_size"] = list(facts.evaluation_sample[1:])
    _, height, width = facts.sample
    return {**values, "image_size": height if height == width else [height, width]}


def _decide_targets(task: dict[str, Any], facts: DataFacts) -> str:
    """Return what task.targets `auto` is, for the task of the section."""
    is_soft = facts.has_probabilities or bool(read_words(facts.augment).mixtures)
    if task["name"] == "classification" and is_soft:
        return "probabilities"
    return "index"


def _write_augment(augment: Augment) -> Any:
    """Return the words as JSON holds them."""
    return augment if isinstance(augment, str) else list(augment)


def _resolve_class_weights(task: dict[str, Any], facts: DataFacts) -> None:
    """Replace `balanced` by the weights of the data's classes."""
    if task["class_weights"] != "balanced":
        return
    if facts.class_weights is None:
        raise UserError(
            "config: task.class_weights balanced needs the class of every training sample, which "
            "this data set does not say; list one weight a class, or set it to none"
        )
    task["class_weights"] = list(facts.class_weights)


def _resolve_objective(config: Config, stages: int) -> dict[str, Any]:
    """Return the objective's options with its own `auto` values decided."""
    cls, options = config.objective
    network, data, cuts = config.model.name, config.data.name, config.pipeline.cuts
    name = config.method.objective["name"]

    def resolve_options() -> dict[str, Any]:
        return asdict(cls.resolved(options, network, data, cuts, stages))

    return {"name": name, **call_objective(name, resolve_options)}


def _decide_device(config: Config, machine: MachineFacts) -> str:
    if config.run.device != "auto":
        return config.run.device
    if config.pipeline.devices is not None:
        return config.pipeline.devices[0].partition(":")[0]
    return "cuda" if machine.cuda_devices else "cpu"


def _decide_processes(config: Config, device: str, machine: MachineFacts) -> int:
    """Return the number of workers: torchrun's, the configured one, or one a device or core."""
    replicas, lists = replica_counts(config), list_worker_values(config)
    if machine.world is not None:
        problem = worker_count_error(machine.world, replicas, "start")
        if problem is not None:
            raise UserError(f"config: torchrun started {machine.world} workers, but {problem}")
        for key, values in lists.items():
            if len(values) != machine.world:
                raise UserError(
                    f"config: torchrun started {machine.world} workers, but {key} lists "
                    f"{len(values)}; give one value for each worker"
                )
        return machine.world
    if config.pipeline.processes != "auto":
        return config.pipeline.processes
    if lists:
        return len(next(iter(lists.values())))
    # Where stages have different numbers of replicas, every replica has its own worker.
    if len(set(replicas)) > 1:
        return sum(replicas)

    # Every replica of the pipeline gets the same number of workers, at most one a stage.
    pipelines = replicas[0]
    units = machine.cuda_devices if device == "cuda" else machine.cores
    return pipelines * max(1, min(len(replicas), units // pipelines))

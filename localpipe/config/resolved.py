"""A resolved configuration: every `auto` decided, and what follows from the keys alone."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from localpipe import fields
from localpipe.config.augmentation import read_words
from localpipe.config.keys import (
    AugmentWords,
    BlockNames,
    Blocks,
    ClassNames,
    Config,
    Count,
    Data,
    Feedback,
    Level,
    Method,
    Model,
    NonNegative,
    NumberedCuts,
    Optim,
    Pipeline,
    Positive,
    Run,
    Shape,
    TableName,
    TaskKeys,
    as_tuple,
    list_to_tuple,
)

Numbers = Annotated[tuple[float, ...], BeforeValidator(as_tuple)]


class ResolvedModel(Model):
    """The network, its number of classes known."""

    num_classes: Positive = Field(description="classes")
    blocks: None | BlockNames = Field(None, description="names of the blocks, or null")
    library: None | str = Field(None, description="the library with its version, or null")


class ResolvedTask(TaskKeys):
    """What the network is trained for, by its name."""

    name: str = Field(description="a task's name, or package.module:Class of your own")
    class_weights: Annotated[Literal["none"] | Numbers, BeforeValidator(as_tuple)] = Field(
        "none", description="weight of every class in the loss"
    )


class ResolvedFeedback(Feedback):
    """Which parameters of a later stage come back, and how late."""

    lag: Positive = Field(description="steps by which they come late")

    @property
    def snapshots(self) -> int:
        """How many states of the parameters may be on their way, ceil(lag / every)."""
        return -(-self.lag // self.every)

    def due(self, step: int) -> int | None:
        """Return the step whose parameters are taken before `step`, None where none are.

        Steps count from 1. Nothing is taken of step 0, before the first update.
        """
        sent = step - self.lag
        if sent < 1 or not self.is_sent(sent):
            return None
        return sent

    def is_sent(self, step: int) -> bool:
        """Return whether parameters leave after the update of a step."""
        return step % self.every == 0


class ResolvedMethod(Method):
    """A point on the four axes, the lag known."""

    feedback: ResolvedFeedback


class ResolvedPipeline(Pipeline):
    """Where the network is cut and who runs which part, in numbers."""

    stages: Blocks = Field(description="gradient-isolated stages")
    cuts: Annotated[NumberedCuts, BeforeValidator(as_tuple)] = Field(
        "equal", description="where the network is cut"
    )
    processes: Positive = Field(description="workers")
    backend: Annotated[str, TableName("BACKENDS")] = Field(description="what edges run over")
    replay: None | Positive = Field(
        None, description="messages that an edge keeps for a worker that is replaced, or null"
    )


class ResolvedData(Data):
    """The data set, its images' shape and statistics known."""

    classes: None | ClassNames = Field(
        None, description="names of the classes in the order of their indices, or null"
    )
    augment: Annotated[str | tuple[str, ...], AugmentWords()] = Field(
        description="augmentation of training images"
    )
    padding: None | Count = Field(None, description="pixels on every side of a cropped image")
    padding_mode: None | Literal["reflect", "zero"] = Field(None, description="what those are")
    shape: None | Shape = Field(None, description="of an input that is no image of bytes, or null")
    dtype: None | Literal["float32", "int64"] = Field(None, description="of such an input, or null")
    token_dtype: Literal["uint16", "uint32"] = Field(
        "uint16", description="of the numbers in the files of tokens"
    )
    mean: Numbers = Field(description="per channel, of images in 0..1")
    std: Numbers = Field(description="per channel, of images in 0..1")
    image_size: Annotated[
        None | Positive | tuple[Positive, Positive], BeforeValidator(list_to_tuple)
    ] = Field(description="side of square images, or height and width, null for other inputs")
    evaluation_size: Annotated[None | tuple[Positive, Positive], BeforeValidator(list_to_tuple)] = (
        Field(
            None,
            description="height and width of images in an evaluation, where they differ, or null",
        )
    )
    verify: Level = Field("full", description="how image files are checked before the first step")
    workers: Count = Field(1, description="processes that load the data")


class ResolvedOptim(Optim):
    """How every stage's optimizer moves, in numbers."""

    lr: NonNegative = Field(description="peak learning rate")
    milestones: Annotated[None | tuple[Positive, ...], BeforeValidator(list_to_tuple)] = Field(
        None, description="the first epoch of every lower rate; null with step is the older rule"
    )
    warmup_epochs: NonNegative = Field(description="epochs of warm-up")


class ResolvedRun(Run):
    """Where a run happens, its device and threads known."""

    device: Literal["cpu", "cuda"] = Field(description="what the stages run on")
    threads: Annotated[Positive | tuple[Positive, ...], BeforeValidator(list_to_tuple)] = Field(
        description="threads of a worker, or of each"
    )
    deterministic: bool = Field(description="deterministic kernels")


class Resolved(Config):
    """A whole configuration without `auto`. `pipeline.cuts` may still be `memory` or `time`.

    `plan.balanced_cuts` replaces those two by an explicit list.
    """

    model: ResolvedModel
    task: ResolvedTask
    method: ResolvedMethod
    pipeline: ResolvedPipeline
    data: ResolvedData
    optim: ResolvedOptim
    run: ResolvedRun

    @property
    def stages(self) -> int:
        """The number of stages."""
        return self.pipeline.stages

    @property
    def replicas(self) -> tuple[int, ...]:
        """The number of replicas of every stage, in the order of the stages."""
        return replica_counts(self)

    @property
    def threads(self) -> tuple[int, ...]:
        """The threads of every worker, by rank."""
        if isinstance(self.run.threads, tuple):
            return self.run.threads
        return (self.run.threads,) * self.pipeline.processes

    @property
    def workers_differ(self) -> bool:
        """Whether workers have devices or threads of their own, by which `cuts: time` cuts."""
        return self.pipeline.devices is not None or isinstance(self.run.threads, tuple)

    @property
    def reconciles(self) -> bool:
        """Whether neighbouring gradients are reconciled, as the function `reconciles` says."""
        return reconciles(self)

    @property
    def feeds_back(self) -> bool:
        """Whether parameters of later stages come back, as the function `feeds_back` says."""
        return feeds_back(self)

    @property
    def recovers(self) -> bool:
        """Whether a worker that dies is replaced, and the others go on."""
        return self.run.recover == "stage"

    @property
    def sample(self) -> tuple[int, ...]:
        """The shape of an input per sample: (C, H, W) of an image, C the length of data.mean."""
        if self.data.shape is not None:
            return self.data.shape
        channels = len(self.data.mean)
        size = self.data.image_size
        assert size is not None, "the size of images is known"
        if isinstance(size, tuple):
            return channels, *size
        return channels, size, size

    @property
    def evaluation_sample(self) -> tuple[int, ...] | None:
        """The shape of an input in an evaluation, None where it is that of `sample`."""
        if self.data.evaluation_size is None:
            return None
        return self.sample[0], *self.data.evaluation_size

    @property
    def evaluation_batch(self) -> int | None:
        """The samples of an evaluation message where they have another shape, else None.

        They have at most as many pixels as the training samples that one replica gets in a message,
        unless one sample has more.
        """
        if self.evaluation_sample is None:
            return None
        rows = self.data.batch_size // self.optim.accumulate // max(self.replicas)
        return max(1, rows * math.prod(self.sample) // math.prod(self.evaluation_sample))

    @property
    def inputs(self) -> fields.Field:
        """The field of a message that holds the inputs: the images of bytes, or other inputs."""
        if self.data.dtype is None:
            # A weighted sum of two images is no image of bytes.
            blends = read_words(self.data.augment).blends
            return fields.Field(fields.IMAGE, self.sample, "float32" if blends else "uint8")
        return fields.Field(fields.INPUT, self.sample, self.data.dtype)

    @property
    def only_waits(self) -> bool:
        """Whether the stages wait instead of computing, so that they may outnumber the cores."""
        return self.model.name == "chain"


def reconciles(config: Config) -> bool:
    """Return whether neighbouring gradients are reconciled.

    A distance of `none` or a weight of 0 is the axis off, and one stage has no neighbour.
    """
    reconcile = config.method.reconcile
    return reconcile.distance != "none" and reconcile.weight > 0 and count_stages(config) > 1


def feeds_back(config: Config) -> bool:
    """Return whether parameters of later stages come back. One stage has no later one."""
    return config.method.feedback.mode != "none" and count_stages(config) > 1


def least_replay(config: Config) -> int:
    """Return the fewest messages that an edge may keep under run.recover=stage.

    A worker writes a snapshot after half of them, at the end of a step. Half of them must hold the
    messages of one step, those that are in flight, and the one that is being written.
    """
    return 2 * (config.pipeline.depth + 1 + config.optim.accumulate)


def count_stages(config: Config) -> int:
    """Return the number of stages of the configuration.

    It follows from an explicit list of cuts. Else it is pipeline.stages, and 4 where that is None.
    """
    if isinstance(config.pipeline.cuts, tuple):
        return len(config.pipeline.cuts) + 1
    if config.pipeline.stages is None:
        return 4
    return config.pipeline.stages


def replica_counts(config: Config) -> tuple[int, ...]:
    """Return the number of replicas of every stage, in the order of the stages.

    A list in pipeline.replicas is returned as it is, also if its length is not the number of
    stages.
    """
    replicas = config.pipeline.replicas
    if isinstance(replicas, tuple):
        return replicas
    return (replicas,) * count_stages(config)


def take_workers(config: Config, processes: int) -> dict[str, object]:
    """Return the keys that leave the first `processes` workers of a configuration, for an update.

    Keys that list a value for each worker get as many values. Budgets are left out: they are for
    the stages that all workers share. processes: at most the workers.
    """
    keys: dict[str, object] = {"pipeline.processes": processes, "pipeline.memory": None}
    if config.pipeline.devices is not None:
        keys["pipeline.devices"] = list(config.pipeline.devices[:processes])
    if isinstance(config.run.threads, tuple):
        keys["run.threads"] = list(config.run.threads[:processes])
    return keys

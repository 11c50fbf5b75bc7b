"""A resolved configuration: every `auto` decided, and what follows from the keys alone."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from localpipe.config.keys import (
    Config,
    Data,
    Model,
    NonNegative,
    Optim,
    Pipeline,
    Positive,
    Run,
    as_tuple,
    list_to_tuple,
)

Numbers = Annotated[tuple[float, ...], BeforeValidator(as_tuple)]


class ResolvedModel(Model):
    """The network, its number of classes known."""

    num_classes: Positive = Field(description="classes")


class ResolvedPipeline(Pipeline):
    """Where the network is cut and who runs which part, in numbers."""

    stages: Positive = Field(description="gradient-isolated stages")
    processes: Positive = Field(description="workers")
    backend: Literal["gloo", "nccl"] = Field(description="what edges run over")


class ResolvedData(Data):
    """The data set, its images' shape and statistics known."""

    augment: Literal["none", "crop_flip", "crop", "resized_crop_flip"] = Field(
        description="augmentation of training images"
    )
    mean: Numbers = Field(description="per channel, of images in 0..1")
    std: Numbers = Field(description="per channel, of images in 0..1")
    image_size: Annotated[Positive | tuple[Positive, Positive], BeforeValidator(list_to_tuple)] = (
        Field(description="side of square images, or height and width")
    )


class ResolvedOptim(Optim):
    """How every stage's optimizer moves, in numbers."""

    lr: NonNegative = Field(description="peak learning rate")
    warmup_epochs: NonNegative = Field(description="epochs of warm-up")


class ResolvedRun(Run):
    """Where a run happens, its device and threads known."""

    device: Literal["cpu", "cuda"] = Field(description="what the stages run on")
    threads: Positive = Field(description="threads of a worker")
    deterministic: bool = Field(description="deterministic kernels")


class Resolved(Config):
    """A whole configuration without `auto`. `pipeline.cuts` may still be `memory` or `time`.

    `plan.measured_cuts` replaces those two by an explicit list.
    """

    model: ResolvedModel
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
        """The number of replicas of every stage."""
        return replica_counts(self)

    @property
    def reconciles(self) -> bool:
        """Whether neighbouring gradients are reconciled."""
        return reconciles(self)

    @property
    def image(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of an image."""
        size = self.data.image_size
        height, width = size if isinstance(size, tuple) else (size, size)
        return len(self.data.mean), height, width

    @property
    def only_waits(self) -> bool:
        """Whether the stages wait instead of computing, so that they may outnumber the cores."""
        return self.model.name == "chain"


def reconciles(config: Config) -> bool:
    """Return whether neighbouring gradients are reconciled.

    A weight of 0 is the axis off, and one stage has no neighbour.
    """
    reconcile = config.method.reconcile
    return reconcile.distance != "none" and reconcile.weight > 0 and count_stages(config) > 1


def count_stages(config: Config) -> int:
    """Return the number of stages that the configuration asks for."""
    if isinstance(config.pipeline.cuts, tuple):
        return len(config.pipeline.cuts) + 1
    return config.pipeline.stages if config.pipeline.stages is not None else 4


def replica_counts(config: Config) -> tuple[int, ...]:
    """Return the number of replicas of every stage."""
    replicas = config.pipeline.replicas
    return replicas if isinstance(replicas, tuple) else (replicas,) * count_stages(config)

"""What a network is trained for: the target of a sample, the loss, the metric, how exits read.

A task is a subclass of `Task`: one of localpipe's, or a user's own `package.module:Class`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from localpipe.fields import Field
from localpipe.tasks.layout import Grid
from localpipe.tasks.metric import ACCURACY, Metric

Predicted = Literal["class", "numbers", "more"]
# What a network gives in training: its main output, perhaps with others after it.
Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Task:
    """The base class of tasks, constructed with these fields by their names.

    num_classes: the outputs of a sample, a token or a place. grid: that of the network's patches,
    None where it declares none. sample: the shape of an input, (C, H, W) or (T,), per sample.
    options: an instance of the class's own `Options`, or the section `task` of the configuration.
    evaluation_sample: the shape of an input in an evaluation, None where it is the same.

    A subclass defines `target`, `losses` and `measure`. `metric` is the figure that it is judged
    by, and `figures` are the names of all that `summarise` gives, the metric's among them.
    """

    num_classes: int
    grid: Grid | None = None
    sample: tuple[int, ...] = ()
    options: Any = None
    evaluation_sample: tuple[int, ...] | None = None

    metric: ClassVar[Metric] = ACCURACY
    figures: ClassVar[tuple[str, ...]] = ("accuracy",)
    # How the loss reads a sample: as one, by its tokens, or by the places of a map.
    reads: ClassVar[Literal["sample", "token", "place"]] = "sample"
    # The keys of the section `task` that it reads.
    keys: ClassVar[tuple[str, ...]] = ()
    # What the outputs of a sample say, for a table of predictions: the class that is largest, the
    # numbers themselves, or more than fits into a row.
    predicts: ClassVar[Predicted] = "more"
    # Whether targets are one class index a sample, which losses over pairs of samples compare.
    has_labels: ClassVar[bool] = False
    # Whether the loss is a cross-entropy, whose gradients have a known scale.
    is_cross_entropy: ClassVar[bool] = True

    def in_mode(self, is_training: bool) -> Task:
        """Return the task of training batches or of evaluations, whose inputs may differ in shape.

        It is the task itself where they do not.
        """
        if is_training or self.evaluation_sample is None:
            return self
        return replace(self, sample=self.evaluation_sample, evaluation_sample=None)

    @property
    def target(self) -> Field:
        """The field of a message that holds the targets, (B, *target.shape)."""
        raise NotImplementedError

    @property
    def extra_outputs(self) -> tuple[str, ...]:
        """The keys of a network's outputs that `loss` reads beside the main one, where it has them.

        `loss` then gets a tuple, the main output first. Here there are none.
        """
        return ()

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape per sample of what the network gives: one output a class here."""
        return (self.num_classes,)

    def check_target(self, target: Tensor) -> None:
        """Raise UserError for a value that no loss takes. Here every value is taken.

        target: (B, *target.shape), on the CPU, of any integer dtype where the field has one.
        """

    def losses(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the loss of every sample, (B,), in fp32, differentiable in the outputs.

        outputs: as `to_outputs` gives them, of any float dtype. target: (B, *self.target.shape).
        """
        raise NotImplementedError

    def loss(self, outputs: Outputs, target: Tensor) -> Tensor:
        """Return the mean loss of the samples, a scalar. It is NaN for B = 0.

        outputs: as `losses` takes them, of a training step. A task with `extra_outputs` may get a
        tuple.
        """
        assert isinstance(outputs, Tensor), "a task with extra outputs has a loss of its own"
        return self.losses(outputs, target).mean()

    def measure(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return sums over the samples of a batch, by name, on the device of the outputs.

        They are added over all batches of an evaluation. So they are int64, or float64 sums of
        values per sample, of any shape that does not depend on B.
        """
        raise NotImplementedError

    def summarise(self, sums: Mapping[str, Tensor], samples: int) -> dict[str, float | None]:
        """Return the value of every name in `figures`, None where it has none.

        sums: of `measure`, over `samples` samples, at least 1. `loss` is among them, the float64
        sum of `losses`.
        """
        raise NotImplementedError

    def pool(self, h: Tensor) -> Tensor:
        """Return the features that an exit reads, (B, D) here: a mean over each sample's positions.

        h: in its standard form, (B, C, H, W), (B, T, D) or (B, D). Where the tokens have the grid,
        only the patches count. The class token belongs to the network's own head. (B, D) is
        returned itself, and so is any other shape. A task of tokens or places returns a row of
        features for each of them, (B, ..., D).
        """
        if h.dim() == 4:
            return h.mean((2, 3))
        if h.dim() != 3:
            return h
        prefix = None
        if self.grid is not None:
            prefix = self.grid.prefix_of(h.shape[1])
        return h[:, prefix or 0 :].mean(1)

    def features(self, shape: tuple[int, ...]) -> int:
        """Return D, the width of `pool`, for a shape (C, H, W), (T, D) or (D,) per sample.

        It is the second number of two, and otherwise the first.
        """
        is_tokens = len(shape) == 2
        if is_tokens:
            return shape[1]
        return shape[0]

    def to_outputs(self, rows: Tensor) -> Tensor:
        """Return what the loss takes, of the outputs of an exit for every row of `pool`.

        rows: (B, num_classes), or (B, ..., num_classes) of tokens or places. Here it is `rows`.
        """
        return rows


def read_exit(task: Task, network: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    """Return the outputs of a network on an activation's features, as the task's loss takes them.

    network: (rows, D) to (rows, num_classes). h: in its standard form, (B, ...).
    """
    features = task.pool(h)  # (B, D), or (B, ..., D) of tokens or places
    if features.dim() == 2:
        return task.to_outputs(network(features))
    rows: Tensor = network(features.flatten(0, -2))
    return task.to_outputs(rows.unflatten(0, features.shape[:-1]))


def measure_batch(task: Task, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Return `loss`, the float64 sum of the losses of a batch, and the sums of `task.measure`."""
    losses = task.losses(outputs, target)
    return {"loss": losses.double().sum(), **task.measure(outputs, target)}


def example_target(task: Task, rows: int, device: torch.device | str = "cpu") -> Tensor:
    """Return targets that every task takes, for measurements: classes 0 and 1 in turn, or zeros."""
    field = task.target
    dtype: torch.dtype = getattr(torch, field.dtype)
    shape = (rows, *field.shape)
    if dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype, device=device)
    classes = torch.arange(rows, device=device).remainder(min(2, task.num_classes)).to(dtype)
    return classes.view(rows, *[1] * len(field.shape)).expand(shape).clone()

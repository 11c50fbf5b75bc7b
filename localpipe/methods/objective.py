"""The local loss of a stage: an auxiliary network on its raw output.

The classifier of that network is called the stage's exit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from localpipe.errors import UserError
from localpipe.networks.blueprint import Blueprint
from localpipe.tasks.layout import Fold, Grid, grid_of, map_shape
from localpipe.tasks.task import Task

M = TypeVar("M", bound=nn.Module)


class RowGatherer(Protocol):
    """The replicas of a stage, as far as a local loss uses them."""

    def gathered(self, tensor: Tensor) -> Tensor:
        """Return the rows of all replicas in their order, differentiable.

        tensor: (rows of this replica, ...). Returns (rows of all replicas, ...). With one replica
        it is the tensor itself.
        """


@dataclass(frozen=True)
class Site:
    """The position of a local loss: after `last_block`, on activations of `shape` per sample.

    The activations have their standard form: (C, H, W), (T, D) or (D,), whatever the network's own
    layout.
    `stage` is 0-based. `stages` counts the last stage too, which has no local loss.

    `unit(name, build)` builds an auxiliary network under its own seed, for example
    site.unit("head", lambda: nn.Linear(64, 10)). It returns what `build` returns. Two units of a
    site with one name start from the same random numbers. A loss over pairs of samples gathers its
    rows from `replicas`, so that it is the loss of the full batch.
    """

    stage: int
    stages: int
    last_block: int
    shape: tuple[int, ...]
    blueprint: Blueprint
    unit: Callable[[str, Callable[[], M]], M]
    replicas: RowGatherer

    def example(self) -> Tensor:
        """Return an activation without values, (1, *shape), to infer the shapes of layers.

        It is a new fp32 tensor on the meta device.
        """
        return torch.empty(1, *self.shape, device="meta")

    @property
    def tokens(self) -> bool:
        """Whether the activations are tokens, (B, T, D), on a grid or not."""
        return len(self.shape) == 2

    @property
    def grid(self) -> Grid | None:
        """The grid of the activations' tokens, or None where they have none."""
        return grid_of(self.shape, self.blueprint.task.grid)

    @property
    def map(self) -> tuple[int, ...]:
        """The shape per sample inside `folded`: (D, h, w) for tokens on a grid, else `shape`."""
        return map_shape(self.shape, self.blueprint.task.grid)

    @property
    def reads_places(self) -> bool:
        """Whether the task's loss reads every place of a map, as segmentation's does."""
        return self.blueprint.task.reads == "place"

    def folded(self, network: nn.Module) -> nn.Module:
        """Return a network of maps as a network of this site's activations.

        Patch tokens are first folded to their grid. Without tokens on a grid, it is `network`
        itself.
        """
        grid = self.grid
        if grid is not None:
            return nn.Sequential(Fold(grid), network)
        return network

    @property
    def reads_tokens(self) -> bool:
        """Whether the task is read from every token, so that no head may mix tokens."""
        return self.blueprint.task.reads == "token"

    def check_tokens(self, name: str) -> None:
        """Raise UserError where the task reads tokens and the activations are not as many.

        name: of the objective, for the text.
        """
        task = self.blueprint.task
        if self.reads_tokens and (not self.tokens or self.shape[:1] != task.sample):
            raise UserError(
                f"objective: {name} has no rule for stage {self.stage}'s output of shape "
                f"{self.shape}; expected ({task.sample[0]}, D), an activation for every token that "
                "the task reads; move the cut, or set pipeline.stages=1"
            )

    def refuse(self, name: str, flat: bool = False) -> UserError:
        """Return, not raise, the error of an objective that has no rule for this activation.

        name: of the objective or its part, for the text. flat: whether it has a rule for (D,).
        """
        shapes = "(C, H, W)"
        if flat:
            shapes += ", (D,)"
        return UserError(
            f"objective: {name} has no rule for stage {self.stage}'s output of shape {self.shape}; "
            f"expected {shapes} or (T, D) of a network that says how its tokens lie; "
            "move the cut, or choose another objective"
        )

    def refuse_task(self, name: str) -> UserError:
        """Return, not raise, the error of an objective that compares samples by their classes.

        name: of the objective or its part, for the text.
        """
        task = self.blueprint.task
        task_name = getattr(task.options, "name", type(task).__name__.lower())
        if getattr(task.options, "targets", "index") == "probabilities":
            return UserError(
                f"objective: {name} compares samples by their classes, and the targets are "
                "probabilities, of the data or of mixup and cutmix in data.augment; choose another "
                "objective, or leave the mixtures out"
            )
        return UserError(
            f"objective: {name} compares samples by their classes, and task {task_name} has no "
            "class a sample; expected classification; choose another objective"
        )


def interpolate(pair: tuple[float, float], stage: int, stages: int) -> float:
    """Return the weight of a local stage, in a straight line over the local stages.

    pair: (first, last). stage: 0 .. stages - 2. The weight is pair[0] at stage 0 and pair[1] at the
    last local stage. With two stages it is pair[0]. Nothing is checked.
    """
    progress = 0.0
    if stages > 2:
        progress = stage / (stages - 2)
    return (1 - progress) * pair[0] + progress * pair[1]


class LocalLoss(nn.Module):
    """The base class of local losses, constructed from (options, site).

    A subclass sets `task`, and defines `Options`, a frozen dataclass, and `exit`. Its children are
    its auxiliary networks, and each of them takes h alone. h always has its standard form. The
    static methods are called on the class, before a stage is built.
    """

    task: Task

    @staticmethod
    def resolved(
        options: Any, network: str, data: str, cuts: str | tuple[int, ...], stages: int
    ) -> Any:
        """Return the options with every `auto` resolved, for a network, a data set and a cut.

        network, data: the names model.name and data.name. cuts: pipeline.cuts, which may be
        `memory` or `time`. A subclass raises UserError for options that do not fit. Here the
        options are returned as they are, and all other arguments are ignored.
        """
        return options

    @staticmethod
    def needs_image(options: Any, stage: int, stages: int) -> bool:
        """Return whether the loss of a local stage reads the input image. Here it is False.

        options: resolved. stage: 0 .. stages - 2. Where it is True, `forward` gets fields["image"].
        """
        return False

    @staticmethod
    def is_cross_entropy(options: Any) -> bool:
        """Return whether the loss is one cross-entropy, whose gradients have a known scale.

        options: may still have `auto`. Here it is True, so a subclass with another loss overrides
        it.
        """
        return True

    @staticmethod
    def is_over_pairs(options: Any) -> bool:
        """Return whether the loss compares samples of a batch, so that its value depends on B.

        Here it is False.
        """
        return False

    def exit(self, h: Tensor) -> Tensor | None:
        """Return the logits of the stage's classifier, or None where no classifier is trained.

        h: (B, *shape). Returns (B, classes). Here it raises NotImplementedError.
        """
        raise NotImplementedError

    def forward(self, h: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """Return the full weighted local loss, a scalar. Here it is the task's loss of the exit.

        h: (B, *shape). fields: the tensors of the message, `target` among them. Here it raises
        AssertionError if `exit` returns None, and KeyError without fields["target"].
        """
        logits = self.exit(h)
        assert logits is not None, "a loss without an exit brings its own forward"
        return self.task.loss(logits, fields["target"])


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Return a context for x's device in which autocast is off, so that fp32 products stay fp32.

    Only the device of x is read. A tensor of another dtype is not converted, and TF32 is not
    switched off.
    """
    return torch.autocast(autocast_device_type(x.device), enabled=False)


def autocast_device_type(device: torch.device) -> str:
    """Return the device type for torch.autocast, which has no meta device.

    It is `cpu` for the meta device, and otherwise device.type.
    """
    if device.type == "meta":
        return "cpu"
    return device.type

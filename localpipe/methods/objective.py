"""What a local loss is: an auxiliary network over a stage's raw output, and a classifier called the stage's exit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from localpipe.errors import UserError
from localpipe.networks.blueprint import Blueprint
from localpipe.tasks.classification import Classification
from localpipe.tasks.layout import Fold

M = TypeVar("M", bound=nn.Module)


class Replicas(Protocol):
    """The replicas of a stage, as a local loss sees them."""

    def gathered(self, tensor: Tensor) -> Tensor:
        """Return the rows of all replicas in their order, differentiable. tensor: (own rows, ...)."""


@dataclass(frozen=True)
class Site:
    """Where a local loss stands: behind `last_block`, on activations of the per-sample `shape`.

    `unit` builds an auxiliary network under a seed of its own: site.unit("head", lambda: nn.Linear(64, 10)). A loss over
    pairs of samples gathers them from `replicas`, so that it is the whole batch's.
    """

    stage: int
    stages: int
    last_block: int
    shape: tuple[int, ...]
    blueprint: Blueprint
    unit: Callable[[str, Callable[[], M]], M]
    replicas: Replicas

    def example(self) -> Tensor:
        """Return an activation without values, (1, *shape), to find the shapes that layers make of it."""
        return torch.empty(1, *self.shape, device="meta")

    @property
    def tokens(self) -> bool:
        """Whether the activations are (B, T, D)."""
        return len(self.shape) == 2

    @property
    def map(self) -> tuple[int, ...]:
        """The per-sample shape of the activations as `folded` networks see them."""
        grid = self.blueprint.task.grid
        return (self.shape[1], *grid.side) if self.tokens and grid is not None else self.shape

    def folded(self, network: nn.Module) -> nn.Module:
        """Return a network of maps as one of this site's activations: patch tokens are folded to their grid first."""
        grid = self.blueprint.task.grid
        return nn.Sequential(Fold(grid), network) if self.tokens and grid is not None else network

    def refuse(self, name: str, flat: bool = False) -> UserError:
        """Return the error of an objective that has no rule for this activation. flat: it has one for (D,)."""
        return UserError(
            f"objective: {name} has no rule for stage {self.stage}'s output of shape {self.shape}; "
            f"expected (C, H, W){', (D,)' if flat else ''} or (T, D) of a network that says how its tokens lie; move the cut, "
            "or choose another objective"
        )


def interpolate(pair: tuple[float, float], stage: int, stages: int) -> float:
    """Return a weight that moves from pair[0] at stage 0 to pair[1] at the last local stage; pair[0] at two stages."""
    share = stage / (stages - 2) if stages > 2 else 0.0
    return (1 - share) * pair[0] + share * pair[1]


class LocalLoss(nn.Module):
    """A local loss, made from (options, site). It sets `task` and brings `Options`, a frozen dataclass, and `exit`.

    Its children are its auxiliary networks; each takes h alone.
    """

    task: Classification

    @staticmethod
    def resolved(
        options: Any, network: str, data: str, cuts: str | tuple[int, ...], stages: int
    ) -> Any:
        """Return the options with every `auto` decided, for a network, a data set and a cut."""
        return options

    @staticmethod
    def needs_image(options: Any, stage: int, stages: int) -> bool:
        """Return whether the loss of a local stage looks at the input image."""
        return False

    @staticmethod
    def is_cross_entropy(options: Any) -> bool:
        """Return whether the whole loss is one cross-entropy, so that its gradients have a known scale."""
        return True

    @staticmethod
    def is_over_pairs(options: Any) -> bool:
        """Return whether the loss compares samples of a batch with each other, so that the batch's size shapes it."""
        return False

    def exit(self, h: Tensor) -> Tensor | None:
        """Return the logits of the stage's own classifier, (B, classes), or None where there is none that is trained."""
        raise NotImplementedError

    def forward(self, h: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """Return the whole weighted local loss, a scalar. h: (B, *shape); fields: what came with the message."""
        logits = self.exit(h)
        assert logits is not None, "a loss without an exit brings its own forward"
        return self.task.loss(logits, fields["target"])


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which products are fp32, whatever surrounds it: a loss is."""
    return torch.autocast(_kind(x.device), enabled=False)


def _kind(device: torch.device) -> str:
    return "cpu" if device.type == "meta" else device.type

"""What a local loss is: an auxiliary network over a stage's raw output, and a classifier called the stage's exit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from localpipe.blueprint import Blueprint
from localpipe.errors import UserError

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Site:
    """Where a local loss stands: behind `last_block`, on activations of the per-sample `shape`.

    `unit` builds an auxiliary network under a seed of its own: site.unit("head", lambda: nn.Linear(64, 10)).
    """

    stage: int
    stages: int
    last_block: int
    shape: tuple[int, ...]
    blueprint: Blueprint
    unit: Callable[[str, Callable[[], M]], M]

    def example(self) -> Tensor:
        """Return an activation without values, (1, *shape), to find the shapes that layers make of it."""
        return torch.empty(1, *self.shape, device="meta")

    def refuse(self, name: str) -> UserError:
        """Return the error of an objective that has no rule for this activation."""
        return UserError(
            f"objective: {name} has no rule for stage {self.stage}'s output of shape {self.shape}; "
            "expected (C, H, W) or (D,); move the cut, or choose another objective"
        )


class Objective(Protocol):
    """A local loss. An implementation is an nn.Module with a frozen `Options` dataclass, made from (options, site)."""

    def __call__(self, h: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """Return the whole weighted local loss, a scalar. h: (B, *shape); fields: what came with the message."""

    def exit(self, h: Tensor) -> Tensor | None:
        """Return the logits of the stage's own classifier, (B, classes), or None where there is none that is trained."""

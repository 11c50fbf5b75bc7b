"""What a network is for: how an exit pools, the loss, the metric. Image classification for now."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from localpipe.fields import Field
from localpipe.tasks.layout import Grid


@dataclass(frozen=True)
class Classification:
    """Cross-entropy over class indices; the metric is accuracy."""

    num_classes: int
    grid: Grid | None = (
        None  # how the tokens of (B, T, D) activations lie, where the network says so
    )

    @property
    def target(self) -> Field:
        """The target's place in a message: one class index a sample."""
        return Field("target", (), "int64")

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross-entropy. logits: (B, classes); target: (B,) int64."""
        return F.cross_entropy(logits.float(), target)

    def score(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the number of samples whose largest logit is the target's, a 0-dim int64 tensor."""
        return (logits.argmax(1) == target).sum()

    def pool(self, h: Tensor) -> Tensor:
        """Return (B, D) features of an activation: the mean over the places of (B, C, H, W) or the tokens of (B, T, D).

        Of the tokens of an image only its patches count: the class token is the network's own head's.
        """
        if h.dim() == 4:
            return h.mean((2, 3))
        if h.dim() == 3:
            return (h if self.grid is None else self.grid.patches(h)).mean(1)
        return h

    def features(self, shape: tuple[int, ...]) -> int:
        """Return D of `pool` for an activation of this per-sample shape."""
        return shape[-1] if len(shape) == 2 else shape[0]


def fraction(correct: Tensor | int, samples: int) -> float:
    """Return a fraction in 0..1."""
    return float(correct) / samples

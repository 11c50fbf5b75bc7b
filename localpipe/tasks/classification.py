"""Image classification: cross-entropy over class indices, and accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from localpipe.fields import Field
from localpipe.tasks.layout import Grid


@dataclass(frozen=True)
class Classification:
    """The `Task` of one class index a sample. The loss is cross-entropy, the metric accuracy."""

    num_classes: int
    # The grid of the network's patches, where it declares one. Their prefix follows from T.
    grid: Grid | None = None

    @property
    def target(self) -> Field:
        """The field of the class indices: name `target`, shape () per sample, dtype int64."""
        return Field("target", (), "int64")

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross-entropy, a scalar in fp32, differentiable in the logits.

        logits: (B, classes), of any float dtype. target: (B,) int64. It is NaN for B = 0. On the
        CPU, torch raises IndexError for a target that is not a class.
        """
        return F.cross_entropy(logits.float(), target)

    def score(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the number of samples whose largest logit is the target's, a 0-dim int64 tensor.

        logits: (B, classes). target: (B,) int64. It is 0 for B = 0.
        """
        return (logits.argmax(1) == target).sum()

    def pool(self, h: Tensor) -> Tensor:
        """Return the features of an activation, (B, D): the mean over the positions of each sample.

        h: in its standard form, (B, C, H, W), (B, T, D) or (B, D). Where the tokens have the grid,
        only the patches count. The class token belongs to the network's own head. (B, D) is
        returned itself, and so is any other shape.
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


def fraction(correct: Tensor | int, samples: int) -> float:
    """Return the fraction of correct samples, in 0..1.

    correct: a number or a 0-dim tensor, on any device. Raises ZeroDivisionError if samples is 0.
    """
    return float(correct) / samples

"""The contract of a task: the target of a sample, the loss, the metric and the pooling of exits.

Networks, local losses, stages and probes accept any object that satisfies `Task`.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from localpipe.fields import Field
from localpipe.tasks.layout import Grid


class Task(Protocol):
    """What a network is trained for.

    The loss is a mean over samples, and the metric a count of samples. Shapes: B samples, and
    activations h in their standard form, (B, C, H, W), (B, T, D) or (B, D).
    """

    @property
    def num_classes(self) -> int:
        """The number of logits of a sample."""

    @property
    def grid(self) -> Grid | None:
        """The grid of the network's patches, or None where it is unknown.

        (B, T, D) activations have it where `Grid.at` says so.
        """

    @property
    def target(self) -> Field:
        """The field of a message that holds the targets, (B, *target.shape)."""

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of the samples, a differentiable scalar in fp32.

        logits: (B, num_classes), of any float dtype. target: (B, *self.target.shape), of the dtype
        of `self.target`.
        """

    def score(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the number of samples that are right, a 0-dim int64 tensor.

        It lies on the device of the logits. logits: (B, num_classes). target: (B,
        *self.target.shape).
        """

    def pool(self, h: Tensor) -> Tensor:
        """Return the features of an activation, (B, D), of the dtype of h.

        h: (B, C, H, W), (B, T, D) or (B, D).
        """

    def features(self, shape: tuple[int, ...]) -> int:
        """Return D, the width of `pool`, for activations of a shape per sample.

        shape: (C, H, W), (T, D) or (D,).
        """

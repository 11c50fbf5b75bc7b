"""Regression: the distance to a target of numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from localpipe.fields import Field
from localpipe.tasks.metric import Metric
from localpipe.tasks.task import Predicted, Task

_DISTANCES: Mapping[str, Callable[..., Tensor]] = {
    "mse": F.mse_loss,
    "mae": F.l1_loss,
    "huber": F.huber_loss,
}


@dataclass(frozen=True)
class Regression(Task):
    """The task of numbers: `num_classes` outputs a sample. The metric is the loss, lower is better.

    task.loss is `mse`, the squared difference, `mae`, the absolute one, or `huber`, half the square
    below 1 and linear above.
    """

    predicts: ClassVar[Predicted] = "numbers"
    keys: ClassVar[tuple[str, ...]] = ("loss",)
    is_cross_entropy: ClassVar[bool] = False

    @property
    def _distance(self) -> str:
        name: str = getattr(self.options, "loss", "mse")
        return name

    @property
    def metric(self) -> Metric:  # type: ignore[override]
        """The loss by its name, lower is better."""
        return Metric(self._distance, "lower")

    @property
    def figures(self) -> tuple[str, ...]:  # type: ignore[override]
        """The name of the loss."""
        return (self._distance,)

    @property
    def target(self) -> Field:
        """The field of the numbers: name `target`, shape (outputs,) per sample, dtype float32."""
        return Field("target", (self.num_classes,), "float32")

    def losses(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the distance of every sample, (B,), in fp32, differentiable in the outputs.

        outputs: (B, outputs), of any float dtype. target: (B, outputs). It is the mean over a
        sample's outputs.
        """
        distance = _DISTANCES[self._distance]
        return distance(outputs.float(), target, reduction="none").mean(1)

    def measure(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return nothing: the sum of the losses is the sum of the metric."""
        return {}

    def summarise(self, sums: Mapping[str, Tensor], samples: int) -> dict[str, float | None]:
        """Return the mean loss by its name."""
        return {self._distance: float(sums["loss"]) / samples}

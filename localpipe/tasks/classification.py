"""Classification: cross-entropy over class indices or probabilities, and accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from localpipe.errors import UserError
from localpipe.fields import Field
from localpipe.tasks.metric import ACCURACY, TOP5_ACCURACY
from localpipe.tasks.task import Predicted, Task

_FIRST = 5


@dataclass(frozen=True)
class Classification(Task):
    """The task of one class a sample. The loss is cross-entropy, the metric accuracy.

    task.targets is `index`, the class, or `probabilities`, one of every class. Of those the most
    probable class counts for the accuracy.
    """

    predicts: ClassVar[Predicted] = "class"
    keys: ClassVar[tuple[str, ...]] = ("targets", "label_smoothing", "class_weights")

    def __post_init__(self) -> None:
        weights = self._weights
        if weights is not None and len(weights) != self.num_classes:
            raise UserError(
                f"task: task.class_weights has {len(weights)} numbers, but there are "
                f"{self.num_classes} classes; give one number a class"
            )

    @property
    def _weights(self) -> tuple[float, ...] | None:
        weights = getattr(self.options, "class_weights", "none")
        return weights if isinstance(weights, tuple) else None

    @property
    def _smoothing(self) -> float:
        smoothing: float = getattr(self.options, "label_smoothing", 0.0)
        return smoothing

    @property
    def _is_soft(self) -> bool:
        return getattr(self.options, "targets", "index") == "probabilities"

    @property
    def figures(self) -> tuple[str, ...]:  # type: ignore[override]
        """`accuracy`, and of more than five classes `top5_accuracy`."""
        if self.num_classes > _FIRST:
            return (ACCURACY.name, TOP5_ACCURACY.name)
        return (ACCURACY.name,)

    @property
    def has_labels(self) -> bool:  # type: ignore[override]
        """Whether targets are class indices."""
        return not self._is_soft

    @property
    def target(self) -> Field:
        """The field `target`: () of int64 per sample, or (classes,) of float32 probabilities."""
        if self._is_soft:
            return Field("target", (self.num_classes,), "float32")
        return Field("target", (), "int64")

    def losses(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of every sample, (B,), in fp32, differentiable in the outputs.

        outputs: (B, classes), of any float dtype. target: (B,) int64, or (B, classes) float32. A
        sample's loss is that of its smoothed target, every class of it times the weight of the
        class. On the CPU, torch raises IndexError for a target that is not a class.
        """
        return F.cross_entropy(
            outputs.float(),
            target,
            self._find_weights(outputs.device),
            reduction="none",
            label_smoothing=self._smoothing,
        )

    def _find_weights(self, device: torch.device) -> Tensor | None:
        """Return the weights of the classes on a device. Graphs need that they are copied once."""
        if self._weights is None:
            return None
        if device not in self._copies:
            self._copies[device] = torch.tensor(self._weights, device=device)
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        return {}

    def measure(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return numbers of samples, int64: `correct`, whose largest output is the target's.

        Of more than five classes, `among_first` too: those whose target is among the five largest.
        """
        classes = target.argmax(1) if self._is_soft else target
        sums = {"correct": (outputs.argmax(1) == classes).sum()}
        if TOP5_ACCURACY.name in self.figures:
            sums["among_first"] = (_find_rank(outputs, classes) < _FIRST).sum()
        return sums

    def summarise(self, sums: Mapping[str, Tensor], samples: int) -> dict[str, float | None]:
        """Return `accuracy`, and of more than five classes `top5_accuracy`, in 0..1."""
        figures: dict[str, float | None] = {ACCURACY.name: float(sums["correct"]) / samples}
        if "among_first" in sums:
            figures[TOP5_ACCURACY.name] = float(sums["among_first"]) / samples
        return figures


def _find_rank(outputs: Tensor, classes: Tensor) -> Tensor:
    """Return how many outputs of a sample precede that of its class, (B,) int64, 0 for the largest.

    outputs: (B, classes). classes: (B,) int64. Of equal outputs the lower index comes first. So
    every device counts the same where logits of few bits are equal, which `topk` does not promise.
    """
    own = outputs.gather(1, classes[:, None])  # (B, 1)
    indices = torch.arange(outputs.shape[1], device=outputs.device)
    is_tied_before = (outputs == own) & (indices < classes[:, None])
    # An output that is not a number precedes every number, as for argmax.
    is_larger = ~(outputs <= own)
    return (is_larger | is_tied_before).sum(1)

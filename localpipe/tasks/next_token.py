"""Next-token prediction: cross-entropy of every token, and bits per byte or per token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from localpipe.errors import UserError
from localpipe.fields import Field
from localpipe.tasks.metric import Metric
from localpipe.tasks.task import Task

BYTES = 256  # the vocabulary whose tokens are bytes


@dataclass(frozen=True)
class NextToken(Task):
    """The task of one class index a token: the token that follows. sample: (T,).

    num_classes: the vocabulary. A vocabulary of 256 is that of bytes, so the metric is bits per
    byte. Else it is bits per token. Tokens with a target below 0 do not count. Raises UserError for
    samples that are no tokens (T,).
    """

    reads: ClassVar[Literal["sample", "token", "place"]] = "token"
    keys: ClassVar[tuple[str, ...]] = ("average",)

    def __post_init__(self) -> None:
        if len(self.sample) != 1:
            raise UserError(
                f"task: next_token reads tokens, samples of shape (T,); got shape {self.sample}; "
                "choose another task.name or data.name"
            )

    @property
    def metric(self) -> Metric:  # type: ignore[override]
        """Bits per byte or per token, where lower is better."""
        unit = "byte" if self.num_classes == BYTES else "token"
        return Metric(f"bits_per_{unit}", "lower")

    @property
    def figures(self) -> tuple[str, ...]:  # type: ignore[override]
        """The metric's name, and `accuracy`: the share of tokens whose largest output is right."""
        return self.metric.name, "accuracy"

    @property
    def target(self) -> Field:
        """The field of the next tokens: name `target`, shape (T,) per sample, dtype int64."""
        return Field("target", self.sample, "int64")

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape per sample of what the network gives: (T, vocabulary)."""
        return (*self.sample, self.num_classes)

    def losses(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the loss of every sample, (B,), in fp32, differentiable in the outputs.

        outputs: (B, T, vocabulary), of any float dtype. target: (B, T) int64. It is the sum of the
        tokens' cross-entropies over T. With task.average `valid` it is the sum over the number of
        tokens that count, and 0 where none does.
        """
        sums = self._token_losses(outputs, target).sum(1)
        if getattr(self.options, "average", "all") == "valid":
            return sums / (target >= 0).sum(1).clamp_min(1)
        return sums / target.shape[1]

    def _token_losses(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of every token in fp32, (B, T), 0 where it does not count."""
        # The loss of rows has a deterministic kernel on CUDA.
        rows = outputs.float().flatten(0, 1)
        losses = F.cross_entropy(rows, target.clamp_min(0).flatten(), reduction="none")
        return losses.view_as(target).masked_fill(target < 0, 0.0)

    def measure(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return sums over the tokens that count.

        They are `nats`, the float64 sum of their cross-entropies, `correct` and `tokens`, int64.
        """
        return {
            "nats": self._token_losses(outputs, target).double().sum(),
            "correct": (outputs.argmax(2) == target).sum(),
            "tokens": (target >= 0).sum(),
        }

    def summarise(self, sums: Mapping[str, Tensor], samples: int) -> dict[str, float | None]:
        """Return the bits per byte or token, and `accuracy`, in 0..1; None where none counts."""
        tokens = int(sums["tokens"])
        if tokens == 0:
            return dict.fromkeys(self.figures)
        bits = float(sums["nats"]) / math.log(2) / tokens
        return {self.metric.name: bits, "accuracy": int(sums["correct"]) / tokens}

    def pool(self, h: Tensor) -> Tensor:
        """Return the features of every token, (B, T, D): h itself. h: in its standard form."""
        return h

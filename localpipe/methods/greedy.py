"""Greedy supervised learning: global pooling and one linear layer on the output of every stage.

InfoPro's name for this head is `0c1f`. Of tokens, the mean of the patches is used, without the
class token. That is not published.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from localpipe.methods.heads import build_head
from localpipe.methods.objective import LocalLoss, Site


class Greedy(LocalLoss):
    """The plainest local loss: the task's loss of a linear classifier on pooled features.

    It has a rule for every activation without an empty dimension: (C, H, W), (T, D) and (D,).
    """

    @dataclass(frozen=True)
    class Options:
        """There are no options."""

    def __init__(self, options: Options, site: Site) -> None:
        super().__init__()
        self.task = site.blueprint.task
        self.head = build_head("0c1f", site)

    def exit(self, h: Tensor) -> Tensor:
        """Return the head's logits, (B, classes). h: (B, C, H, W), (B, T, D) or (B, D)."""
        logits: Tensor = self.head(h)
        return logits

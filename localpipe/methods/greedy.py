"""Greedy supervised learning: global pooling and one linear layer over every stage (`0c1f` in InfoPro's words).

Of tokens the mean over the patches is taken, without the class token; that is not published.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from localpipe.methods.heads import build_head
from localpipe.methods.objective import LocalLoss, Site


class Greedy(LocalLoss):
    """The plainest local loss: the task's loss of a linear classifier on pooled features."""

    @dataclass(frozen=True)
    class Options:
        """Greedy has none."""

    def __init__(self, options: Options, site: Site) -> None:
        super().__init__()
        self.task = site.blueprint.task
        self.head = build_head("0c1f", site)

    def exit(self, h: Tensor) -> Tensor:
        """Return the head's logits, (B, classes). h: (B, C, H, W), (B, T, D) or (B, D)."""
        logits: Tensor = self.head(h)
        return logits

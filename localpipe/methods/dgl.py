"""Decoupled greedy learning (Belilovsky et al. 2020): a small auxiliary network on every stage.

The local loss is the task's loss of that network. The rules for tokens, in `heads`, are not
published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from localpipe.methods.dgl_heads import HEADS, build_own_head
from localpipe.methods.heads import build_head
from localpipe.methods.objective import LocalLoss, Site


class DGL(LocalLoss):
    """The task's loss of an auxiliary network.

    `head: mlp` is the pooled MLP of AugLocal's released code. `dgl_mlp_sr`, `dgl_mlp` and `dgl_cnn`
    are those of DGL's own. `1c2f` is ContSup's baseline R0. The constructor raises UserError if the
    head has no rule for the activation's shape.
    """

    @dataclass(frozen=True)
    class Options:
        """The choice of the auxiliary network."""

        head: Annotated[
            Literal[
                "mlp",
                "0c1f",
                "0c2f",
                "1c1f",
                "1c2f",
                "1c3f",
                "2c2f",
                "dgl_mlp_sr",
                "dgl_mlp",
                "dgl_cnn",
            ],
            Field(
                description="the auxiliary network: a pooled MLP as AugLocal's code has it, N "
                "convolutions and M linear layers, NcMf, or one of DGL's own"
            ),
        ] = "mlp"

    def __init__(self, options: Options, site: Site) -> None:
        super().__init__()
        self.task = site.blueprint.task
        if options.head in HEADS:
            self.head = build_own_head(options.head, site)
        else:
            self.head = build_head(options.head, site)

    def exit(self, h: Tensor) -> Tensor:
        """Return the head's logits, (B, classes). h: (B, C, H, W), (B, T, D) or (B, D)."""
        logits: Tensor = self.head(h)
        return logits

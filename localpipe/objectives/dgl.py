"""Decoupled greedy learning (Belilovsky et al. 2020): the task's loss of a small auxiliary network over every stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from localpipe.objectives import head
from localpipe.objectives.greedy import Greedy
from localpipe.objectives.objective import Site


class DGL(Greedy):
    """`head: mlp` is the pooled MLP of AugLocal's released code; `1c2f` is ContSup's baseline R0."""

    @dataclass(frozen=True)
    class Options:
        """Which auxiliary network."""

        head: Literal["mlp", "0c1f", "0c2f", "1c1f", "1c2f", "1c3f", "2c2f"] = "mlp"

    def __init__(self, options: Options, site: Site) -> None:
        nn.Module.__init__(self)
        self.task = site.blueprint.task
        self.head = head.build(options.head, site)

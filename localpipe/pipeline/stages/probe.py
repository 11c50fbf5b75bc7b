"""A pooled linear probe on a stage's detached output: what a linear reader finds there, without touching the stage.

Its initial weights come from a random stream of its own, its optimizer is its own, and training it draws nothing; it is in no
count and no digest. It learns from every message, one step each; of replicas, from the first one's rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from localpipe import seeds
from localpipe.tasks.classification import Classification

RATE = 1e-3


class Probe:
    """Batch-normalised pooled features and one linear layer, trained by Adam on the task's loss."""

    def __init__(
        self,
        shape: tuple[int, ...],
        task: Classification,
        seed: int,
        stage: int,
        device: torch.device | str = "cpu",
    ) -> None:
        features = task.features(shape)

        def build() -> nn.Sequential:
            return nn.Sequential(
                nn.BatchNorm1d(features, affine=False), nn.Linear(features, task.num_classes)
            )

        self.task = task
        self.network = seeds.build_seeded(seed, f"probe.{stage}", build).to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=RATE)

    def learn(self, h: Tensor, target: Tensor) -> None:
        """Take one step. h: (B, *shape), a constant here; target: (B,)."""
        self.network.train()
        loss = self.task.loss(self.network(self.task.pool(h.detach().float())), target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def score(self, h: Tensor, target: Tensor) -> Tensor:
        """Return how many samples the probe has right."""
        self.network.eval()
        with torch.no_grad():
            return self.task.score(self.network(self.task.pool(h.float())), target)

    def state(self) -> dict[str, Any]:
        """Return what a resume needs."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])

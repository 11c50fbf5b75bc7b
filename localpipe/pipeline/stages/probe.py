"""A pooled linear probe on a stage's detached output, which never changes the stage.

It measures how well a linear classifier separates the classes at that point. Its initial weights
come from a random stream of its own, its optimizer is its own, and its training draws no random
numbers. No count and no digest includes it. It takes one step for every message. Of several
replicas, it sees the rows of the first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from localpipe import seeds
from localpipe.tasks.task import Task, measure_batch, read_exit

RATE = 1e-3


class Probe:
    """Pooled features, a batch normalisation and a linear layer, trained by Adam.

    shape: of the stage's output per sample, (C, H, W), (T, D) or (D,). seed, stage: determine the
    initial weights. device: that of the stage's outputs.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        task: Task,
        seed: int,
        stage: int,
        device: torch.device | str = "cpu",
    ) -> None:
        features = task.features(shape)

        def build_network() -> nn.Sequential:
            norm = nn.BatchNorm1d(features, affine=False)
            return nn.Sequential(norm, nn.Linear(features, task.num_classes))

        self.task = task
        self.network = seeds.build_unit(seed, f"probe.{stage}", build_network).to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=RATE)

    def learn(self, h: Tensor, target: Tensor) -> None:
        """Take one step. h: (B, *shape), a constant here. target: (B, *task.target.shape).

        B is at least 2: the batch normalisation raises ValueError for one sample.
        """
        self.network.train()
        loss = self.task.loss(read_exit(self.task, self.network, h.detach().float()), target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def measure(self, h: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the sums of a batch, as `measure_batch` does. h: (B, *shape)."""
        self.network.eval()
        with torch.no_grad():
            task = self.task.in_mode(is_training=False)
            return measure_batch(task, read_exit(task, self.network, h.float()), target)

    def state(self) -> dict[str, Any]:
        """Return the network's and the optimizer's state, for a checkpoint.

        The keys are `network` and `optimizer`. The tensors are the probe's own, not copies.
        """
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Load the result of `state`.

        Raises KeyError if a key is missing, and RuntimeError or ValueError if a state does not fit.
        """
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])

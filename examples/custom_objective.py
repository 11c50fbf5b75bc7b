"""Your own local loss on your own network: `python examples/custom_objective.py`.

`localpipe train examples/custom_objective.yaml` does the same. Every stage has one learned
prototype for each class, and an image belongs to the nearest one. (Snell et al. 2017 use means
instead of learned points.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from localpipe import LocalLoss, Site, configuration, train


class Nearest(nn.Module):
    """(B, C, H, W) to logits (B, classes).

    A logit is minus the squared distance of the pooled features to a prototype.
    """

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(classes, features))

    def forward(self, h: Tensor) -> Tensor:
        pooled = h.mean((2, 3))
        return -(pooled[:, None] - self.prototypes).square().sum(2)


class Prototypes(LocalLoss):
    """The task's loss of the distances, sharper with a lower temperature."""

    @dataclass(frozen=True)
    class Options:
        """The options of `method.objective`, checked like every other key."""

        temperature: float = 1.0

    def __init__(self, options: Options, site: Site) -> None:
        super().__init__()
        self.task, self.temperature = site.blueprint.task, options.temperature
        self.head = site.unit("head", lambda: Nearest(site.shape[0], self.task.num_classes))

    def exit(self, h: Tensor) -> Tensor:
        """Return the logits of the stage's own classifier; its cross-entropy is the local loss."""
        logits: Tensor = self.head(h) / self.temperature
        return logits


class Residual(nn.Module):
    """A block of an ordinary nn.Module's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.body(x)
        return x + change


class Classifier(nn.Module):
    """An ordinary nn.Module, with a forward of its own."""

    def __init__(self, num_classes: int, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.layers = nn.ModuleList(Residual(width) for _ in range(3))
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def blocks(num_classes: int) -> nn.Sequential:
    """Return the same network as a row of blocks and, last, a head. localpipe needs no more."""
    network = Classifier(num_classes)
    return nn.Sequential(
        network.stem,
        *network.layers,
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), network.fc),
    )


if __name__ == "__main__":
    config = configuration(
        {
            "model": {"name": blocks},
            "method": {"objective": {"name": Prototypes, "temperature": 0.5}},
            "pipeline": {"stages": 2, "processes": 2},
            "data": {"name": "digits", "batch_size": 64},
            "optim": {"lr": 0.05, "schedule": "cosine_step", "epochs": 2},
            "run": {"dir": "runs/custom_objective", "threads": 1},
        }
    )
    print("accuracy of every exit:", train(config)["test_accuracy_per_stage"])

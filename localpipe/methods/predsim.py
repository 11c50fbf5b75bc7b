"""PredSim (Noekland and Eidnes, ICML 2019): similarity matching and prediction, as AugLocal's released code has it.

For tokens nothing is published: here a linear layer without bias stands for the convolution, the deviation runs over the
patch tokens, and the classifier's pooling over their grid; the class token is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from localpipe.methods.objective import LocalLoss, Site, full_precision
from localpipe.networks.layers import init_convolutions, pool_to
from localpipe.tasks.layout import Grid

SIMILARITY_WEIGHT = 0.99
WIDEST = 512  # features of the classifier's input


class Similarity(nn.Module):
    """A 3x3 convolution without bias, then the deviation of every channel over the places; (B, C, H, W) to (B, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        init_convolutions(self)

    def forward(self, h: Tensor) -> Tensor:
        return deviation(self.conv(h).flatten(2), 2)


class TokenSimilarity(nn.Module):
    """A linear layer without bias, then the deviation of every feature over the patch tokens; (B, T, D) to (B, D)."""

    def __init__(self, grid: Grid, width: int) -> None:
        super().__init__()
        self.grid = grid
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return deviation(self.linear(self.grid.patches(h)), 1)


def deviation(x: Tensor, dim: int) -> Tensor:
    """Return the deviation along a dimension, in fp32; of one place, the place itself, as the original has it.

    A small constant keeps the root differentiable where x is flat."""
    if x.shape[dim] == 1:
        return x.float().squeeze(dim)
    return (x.float().var(dim) + 1e-8).sqrt()


class Predictor(nn.Module):
    """Average pooling, then one linear layer; (B, C, H, W) to (B, classes)."""

    def __init__(self, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        kernel = pool_kernel(shape)
        self.places = (shape[1] // kernel[0], shape[2] // kernel[1])
        self.fc = nn.Linear(shape[0] * math.prod(self.places), num_classes)

    def forward(self, h: Tensor) -> Tensor:
        logits: Tensor = self.fc(
            pool_to(h, self.places).flatten(1)
        )  # every place counts, also where sizes do not divide
        return logits


def pool_kernel(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the kernel whose height, then width, doubles in turn until C * h * w <= 512. shape: (C, H, W)."""
    kernel = [1, 1]
    turn = 0
    while math.prod((shape[0], shape[1] // kernel[0], shape[2] // kernel[1])) > WIDEST:
        if shape[1 + turn] // (2 * kernel[turn]) < 1:
            if shape[2 - turn] // (2 * kernel[1 - turn]) < 1:
                break  # one place is left, however many channels it has
        else:
            kernel[turn] *= 2
        turn = 1 - turn
    return kernel[0], kernel[1]


def similarity_matrix(x: Tensor) -> Tensor:
    """Return the cosine similarities of mean-centred rows, clamped to -1..1. x: (B, D); returns (B, B)."""
    centred = F.normalize(x - x.mean(1, keepdim=True), dim=1, eps=1e-8)
    with full_precision(x):
        return (centred @ centred.T).clamp(-1.0, 1.0)


def _similarity(site: Site) -> nn.Module:
    grid = site.blueprint.task.grid
    return (
        TokenSimilarity(grid, site.shape[1])
        if site.tokens and grid is not None
        else Similarity(site.shape[0])
    )


class PredSim(LocalLoss):
    """0.99 times the squared distance of two similarity matrices, 0.01 times the task's loss."""

    @dataclass(frozen=True)
    class Options:
        """The published weights are fixed; there are no options."""

    def __init__(self, options: Options, site: Site) -> None:
        super().__init__()
        if len(site.map) != 3:
            raise site.refuse("predsim")
        self.task, self.replicas = site.blueprint.task, site.replicas
        self.similarity: nn.Module = site.unit("similarity", lambda: _similarity(site))
        self.predictor = site.unit(
            "predictor", lambda: site.folded(Predictor(site.map, self.task.num_classes))
        )

    @staticmethod
    def is_cross_entropy(options: Options) -> bool:
        """Return that it is not."""
        return False

    @staticmethod
    def is_over_pairs(options: Options) -> bool:
        """Return that it is."""
        return True

    def forward(self, h: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted loss. h: (B, C, H, W) or (B, T, D); fields["target"]: (B,) class indices."""
        target = fields["target"]
        everyone = self.replicas.gathered(target)
        wanted = similarity_matrix(F.one_hot(everyone, self.task.num_classes).float())
        distance = F.mse_loss(similarity_matrix(self.replicas.gathered(self.similarity(h))), wanted)
        prediction = self.task.loss(self.predictor(h), target)
        return SIMILARITY_WEIGHT * distance + (1 - SIMILARITY_WEIGHT) * prediction

    def exit(self, h: Tensor) -> Tensor:
        """Return the classifier's logits, (B, classes)."""
        logits: Tensor = self.predictor(h)
        return logits

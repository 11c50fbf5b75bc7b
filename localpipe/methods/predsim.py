"""PredSim (Noekland and Eidnes, ICML 2019): similarity matching and prediction.

It follows AugLocal's released code. For tokens nothing is published. Here a linear layer without
bias replaces the convolution. The deviation is taken over the patch tokens, and the classifier
pools over their grid. The class token is left out. Of tokens without a grid, the deviation is taken
over all of them, and the classifier takes their mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from localpipe.methods.heads import ConvHead
from localpipe.methods.objective import LocalLoss, Site, full_precision
from localpipe.networks.layers import init_convolutions, normalise_rows, pool_to
from localpipe.tasks.layout import Grid

SIMILARITY_WEIGHT = 0.99
WIDEST = 512  # features of the classifier's input


class Similarity(nn.Module):
    """A 3x3 convolution without bias, then the deviation of every channel over the positions.

    (B, C, H, W) to (B, C).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        init_convolutions(self)

    def forward(self, h: Tensor) -> Tensor:
        """Return the deviations in fp32, (B, C)."""
        return deviation(self.conv(h).flatten(2), 2)


class TokenSimilarity(nn.Module):
    """A linear layer without bias, then the deviation of every feature over the patch tokens.

    (B, T, D) to (B, D). grid: None where all tokens count.
    """

    def __init__(self, grid: Grid | None, width: int) -> None:
        super().__init__()
        self.grid = grid
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """Return the deviations in fp32, (B, D)."""
        if self.grid is not None:
            h = self.grid.patches(h)
        return deviation(self.linear(h), 1)


def deviation(x: Tensor, dim: int) -> Tensor:
    """Return the standard deviation along a dimension, in fp32, without that dimension.

    It is the unbiased one. Along a dimension of size 1 it is x itself, as the original has it. A
    small constant keeps the root differentiable where x is constant.
    """
    if x.shape[dim] == 1:
        return x.float().squeeze(dim)
    return (x.float().var(dim) + 1e-8).sqrt()


class Predictor(nn.Module):
    """Average pooling, then one linear layer: (B, C, H, W) to (B, classes).

    shape: (C, H, W). `pool_kernel` gives the size after pooling.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        kernel = pool_kernel(shape)
        self.size = (shape[1] // kernel[0], shape[2] // kernel[1])
        self.fc = nn.Linear(shape[0] * math.prod(self.size), num_classes)

    def forward(self, h: Tensor) -> Tensor:
        """Return the logits, (B, classes)."""
        # Every position counts, also where the sizes do not divide.
        features = pool_to(h, self.size).flatten(1)
        logits: Tensor = self.fc(features)
        return logits


def pool_kernel(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the pooling kernel (height, width) that leaves at most 512 features.

    shape: (C, H, W). The kernel's height, then its width, doubles in turn until C * h * w <= 512.
    With more than 512 channels, one position is left.
    """
    kernel = [1, 1]
    axis = 0
    while math.prod((shape[0], shape[1] // kernel[0], shape[2] // kernel[1])) > WIDEST:
        can_double = shape[1 + axis] // (2 * kernel[axis]) >= 1
        can_double_other = shape[2 - axis] // (2 * kernel[1 - axis]) >= 1
        if can_double:
            kernel[axis] *= 2
        elif not can_double_other:
            # One position is left, however many channels it has.
            break
        axis = 1 - axis
    return kernel[0], kernel[1]


def similarity_matrix(x: Tensor) -> Tensor:
    """Return the cosine similarities of mean-centred rows, clamped to -1..1.

    x: (B, D). Returns (B, B). The mean of a row is over its D numbers. A constant row has
    similarity 0 to every row.
    """
    centred = normalise_rows(x - x.mean(1, keepdim=True), eps=1e-8)
    with full_precision(x):
        return (centred @ centred.T).clamp(-1.0, 1.0)


def _build_similarity(site: Site) -> nn.Module:
    if site.tokens:
        return TokenSimilarity(site.grid, site.shape[1])
    return Similarity(site.shape[0])


def _build_predictor(site: Site) -> nn.Module:
    task = site.blueprint.task
    if site.tokens and site.grid is None:
        return ConvHead("0c1f", site.shape[1], task.num_classes, task)
    return site.folded(Predictor(site.map, task.num_classes))


class PredSim(LocalLoss):
    """0.99 times the squared distance of two similarity matrices, 0.01 times the task's loss.

    The matrices are those of the samples' features and of their one-hot targets. The distance is
    the mean over the entries. The constructor raises UserError for activations that are no map and
    no tokens, and for a task without classes of samples.
    """

    @dataclass(frozen=True)
    class Options:
        """The published weights are fixed. There are no options."""

    def __init__(self, options: Options, site: Site) -> None:
        super().__init__()
        if not site.blueprint.task.has_labels:
            raise site.refuse_task("predsim")
        if len(site.shape) not in (2, 3):
            raise site.refuse("predsim")
        self.task = site.blueprint.task
        self.replicas = site.replicas
        self.similarity: nn.Module = site.unit("similarity", lambda: _build_similarity(site))
        self.predictor: nn.Module = site.unit("predictor", lambda: _build_predictor(site))

    @staticmethod
    def is_cross_entropy(options: Options) -> bool:
        """Return False."""
        return False

    @staticmethod
    def is_over_pairs(options: Options) -> bool:
        """Return True."""
        return True

    def forward(self, h: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted loss, a scalar in fp32.

        h: (B, C, H, W) or (B, T, D). fields["target"]: (B,) class indices. No other field is read.
        """
        target = fields["target"]
        # The similarities are those of the full batch, over all replicas.
        all_targets = self.replicas.gathered(target)
        one_hot = F.one_hot(all_targets, self.task.num_classes).float()
        target_similarities = similarity_matrix(one_hot)
        all_features = self.replicas.gathered(self.similarity(h))
        distance = F.mse_loss(similarity_matrix(all_features), target_similarities)

        prediction = self.task.loss(self.predictor(h), target)
        return SIMILARITY_WEIGHT * distance + (1 - SIMILARITY_WEIGHT) * prediction

    def exit(self, h: Tensor) -> Tensor:
        """Return the classifier's logits, (B, classes). It is never None."""
        logits: Tensor = self.predictor(h)
        return logits

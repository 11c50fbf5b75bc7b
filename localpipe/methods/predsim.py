"""PredSim (Noekland and Eidnes, ICML 2019): similarity matching and prediction.

It follows AugLocal's released code, whose settings are the defaults. The options give those of the
paper's own code: `dim_in_decoder: 4096` (2048 for its smaller networks), `zero_start` and
`padded_pooling`. That code multiplies the loss of the last layer by 0.01 too, which is left out:
under Adam, its optimizer, it changes next to nothing.

On features (B, D), as after a linear layer, a linear layer without bias replaces the convolution,
and there is no pooling, as in the paper's own code.

For tokens nothing is published. Here a linear layer without bias replaces the convolution. The
deviation is taken over the patch tokens, and the classifier pools over their grid. The class token
is left out. Of tokens without a grid, the deviation is taken over all of them, and the classifier
takes their mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
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


class FeatureSimilarity(nn.Module):
    """A linear layer without bias: (B, D) to (B, D). Its weights begin as torch draws them."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """Return the features in fp32, (B, D)."""
        features: Tensor = self.linear(h)
        return features.float()


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

    shape: (C, H, W). `pool_kernel` gives the size after pooling to at most `widest` features.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int, widest: int = WIDEST) -> None:
        super().__init__()
        kernel = pool_kernel(shape, widest)
        self.size = (shape[1] // kernel[0], shape[2] // kernel[1])
        self.fc = nn.Linear(shape[0] * math.prod(self.size), num_classes)

    def forward(self, h: Tensor) -> Tensor:
        """Return the logits, (B, classes)."""
        # Every position counts, also where the sizes do not divide.
        features = pool_to(h, self.size).flatten(1)
        logits: Tensor = self.fc(features)
        return logits


class PaddedPredictor(nn.Module):
    """Average pooling that pads with zeros, then one linear layer: (B, C, H, W) to (B, classes).

    Both released codes pool so. Where the kernel does not divide a side, the side is padded by half
    a kernel at both ends, and the zeros count: of 24 rows and a kernel of 16, the first mean has 8
    rows, and the second one 16. Where it divides, the values are those of `Predictor`.

    shape: (C, H, W). widest: the most features after pooling.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int, widest: int) -> None:
        super().__init__()
        channels, *sides = shape
        self.kernel = padded_kernel(shape, widest)
        rests = [side % kernel for side, kernel in zip(sides, self.kernel, strict=True)]
        self.padding = (
            self.kernel[0] // 2 if rests[0] else 0,
            self.kernel[1] // 2 if rests[1] else 0,
        )
        height, width = (
            math.ceil(side / kernel) for side, kernel in zip(sides, self.kernel, strict=True)
        )
        self.fc = nn.Linear(channels * height * width, num_classes)

    def forward(self, h: Tensor) -> Tensor:
        """Return the logits, (B, classes)."""
        features = F.avg_pool2d(h, self.kernel, padding=self.padding).flatten(1)
        logits: Tensor = self.fc(features)
        return logits


def padded_kernel(shape: tuple[int, ...], widest: int) -> tuple[int, int]:
    """Return the kernel (height, width) of `PaddedPredictor` for at most `widest` features.

    shape: (C, H, W). Height, then width, doubles in turn until C * h * w <= widest, with sizes
    rounded up, or until a kernel covers its side.
    """
    sides, kernel = shape[1:], [1, 1]

    def count() -> int:
        sizes = [math.ceil(side / size) for side, size in zip(sides, kernel, strict=True)]
        return shape[0] * math.prod(sizes)

    while count() > widest and (kernel[0] < sides[0] or kernel[1] < sides[1]):
        for axis in (0, 1):
            if count() > widest and kernel[axis] < sides[axis]:
                kernel[axis] *= 2
    return kernel[0], kernel[1]


def pool_kernel(shape: tuple[int, ...], widest: int = WIDEST) -> tuple[int, int]:
    """Return the pooling kernel (height, width) that leaves at most `widest` features.

    shape: (C, H, W). The kernel's height, then its width, doubles in turn until C * h * w fits.
    With more channels than that, one position is left.
    """
    kernel = [1, 1]
    axis = 0
    while math.prod((shape[0], shape[1] // kernel[0], shape[2] // kernel[1])) > widest:
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
    if len(site.shape) == 1:
        return FeatureSimilarity(site.shape[0])
    if site.tokens:
        return TokenSimilarity(site.grid, site.shape[1])
    return Similarity(site.shape[0])


def _build_predictor(site: Site, options: PredSim.Options) -> nn.Module:
    task = site.blueprint.task
    predictor: nn.Module
    if len(site.shape) == 1:
        predictor = nn.Linear(site.shape[0], task.num_classes)
    elif site.tokens and site.grid is None:
        predictor = ConvHead("0c1f", site.shape[1], task.num_classes, task)
    elif options.padded_pooling:
        padded = PaddedPredictor(site.map, task.num_classes, options.dim_in_decoder)
        predictor = site.folded(padded)
    else:
        predictor = site.folded(Predictor(site.map, task.num_classes, options.dim_in_decoder))

    if options.zero_start:
        linears = [layer for layer in predictor.modules() if isinstance(layer, nn.Linear)]
        nn.init.zeros_(linears[-1].weight)  # its bias stays as torch draws it
    return predictor


class PredSim(LocalLoss):
    """0.99 times the squared distance of two similarity matrices, 0.01 times the task's loss.

    The matrices are those of the samples' features and of their one-hot targets. The distance is
    the mean over the entries. With `loss: sim` the loss is the distance alone, and the stage has no
    exit. With `loss: pred` it is the task's loss alone. The constructor raises UserError for
    activations that are no map, no tokens and no features, and for a task without classes of
    samples.
    """

    @dataclass(frozen=True)
    class Options:
        """The loss, and the classifier of AugLocal's code or of the paper's own."""

        loss: Annotated[
            Literal["predsim", "sim", "pred"],
            Field(
                description="0.99 of the similarities' distance and 0.01 of the classifier's loss, "
                "or one of the two alone"
            ),
        ] = "predsim"
        dim_in_decoder: Annotated[
            int, Field(ge=1, description="the most features that the classifier reads")
        ] = WIDEST
        zero_start: Annotated[
            bool, Field(description="whether the classifier's weights begin at 0")
        ] = False
        padded_pooling: Annotated[
            bool,
            Field(description="whether sides that the pooling does not divide are padded by zeros"),
        ] = False

    def __init__(self, options: Options, site: Site) -> None:
        super().__init__()
        if not site.blueprint.task.has_labels:
            raise site.refuse_task("predsim")
        if len(site.shape) not in (1, 2, 3):
            raise site.refuse("predsim", flat=True)
        self.task = site.blueprint.task
        self.replicas = site.replicas
        self.similarity: nn.Module | None = None
        self.predictor: nn.Module | None = None
        if options.loss != "pred":
            self.similarity = site.unit("similarity", lambda: _build_similarity(site))
        if options.loss != "sim":
            self.predictor = site.unit("predictor", lambda: _build_predictor(site, options))

    @staticmethod
    def is_cross_entropy(options: Options) -> bool:
        """Return whether the loss is the classifier's alone."""
        is_pred: bool = options.loss == "pred"
        return is_pred

    @staticmethod
    def is_over_pairs(options: Options) -> bool:
        """Return whether similarities are among the loss."""
        has_similarities: bool = options.loss != "pred"
        return has_similarities

    def forward(self, h: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted loss, a scalar in fp32.

        h: (B, C, H, W), (B, T, D) or (B, D). fields["target"]: (B,) class indices. No other field
        is read.
        """
        target = fields["target"]
        if self.similarity is None:
            assert self.predictor is not None, "one of the two is there"
            return self.task.loss(self.predictor(h), target)
        distance = self._find_distance(self.similarity(h), target)
        if self.predictor is None:
            return distance
        prediction = self.task.loss(self.predictor(h), target)
        return SIMILARITY_WEIGHT * distance + (1 - SIMILARITY_WEIGHT) * prediction

    def _find_distance(self, features: Tensor, target: Tensor) -> Tensor:
        """Return the mean squared distance of the similarities, a scalar in fp32.

        features: (B, D) of the samples. target: (B,) class indices.
        """
        # The similarities are those of the full batch, over all replicas.
        all_targets = self.replicas.gathered(target)
        one_hot = F.one_hot(all_targets, self.task.num_classes).float()
        target_similarities = similarity_matrix(one_hot)
        all_features = self.replicas.gathered(features)
        return F.mse_loss(similarity_matrix(all_features), target_similarities)

    def exit(self, h: Tensor) -> Tensor | None:
        """Return the classifier's logits, (B, classes), None with `loss: sim`."""
        if self.predictor is None:
            return None
        logits: Tensor = self.predictor(h)
        return logits

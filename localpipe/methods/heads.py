"""Auxiliary classifiers: InfoPro's heads `NcMf`, DGL's pooled MLP, and a head for every place."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn

from localpipe.errors import UserError
from localpipe.methods.objective import Site
from localpipe.networks.layers import conv_bn_relu, init_convolutions, pool_to
from localpipe.tasks.layout import Grid
from localpipe.tasks.task import Task

WIDEST = 64
HIDDEN = 128


class ConvHead(nn.Module):
    """The head `NcMf` of InfoPro: N 3x3 convolutions, pooling, M linear layers.

    Source: Wang et al. 2021, released code. (B, C, H, W) to (B, outputs).

    The first convolution doubles the channels at stride 2. Where C is 64 or more, it keeps the
    channels and has stride 1. A second convolution keeps both. Hidden linear layers have 128 units.
    With (B, D) activations, N must be 0. Of (B, T, D) tokens (unpublished) the patches are pooled.
    Convolutions get them folded to their grid, before this module. For a task of places, the linear
    layers run on every place, and the outputs are (B, outputs, H, W) of the image.

    kind: `NcMf`, with one digit each. channels: C or D. `task` pools.
    """

    def __init__(self, kind: str, channels: int, outputs: int, task: Task) -> None:
        super().__init__()
        convolutions, linears = int(kind[0]), int(kind[2])
        self.task = task

        layers: list[nn.Module] = []
        width = channels
        for index in range(convolutions):
            if index == 0 and channels < WIDEST:
                width = 2 * channels
                layers += conv_bn_relu(channels, width, stride=2)
            else:
                layers += conv_bn_relu(width, width)
        self.convolutions = nn.Sequential(*layers)

        sizes = [width, *[HIDDEN] * (linears - 1)]
        layers = []
        for inputs, units in pairwise(sizes):
            layers += [nn.Linear(inputs, units), nn.ReLU(inplace=True)]
        layers.append(nn.Linear(sizes[-1], outputs))
        self.linears = nn.Sequential(*layers)
        init_convolutions(self)

    def forward(self, h: Tensor) -> Tensor:
        """Return the outputs, (B, outputs), one for each sample, as the task's loss takes them."""
        features = self.task.pool(self.convolutions(h))
        return self.task.in_mode(self.training).to_outputs(self.linears(features))


class PlaceHead(nn.Module):
    """The head of InfoPro's first module on Cityscapes (Wang et al. 2021, released code).

    (B, C, h, w) to (B, classes, H, W) of the image. A 3x3 convolution with bias to half of the
    channels, batch normalisation, ReLU, and dropout of whole channels come first. Then follow a 1x1
    convolution and bilinear upsampling. For fewer than 128 channels, which are not published, the
    width is 64.
    """

    def __init__(self, channels: int, task: Task) -> None:
        super().__init__()
        self.task = task
        width = max(channels // 2, WIDEST)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Dropout2d(0.1),
        )
        self.classify = nn.Linear(width, task.num_classes)
        init_convolutions(self)

    def forward(self, h: Tensor) -> Tensor:
        """Return the logits, (B, classes, H, W)."""
        rows = self.classify(self.task.pool(self.layers(h)))  # (B, h, w, classes)
        return self.task.in_mode(self.training).to_outputs(rows)


class MLPHead(nn.Module):
    """DGL's pooled head (Belilovsky et al. 2020), as AugLocal's released code has it.

    It has one hidden layer fewer than DGL's own. (B, C, H, W) to (B, classes).

    Pooling to a quarter of the side comes first, then three 1x1 convolutions of the same width,
    then pooling to 2x2. Two hidden linear layers of 4C units with batch normalisation follow, and
    one linear layer. (B, D) skips pooling and convolutions, and its hidden layers have D units.

    shape: (C, H, W) or (D,), per sample.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        channels = shape[0]
        # Flat activations do not use the convolutions. They are built all the same, since the
        # initial weights of the linear layers depend on the draws before them.
        convolutions: list[nn.Module] = []
        for _ in range(3):
            convolutions += conv_bn_relu(channels, channels, kernel=1)

        self.side: tuple[int, int] | None = None
        width = channels
        if len(shape) == 3:
            self.side = (math.ceil(shape[1] / 4), math.ceil(shape[2] / 4))
            width = 4 * channels
        else:
            convolutions = []
        self.convolutions = nn.Sequential(*convolutions)
        self.linears = nn.Sequential(*linear_bn_relu(width, 2), nn.Linear(width, num_classes))
        init_convolutions(self)

    def forward(self, h: Tensor) -> Tensor:
        """Return the logits, (B, classes). h: (B, *shape)."""
        if self.side is not None:
            h = self.convolutions(pool_to(h, self.side))
            h = pool_to(h, (2, 2)).flatten(1)
        logits: Tensor = self.linears(h)
        return logits


class TokenMLPHead(nn.Module):
    """DGL's pooled head for the tokens of an image, which is not published.

    (B, T, D) to (B, classes). The patches, without the class token, pool to a quarter of their
    grid's side. Three linear layers on every position replace the 1x1 convolutions. The rest is
    `MLPHead`'s.
    """

    def __init__(self, grid: Grid, width: int, num_classes: int) -> None:
        super().__init__()
        self.grid = grid
        self.side = (math.ceil(grid.height / 4), math.ceil(grid.width / 4))
        self.places = nn.Sequential(*linear_bn_relu(width, 3))
        hidden = linear_bn_relu(4 * width, 2)
        self.linears = nn.Sequential(*hidden, nn.Linear(4 * width, num_classes))

    def forward(self, h: Tensor) -> Tensor:
        """Return the logits, (B, classes). h: (B, T, D)."""
        pooled = pool_to(self.grid.fold(h), self.side).permute(0, 2, 3, 1)  # (B, h, w, D)
        rows = self.places(pooled.flatten(0, 2))  # (B * h * w, D)
        maps = rows.view_as(pooled).permute(0, 3, 1, 2)  # (B, D, h, w)
        logits: Tensor = self.linears(pool_to(maps, (2, 2)).flatten(1))
        return logits


class SequenceMLPHead(nn.Module):
    """DGL's pooled head for tokens without a grid, which is not published.

    (B, T, D) to (B, classes). Three linear layers on every token replace the 1x1 convolutions, and
    the mean over all tokens the pooling. Two hidden linear layers of D units with batch
    normalisation follow, and one linear layer.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.places = nn.Sequential(*linear_bn_relu(width, 3))
        self.linears = nn.Sequential(*linear_bn_relu(width, 2), nn.Linear(width, num_classes))

    def forward(self, h: Tensor) -> Tensor:
        """Return the logits, (B, classes). h: (B, T, D)."""
        rows = self.places(h.flatten(0, 1))  # (B * T, D)
        logits: Tensor = self.linears(rows.unflatten(0, h.shape[:2]).mean(1))
        return logits


class TokenHead(nn.Module):
    """A head for every token alone, which is not published: (B, T, D) to (B, T, outputs).

    A layer norm comes first. Every hidden linear layer has a layer norm and a ReLU after it. There
    is no pooling and no batch normalisation, so no token sees another one.

    hidden: the units of the hidden layers, () for a linear head.
    """

    def __init__(self, width: int, hidden: tuple[int, ...], outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.LayerNorm(width)]
        for inputs, units in pairwise([width, *hidden]):
            layers += [nn.Linear(inputs, units), nn.LayerNorm(units), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Linear([width, *hidden][-1], outputs))

    def forward(self, h: Tensor) -> Tensor:
        """Return the outputs of every token, (B, T, outputs)."""
        out: Tensor = self.layers(h)
        return out


def linear_bn_relu(width: int, count: int) -> list[nn.Module]:
    """Return `count` times a linear layer without bias, batch normalisation, ReLU.

    (B, width) to (B, width). The list has 3 * count new modules.
    """
    layers: list[nn.Module] = []
    for _ in range(count):
        linear = nn.Linear(width, width, bias=False)
        layers += [linear, nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
    return layers


def build_head(kind: str, site: Site, outputs: int | None = None) -> nn.Module:
    """Return the head `mlp` or `NcMf` of a site, (B, *site.shape) to (B, outputs).

    It is built as site.unit("head", ...). outputs: the classes of the task by default, and always
    for `mlp`. Raises UserError if the head has no rule for the activation's shape. Convolutions
    and tasks of places have none for (D,), nor for tokens without a grid. Where the task reads
    tokens, the head is a `TokenHead` without convolutions.
    """
    if site.reads_tokens:
        return _build_token_head(kind, site)
    if not _has_rule(kind, site):
        raise site.refuse(f"head {kind}", flat=not _convolves(kind) and not site.reads_places)
    if kind == "mlp":
        return _build_mlp_head(site)
    task = site.blueprint.task

    def build() -> nn.Module:
        channels = task.features(site.shape)
        head = ConvHead(kind, channels, outputs or task.num_classes, task)
        # Without a convolution the tokens are pooled as they are.
        if _convolves(kind):
            return site.folded(head)
        return head

    return site.unit("head", build)


def _build_token_head(kind: str, site: Site) -> nn.Module:
    """Return a head for every token: `mlp` with two hidden layers of D units, or `0cMf`."""
    site.check_tokens(f"head {kind}")
    if _convolves(kind):
        raise UserError(
            f"objective: head {kind} has convolutions, which mix tokens; choose mlp, 0c1f or 0c2f"
        )
    width = site.shape[1]
    hidden = (width, width) if kind == "mlp" else (HIDDEN,) * (int(kind[2]) - 1)
    outputs = site.blueprint.task.num_classes
    return site.unit("head", lambda: TokenHead(width, hidden, outputs))


def _build_mlp_head(site: Site) -> nn.Module:
    task = site.blueprint.task
    grid = site.grid
    if site.reads_places:
        return site.unit("head", lambda: site.folded(PlaceHead(site.map[0], task)))
    if grid is not None:
        return site.unit("head", lambda: TokenMLPHead(grid, site.shape[1], task.num_classes))
    if site.tokens:
        return site.unit("head", lambda: SequenceMLPHead(site.shape[1], task.num_classes))
    return site.unit("head", lambda: MLPHead(site.shape, task.num_classes))


def _convolves(kind: str) -> bool:
    return kind != "mlp" and int(kind[0]) > 0


def _has_rule(kind: str, site: Site) -> bool:
    """Return whether a head takes activations of the site's shape: (D,), (T, D) or (C, H, W)."""
    if 0 in site.shape:
        return False
    if site.reads_places:
        return len(site.map) == 3
    if len(site.shape) == 1:
        return not _convolves(kind)
    if len(site.shape) == 2:
        # A head without a convolution takes the mean of tokens without a grid.
        return site.grid is not None or not _convolves(kind)
    return len(site.shape) == 3

"""Auxiliary classifiers: the heads `NcMf` of N convolutions and M linear layers, and DGL's pooled MLP."""

from __future__ import annotations

import math

from torch import Tensor, nn

from localpipe.methods.objective import Site
from localpipe.networks.layers import conv_bn_relu, init_convolutions, pool_to
from localpipe.tasks.classification import Classification
from localpipe.tasks.layout import Grid

WIDEST = 64


class ConvHead(nn.Module):
    """The head `NcMf` of InfoPro (Wang et al. 2021; released code): N 3x3 convolutions, pooling, M linear layers.

    (B, C, H, W) to (B, outputs). The first convolution doubles the channels at stride 2, or keeps them at stride 1 where C
    is 64 already; a second one keeps both. Hidden linear layers have 128 units. With (B, D) activations, N must be 0. Of
    (B, T, D) tokens (unpublished) the patches are pooled; convolutions see them folded to their grid.
    """

    def __init__(self, kind: str, channels: int, outputs: int, task: Classification) -> None:
        super().__init__()
        convolutions, linears = int(kind[0]), int(kind[2])
        self.task = task
        width = channels if not convolutions or channels >= WIDEST else 2 * channels
        layers: list[nn.Module] = []
        for index in range(convolutions):
            first = index == 0
            layers += conv_bn_relu(
                channels if first else width, width, stride=2 if first and width != channels else 1
            )
        self.convolutions = nn.Sequential(*layers)
        sizes = [width, *[128] * (linears - 1)]
        hidden = [
            layer
            for a, b in zip(sizes, sizes[1:], strict=False)
            for layer in (nn.Linear(a, b), nn.ReLU(inplace=True))
        ]
        self.linears = nn.Sequential(*hidden, nn.Linear(sizes[-1], outputs))
        init_convolutions(self)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.linears(self.task.pool(self.convolutions(h)))
        return out


class MLPHead(nn.Module):
    """DGL's pooled head (Belilovsky et al. 2020) as AugLocal's released code has it: one hidden layer fewer than DGL's own.

    (B, C, H, W) to (B, classes): pool to a quarter of the side, three 1x1 convolutions of the same width, pool to 2x2, two
    hidden linear layers of 4C units with batch normalisation, one linear layer. (B, D) skips the convolutions.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        channels, spatial = shape[0], len(shape) == 3
        self.side = (math.ceil(shape[1] / 4), math.ceil(shape[2] / 4)) if spatial else None
        convolutions = [
            layer for _ in range(3) for layer in conv_bn_relu(channels, channels, kernel=1)
        ]
        self.convolutions = nn.Sequential(*convolutions if spatial else [])
        width = 4 * channels if spatial else channels
        self.linears = nn.Sequential(*linear_bn_relu(width, 2), nn.Linear(width, num_classes))
        init_convolutions(self)

    def forward(self, h: Tensor) -> Tensor:
        if self.side is not None:
            h = pool_to(self.convolutions(pool_to(h, self.side)), (2, 2)).flatten(1)
        logits: Tensor = self.linears(h)
        return logits


class TokenMLPHead(nn.Module):
    """DGL's pooled head for the tokens of an image; nothing of it is published.

    (B, T, D) to (B, classes): the patches, without the class token, pool to a quarter of their grid's side; three linear
    layers on every place stand for the 1x1 convolutions; the rest is `MLPHead`'s.
    """

    def __init__(self, grid: Grid, width: int, num_classes: int) -> None:
        super().__init__()
        self.grid = grid
        self.side = (math.ceil(grid.height / 4), math.ceil(grid.width / 4))
        self.places = nn.Sequential(*linear_bn_relu(width, 3))
        self.linears = nn.Sequential(
            *linear_bn_relu(4 * width, 2), nn.Linear(4 * width, num_classes)
        )

    def forward(self, h: Tensor) -> Tensor:
        places = pool_to(self.grid.fold(h), self.side).permute(0, 2, 3, 1)
        out = self.places(places.flatten(0, 2)).view_as(places).permute(0, 3, 1, 2)
        logits: Tensor = self.linears(pool_to(out, (2, 2)).flatten(1))
        return logits


def linear_bn_relu(width: int, count: int) -> list[nn.Module]:
    """Return `count` times a linear layer without bias, batch normalisation, ReLU."""
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(inplace=True),
        ]
    return layers


def build_head(kind: str, site: Site, outputs: int | None = None) -> nn.Module:
    """Return the head `mlp` or `NcMf` for a site; raise UserError where it has no rule for the activation's shape."""
    task, grid = site.blueprint.task, site.blueprint.task.grid
    convolves = kind != "mlp" and int(kind[0]) > 0
    has_rule = {1: not convolves, 2: grid is not None or kind[0] == "0", 3: True}
    if not has_rule.get(len(site.shape)) or 0 in site.shape:
        raise site.refuse(f"head {kind}", flat=not convolves)
    if kind == "mlp":
        if site.tokens and grid is not None:
            return site.unit("head", lambda: TokenMLPHead(grid, site.shape[1], task.num_classes))
        return site.unit("head", lambda: MLPHead(site.shape, task.num_classes))
    channels = task.features(site.shape)
    head = (
        site.folded if convolves else (lambda network: network)
    )  # without a convolution the tokens pool as they are
    return site.unit(
        "head", lambda: head(ConvHead(kind, channels, outputs or task.num_classes, task))
    )

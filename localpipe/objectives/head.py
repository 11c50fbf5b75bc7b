"""Auxiliary classifiers: the heads `NcMf` of N convolutions and M linear layers, and DGL's pooled MLP."""

from __future__ import annotations

import math

from torch import Tensor, nn

from localpipe.layers import conv_bn_relu, init_convolutions, pool_to
from localpipe.objectives.objective import Site
from localpipe.task import Classification

WIDEST = 64


class ConvHead(nn.Module):
    """The head `NcMf` of InfoPro (Wang et al. 2021; released code): N 3x3 convolutions, pooling, M linear layers.

    (B, C, H, W) to (B, outputs). The first convolution doubles the channels at stride 2, or keeps them at stride 1 where C
    is 64 already; a second one keeps both. Hidden linear layers have 128 units. With (B, D) activations, N must be 0.
    """

    def __init__(self, kind: str, channels: int, outputs: int, task: Classification) -> None:
        super().__init__()
        convolutions, linears = int(kind[0]), int(kind[2])
        self.task = task
        width = channels if not convolutions or channels >= WIDEST else 2 * channels
        layers: list[nn.Module] = []
        for index in range(convolutions):
            first = index == 0
            layers += conv_bn_relu(channels if first else width, width, stride=2 if first and width != channels else 1)
        self.convolutions = nn.Sequential(*layers)
        sizes = [width, *[128] * (linears - 1)]
        hidden = [
            layer for a, b in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(a, b), nn.ReLU(inplace=True))
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
        convolutions = [layer for _ in range(3) for layer in conv_bn_relu(channels, channels, kernel=1)]
        self.convolutions = nn.Sequential(*convolutions if spatial else [])
        width = 4 * channels if spatial else channels
        hidden: list[nn.Module] = []
        for _ in range(2):
            hidden += [nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
        self.linears = nn.Sequential(*hidden, nn.Linear(width, num_classes))
        init_convolutions(self)

    def forward(self, h: Tensor) -> Tensor:
        if self.side is not None:
            h = pool_to(self.convolutions(pool_to(h, self.side)), (2, 2)).flatten(1)
        logits: Tensor = self.linears(h)
        return logits


def build(kind: str, site: Site, outputs: int | None = None) -> nn.Module:
    """Return the head `mlp` or `NcMf` for a site; raise UserError where it has no rule for the activation's shape."""
    task = site.blueprint.task
    dimensions = len(site.shape)
    if dimensions not in (1, 3) or (dimensions == 1 and kind[0] not in "0m") or 0 in site.shape:
        raise site.refuse(f"head {kind}")
    if kind == "mlp":
        return site.unit("head", lambda: MLPHead(site.shape, task.num_classes))
    channels = task.features(site.shape)
    return site.unit("head", lambda: ConvHead(kind, channels, outputs or task.num_classes, task))

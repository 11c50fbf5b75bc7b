"""Small networks for the tests, with everything that breaks a careless pipeline."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth


def small(num_classes: int = 10, width: int = 8) -> nn.Sequential:
    """Return five blocks and a head: batch norm, dropout, an in-place ReLU after every boundary."""

    def block(inputs: int, stride: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        return nn.Sequential(nn.ReLU(inplace=True), conv, nn.BatchNorm2d(width), nn.Dropout(0.2))

    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        block(width),
        block(width, 2),
        block(width),
        block(width),
        head,
    )


def flat(num_classes: int = 10) -> nn.Sequential:
    """Return a network of linear layers, with (B, D) activations."""
    layers = [nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(4)]
    return nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU()),
        *layers,
        nn.Linear(16, num_classes),
    )


def plain(num_classes: int = 10) -> nn.Sequential:
    """Return three blocks without batch normalisation and dropout, and a head."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)),
    )


def normalised() -> nn.Sequential:
    """Return `plain` with batch normalisation."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    )


def dry(num_classes: int = 10) -> nn.Sequential:
    """Return `small` without dropout: a compiled network draws other numbers."""
    network = small(num_classes)
    for block in network:
        if not isinstance(block, nn.Sequential):
            continue
        for index, layer in enumerate(block):
            if isinstance(layer, nn.Dropout):
                block[index] = nn.Identity()
    return network


class _Residual(nn.Module):
    """A layer norm over channels that lie last in memory, a linear layer, stochastic depth."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.depth = StochasticDepth(0.3, "row")

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.norm(x.permute(0, 2, 3, 1)))
        dropped: Tensor = self.depth(y.permute(0, 3, 1, 2))
        return x + dropped


class Forked(nn.Module):
    """A network with a forward of its own: (B, 3, H, W) to (B, classes).

    It has batch normalisation, dropout, stochastic depth, an in-place ReLU after a boundary,
    boundaries whose channels lie last in memory, and a skip over two blocks.
    """

    def __init__(self, num_classes: int = 10, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.early = nn.Conv2d(width, width, 3, 2, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.middle = _Residual(width)
        self.late = _Residual(width)
        self.join = nn.Conv2d(2 * width, width, 1)
        self.dropout = nn.Dropout(0.2)
        self.last = _Residual(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.early(torch.relu_(self.stem(x)))))
        skipped = x
        x = self.late(self.middle(x))
        x = self.dropout(self.join(torch.cat((x, skipped), 1)))
        logits: Tensor = self.head(self.last(x).mean((2, 3)))
        return logits


def places(num_classes: int = 4, width: int = 8) -> nn.Sequential:
    """Return four blocks without batch norm and dropout, and a head: logits of every pixel."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(width, width, 3, 2, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)),
        nn.Sequential(nn.ReLU(), nn.Conv2d(width, num_classes, 1)),
    )


class Guided(nn.Module):
    """Logits of every pixel, `out`, and those of an auxiliary head in the middle, `aux`.

    Both are computed at half of the side, and upsampled to that of the image.
    """

    def __init__(self, num_classes: int = 4, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, padding=1)
        self.early = nn.Conv2d(width, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.late = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Conv2d(width, num_classes, 1)
        self.aux = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        size = x.shape[-2:]
        middle = self.middle(self.early(self.stem(x).relu()).relu()).relu()
        maps = {"out": self.head(self.late(middle).relu()), "aux": self.aux(middle)}
        for name, logits in maps.items():
            maps[name] = nn.functional.interpolate(logits, size, mode="bilinear")
        return maps


class UNet(nn.Module):
    """A U-Net of three levels (Ronneberger et al. 2015): (B, 3, H, W) to (B, classes, H, W)."""

    def __init__(self, num_classes: int = 4, width: int = 8) -> None:
        super().__init__()
        self.top = self._level(3, width)
        self.middle = self._level(width, 2 * width)
        self.bottom = self._level(2 * width, 4 * width)
        self.middle_up = self._level(6 * width, 2 * width)
        self.top_up = self._level(3 * width, width)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Conv2d(width, num_classes, 1)

    @staticmethod
    def _level(inputs: int, outputs: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            conv = nn.Conv2d(channels, outputs, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        top = self.top(x)
        middle = self.middle(nn.functional.max_pool2d(top, 2))
        x = self.bottom(nn.functional.max_pool2d(middle, 2))
        x = nn.functional.interpolate(x, scale_factor=2, mode="nearest")
        x = self.middle_up(torch.cat((x, middle), 1))
        x = nn.functional.interpolate(x, scale_factor=2, mode="nearest")
        x = self.top_up(torch.cat((x, top), 1))
        logits: Tensor = self.head(self.dropout(x))
        return logits


def bottleneck(num_classes: int = 4) -> nn.Sequential:
    """Return three blocks, the last two of which give (B, 16), and a head: 16 x 16 logits."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, 4, padding=1), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU()),
        nn.Sequential(nn.Linear(16, 16), nn.ReLU()),
        nn.Sequential(nn.Linear(16, num_classes * 256), nn.Unflatten(1, (num_classes, 16, 16))),
    )


def by_red(num_classes: int = 4) -> nn.Sequential:
    """Return a block that keeps an image in 0..1, and a head: the class of the nearest red."""
    reds = torch.tensor([40.0, 220, 70, 80]) / 255
    keep, classify = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, num_classes, 1)
    assert classify.bias is not None
    with torch.no_grad():
        keep.weight.copy_(torch.eye(3).view(3, 3, 1, 1))
        classify.weight.zero_()
        classify.weight[:, 0, 0, 0] = 2 * reds
        classify.bias.copy_(-(reds**2))
    return nn.Sequential(keep, classify)

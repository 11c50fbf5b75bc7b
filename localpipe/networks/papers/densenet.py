"""DenseNet-BC for small images (Huang et al. 2017): InfoPro's third network of table 2.

A 3x3 stem comes first, then three groups of dense layers with a transition between two of them.
Stem, dense layers and transitions are a block each. A dense layer puts its new channels after
those that it takes, so one tensor crosses every cut. A last batch normalisation, global average
pooling and one linear layer are the network's head.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localpipe.networks.blueprint import Block, Blueprint
from localpipe.networks.layers import init_convolutions
from localpipe.tasks.classification import Classification

GROUPS = 3
BOTTLENECK = 4  # channels of the 1x1 convolution, in growths


def norm_relu_conv(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    """Return [batch normalisation, ReLU, a convolution without bias], which keeps the size."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return [nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), conv]


class DenseLayer(nn.Module):
    """A 1x1 and a 3x3 convolution: (B, inputs, H, W) to (B, inputs + growth, H, W)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        width = BOTTLENECK * growth
        self.layers = nn.Sequential(
            *norm_relu_conv(inputs, width, 1), *norm_relu_conv(width, growth, 3)
        )
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the channels that came in, and the new ones after them."""
        return torch.cat([x, self.layers(x)], 1)


class Transition(nn.Module):
    """A 1x1 convolution to half of the channels and 2x2 average pooling."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*norm_relu_conv(inputs, inputs // 2, 1))
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation, (B, inputs // 2, H // 2, W // 2)."""
        return F.avg_pool2d(self.layers(x), 2)


class DenseHead(nn.Module):
    """Batch normalisation, ReLU, global average pooling and a linear layer, to (B, classes)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (B, classes)."""
        logits: Tensor = self.fc(self.norm(x).relu().mean((2, 3)))
        return logits


def build_stem(channels: int, outputs: int) -> nn.Module:
    """Return a 3x3 convolution without bias: (B, C, H, W) images to (B, outputs, H, W)."""
    stem = nn.Sequential(nn.Conv2d(channels, outputs, 3, padding=1, bias=False))
    init_convolutions(stem)
    return stem


def densenet_blueprint(name: str, image: tuple[int, int, int], num_classes: int) -> Blueprint:
    """Return the blueprint of `densenet_bc_DEPTH_GROWTH`: (DEPTH - 4) / 6 layers in each group.

    image: (C, H, W), with sides from 4. The registry holds the valid names.
    """
    depth, growth = (int(number) for number in name.split("_")[-2:])
    layers = (depth - 4) // (2 * GROUPS)
    width = 2 * growth
    blocks = [Block("stem", "stem.", partial(build_stem, image[0], width))]
    for group in range(1, GROUPS + 1):
        for index in range(layers):
            block_name = f"dense{group}.{index}"
            build = partial(DenseLayer, width, growth)
            blocks.append(Block(block_name, f"{block_name}.", build))
            width += growth
        if group < GROUPS:
            block_name = f"transition{group}"
            blocks.append(Block(block_name, f"{block_name}.", partial(Transition, width)))
            width //= 2

    tail = Block("head", "", partial(DenseHead, width, num_classes))
    return Blueprint(name, tuple(blocks), tail, Classification(num_classes), image)

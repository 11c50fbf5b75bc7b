"""The CIFAR ResNets (He et al. 2016, section 4.2), as InfoPro, ContSup and AugLocal use them.

A 3x3 stem of 16 channels comes first. Three layers of basic blocks follow, with 16, 32 and 64
channels and strides 1, 2, 2. A 1x1 convolution with batch normalisation stands in the skip where
the shape changes. Global average pooling and one linear layer end the network. The stem is block 0.
Parameters carry torchvision's names: conv1, bn1, layer1.0.conv1, layer2.0.downsample.0, fc.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from localpipe.networks.blueprint import Block, Blueprint
from localpipe.networks.layers import init_convolutions
from localpipe.tasks.classification import Classification

WIDTHS = (16, 32, 64)


class Stem(nn.Module):
    """A 3x3 convolution, batch normalisation and ReLU: (B, C, H, W) images to (B, 16, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.relu = nn.ReLU(inplace=True)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation, (B, 16, H, W)."""
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        return out


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip.

    (B, inputs, H, W) to (B, outputs, H / stride, W / stride), rounded up.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation, (B, outputs, H / stride, W / stride)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = out + self.downsample(x)
        final: Tensor = self.relu(out)
        return final


class CifarHead(nn.Module):
    """Global average pooling and a linear layer: (B, 64, H, W) to (B, classes)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTHS[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, (B, classes)."""
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def resnet_cifar_blueprint(name: str, image: tuple[int, int, int], num_classes: int) -> Blueprint:
    """Return the blueprint of `resnetN`, where N = 6n + 2: one stem block, then 3n basic blocks.

    image: (C, H, W), of any size. An N of another form is rounded down to one. Raises ValueError if
    the name has no number. The registry holds the valid names.
    """
    depth = int(name.removeprefix("resnet"))
    blocks_per_layer = (depth - 2) // 6

    blocks = [Block("stem", "", partial(Stem, image[0]), WIDTHS[0])]
    inputs = WIDTHS[0]
    for layer, width in enumerate(WIDTHS, start=1):
        for index in range(blocks_per_layer):
            # The first block of layers 2 and 3 halves the side of the map.
            stride = 2 if index == 0 and layer > 1 else 1
            block_name = f"layer{layer}.{index}"
            build = partial(BasicBlock, inputs, width, stride)
            blocks.append(Block(block_name, f"{block_name}.", build, width))
            inputs = width

    tail = Block("head", "", partial(CifarHead, num_classes))
    task = Classification(num_classes)
    return Blueprint(name, tuple(blocks), tail, task, image, rebuild=BasicBlock)

"""The ResNets of ImageNet (He et al. 2016, Xie et al. 2017), made of torchvision's own blocks.

The 7x7 stem with its max-pooling is block 0, and every residual block is one block more. Global
pooling and the linear layer are the network's head. A bottleneck has its stride on the 3x3
convolution. Parameters carry torchvision's names, so that its state_dicts fit. Initial weights are
torchvision's: Kaiming with fan-out for convolutions, and 1 for the last scale of a residual branch.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from localpipe.networks.blueprint import Block, Blueprint
from localpipe.networks.layers import init_convolutions
from localpipe.tasks.classification import Classification

STEM = 64
WIDTHS = (64, 128, 256, 512)


@dataclass(frozen=True)
class ResNetShape:
    """The kind of residual block and the number of blocks in each of the four layers.

    `groups` and `base_width` are those of the 3x3 convolutions.
    """

    block: type[BasicBlock | Bottleneck]
    layers: tuple[int, int, int, int]
    groups: int = 1
    base_width: int = 64


SHAPES = {
    "resnet18": ResNetShape(BasicBlock, (2, 2, 2, 2)),
    "resnet34": ResNetShape(BasicBlock, (3, 4, 6, 3)),
    "resnet50": ResNetShape(Bottleneck, (3, 4, 6, 3)),
    "resnet101": ResNetShape(Bottleneck, (3, 4, 23, 3)),
    "resnet152": ResNetShape(Bottleneck, (3, 8, 36, 3)),
    "resnext101_32x8d": ResNetShape(Bottleneck, (3, 4, 23, 3), groups=32, base_width=8),
}


def build_stem(channels: int) -> nn.Module:
    """Return the stem: (B, C, H, W) images to (B, 64, H / 4, W / 4), rounded up.

    It is a new nn.Sequential, drawn from the default generator.
    """
    layers = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(channels, STEM, 7, stride=2, padding=3, bias=False),
        bn1=nn.BatchNorm2d(STEM),
        relu=nn.ReLU(inplace=True),
        maxpool=nn.MaxPool2d(3, stride=2, padding=1),
    )
    stem = nn.Sequential(layers)
    init_convolutions(stem)
    return stem


def build_residual(shape: ResNetShape, inputs: int, width: int, stride: int) -> nn.Module:
    """Return a new residual block, drawn from the default generator.

    (B, inputs, H, W) to (B, width * expansion, H / stride, W / stride), rounded up. torchvision
    raises ValueError for a basic block with groups or another base width.
    """
    outputs = width * shape.block.expansion
    shortcut = None
    if stride != 1 or inputs != outputs:
        conv = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
        shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))
    block: nn.Module = shape.block(inputs, width, stride, shortcut, shape.groups, shape.base_width)
    init_convolutions(block)
    return block


def build_head(features: int, num_classes: int) -> nn.Module:
    """Return global average pooling and a linear layer: (B, features, H, W) to (B, classes).

    It is a new nn.Sequential, drawn from the default generator.
    """
    layers = OrderedDict[str, nn.Module](
        avgpool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(features, num_classes),
    )
    return nn.Sequential(layers)


def resnet_imagenet_blueprint(
    name: str, image: tuple[int, int, int], num_classes: int
) -> Blueprint:
    """Return the blueprint of a network of `SHAPES`: one stem block, then the residual blocks.

    image: (C, H, W), of any size. Raises KeyError for another name.
    """
    shape = SHAPES[name]
    expansion = shape.block.expansion

    blocks = [Block("stem", "", partial(build_stem, image[0]), STEM)]
    inputs = STEM
    for layer, (width, count) in enumerate(zip(WIDTHS, shape.layers, strict=True), start=1):
        for index in range(count):
            # The first block of every layer but the first halves the side of the map.
            stride = 2 if index == 0 and layer > 1 else 1
            block_name = f"layer{layer}.{index}"
            build = partial(build_residual, shape, inputs, width, stride)
            blocks.append(Block(block_name, f"{block_name}.", build, width))
            inputs = width * expansion

    tail = Block("head", "", partial(build_head, inputs, num_classes))
    return Blueprint(
        name,
        tuple(blocks),
        tail,
        Classification(num_classes),
        image,
        rebuild=partial(build_residual, shape),
        expansion=expansion,
    )

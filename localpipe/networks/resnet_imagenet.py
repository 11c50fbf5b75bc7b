"""The ResNets of ImageNet (He et al. 2016; Xie et al. 2017), out of torchvision's own blocks.

The 7x7 stem with its max-pooling is block 0, every residual block one block more, global pooling and the linear layer are
the network's head. A bottleneck has its stride on the 3x3 convolution. Parameters carry torchvision's names, so that its
state_dicts fit. Convolutions start as in torchvision (Kaiming, fan-out), the residual branches' last scales from 1.
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
    """The kind of residual block, how many each of the four layers has, and the 3x3 convolutions' groups and base width."""

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
    """Return the stem; (B, C, H, W) images to (B, 64, H / 4, W / 4)."""
    layers = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(channels, STEM, 7, stride=2, padding=3, bias=False),
        bn1=nn.BatchNorm2d(STEM),
        relu=nn.ReLU(inplace=True),
        maxpool=nn.MaxPool2d(3, stride=2, padding=1),
    )
    return _initialised(nn.Sequential(layers))


def build_residual(shape: ResNetShape, inputs: int, width: int, stride: int) -> nn.Module:
    """Return a residual block; (B, inputs, H, W) to (B, width * expansion, H / stride, W / stride)."""
    outputs = width * shape.block.expansion
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
        )
    return _initialised(
        shape.block(inputs, width, stride, shortcut, shape.groups, shape.base_width)
    )


def build_head(features: int, num_classes: int) -> nn.Module:
    """Return global average pooling and a linear layer; (B, features, H, W) to (B, classes)."""
    fc = nn.Linear(features, num_classes)
    return nn.Sequential(
        OrderedDict[str, nn.Module](avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=fc)
    )


def _initialised(module: nn.Module) -> nn.Module:
    init_convolutions(module)
    return module


def resnet_imagenet_blueprint(
    name: str, image: tuple[int, int, int], num_classes: int
) -> Blueprint:
    """Return the blueprint of a network that `SHAPES` names."""
    shape = SHAPES[name]
    blocks, inputs = [Block("stem", "", partial(build_stem, image[0]), STEM)], STEM
    for layer, (width, count) in enumerate(zip(WIDTHS, shape.layers, strict=True), start=1):
        for index in range(count):
            unit = f"layer{layer}.{index}"
            build = partial(
                build_residual, shape, inputs, width, 2 if index == 0 and layer > 1 else 1
            )
            blocks.append(Block(unit, f"{unit}.", build, width))
            inputs = width * shape.block.expansion
    tail = Block("head", "", partial(build_head, inputs, num_classes))
    task = Classification(num_classes)
    expansion = shape.block.expansion
    return Blueprint(
        name,
        tuple(blocks),
        tail,
        task,
        image,
        rebuild=partial(build_residual, shape),
        expansion=expansion,
    )

"""The VGG networks of ImageNet with batch normalisation (Simonyan and Zisserman 2015).

Every 3x3 convolution, with its batch normalisation and ReLU, is a block. A max-pooling belongs to
the block after it, as AugLocal's released code has it, and the last one to the network's head.
Parameters carry the names of torchvision's `vggN_bn`, so that its state_dicts fit. Initial weights
are torchvision's too: Kaiming with fan-out for convolutions, deviation 0.01 for linear layers.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn

from localpipe.networks.blueprint import Block, Blueprint
from localpipe.networks.layers import init_convolutions, pool_to
from localpipe.tasks.classification import Classification

WIDTHS = (64, 128, 256, 512, 512)
# The convolutions of each of the five widths.
COUNTS = {"vgg13_bn": (2, 2, 2, 2, 2), "vgg19_bn": (2, 2, 4, 4, 4)}
HIDDEN = 4096  # units of the head's linear layers
EXIT_WIDTH = 512  # of AugLocal's classifier
_SIDE = 7


def build_convolution(first: int, inputs: int, width: int, pools: bool) -> nn.Module:
    """Return a new block: max-pooling with `pools`, then a convolution with what follows it.

    (B, inputs, H, W) to (B, width, H, W), or half the size with `pools`, rounded down. first: the
    index of its first layer in torchvision's `features`.
    """
    layers: list[nn.Module] = [nn.MaxPool2d(2)] if pools else []
    layers += [
        nn.Conv2d(inputs, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]
    named = [(str(first + index), layer) for index, layer in enumerate(layers)]
    block = nn.Sequential(OrderedDict(named))
    init_convolutions(block)
    for layer in block:
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return block


class VGGHead(nn.Module):
    """The last max-pooling, pooling to 7x7, and three linear layers.

    (B, 512, H, W) to (B, classes). Dropout of 0.5 follows both hidden layers.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.classifier = nn.Sequential(
            nn.Linear(WIDTHS[-1] * _SIDE**2, HIDDEN), nn.ReLU(inplace=True), nn.Dropout(0.5),
            nn.Linear(HIDDEN, HIDDEN), nn.ReLU(inplace=True), nn.Dropout(0.5),
            nn.Linear(HIDDEN, num_classes),
        )  # fmt: skip
        for layer in self.classifier:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0.0, 0.01)
                nn.init.zeros_(layer.bias)

    def forward(self, h: Tensor) -> Tensor:
        """Return the logits, (B, classes)."""
        features = pool_to(self.pool(h), (_SIDE, _SIDE)).flatten(1)
        logits: Tensor = self.classifier(features)
        return logits


class AuxiliaryExit(nn.Module):
    """The end of AugLocal's auxiliary networks on a VGG: (B, C, H, W) to (B, classes).

    Source: Ma et al. 2024, released code. Means of neighbours in the flattened activation give 512
    features, over channels and places jointly. Two hidden linear layers with batch normalisation
    follow, and one linear layer. Weights begin as torch draws them.

    channels: C, a multiple of 512, as that of the network's last block.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        assert channels % EXIT_WIDTH == 0, "the last block is always imitated"
        layers: list[nn.Module] = []
        for _ in range(2):
            linear = nn.Linear(EXIT_WIDTH, EXIT_WIDTH)
            layers += [linear, nn.BatchNorm1d(EXIT_WIDTH), nn.ReLU(inplace=True)]
        self.linears = nn.Sequential(*layers, nn.Linear(EXIT_WIDTH, num_classes))

    def forward(self, h: Tensor) -> Tensor:
        """Return the logits, (B, classes)."""
        logits: Tensor = self.linears(h.flatten(1).unflatten(1, (EXIT_WIDTH, -1)).mean(2))
        return logits


def rebuild_convolution(inputs: int, width: int, stride: int) -> nn.Module:
    """Return a new convolution of an auxiliary network, with batch normalisation and ReLU.

    AugLocal's released code pools before it where the width changes, once for a fourfold jump too,
    and weights begin as torch draws them. So the stride of the ResNets' rule is ignored.
    """
    layers: list[nn.Module] = [nn.MaxPool2d(2)] if inputs != width else []
    layers += [
        nn.Conv2d(inputs, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
    ]
    return nn.Sequential(*layers)


def vgg_blueprint(name: str, image: tuple[int, int, int], num_classes: int) -> Blueprint:
    """Return the blueprint of a network of `COUNTS`: one block a convolution.

    image: (C, H, W), of any size from 32. Raises KeyError for another name.
    """
    blocks: list[Block] = []
    inputs, first = image[0], 0
    for group, (width, count) in enumerate(zip(WIDTHS, COUNTS[name], strict=True)):
        for index in range(count):
            pools = group > 0 and index == 0
            build = partial(build_convolution, first, inputs, width, pools)
            convolution = first + pools  # its index in torchvision's `features`
            blocks.append(Block(f"features.{convolution}", "features.", build, width))
            inputs, first = width, convolution + 3

    tail = Block("head", "", partial(VGGHead, num_classes))
    return Blueprint(
        name,
        tuple(blocks),
        tail,
        Classification(num_classes),
        image,
        rebuild=rebuild_convolution,
        build_exit=partial(AuxiliaryExit, num_classes=num_classes),
    )

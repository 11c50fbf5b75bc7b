"""DGL's plain network for CIFAR-10 (Belilovsky et al., ICML 2020): convolutions and an MLP.

Every 3x3 convolution with bias, with its batch normalisation and ReLU, is a block. The second and
the fourth have a max-pooling before them and twice the channels. The paper's network has six and
starts with 128 channels. That of its learning curves has four and starts with 64. Weights begin as
torch draws them.
"""

from __future__ import annotations

import math
from functools import partial

from torch import Tensor, nn

from localpipe.config.keys import Blocks, Positive
from localpipe.errors import UserError
from localpipe.networks.blueprint import Block, Blueprint
from localpipe.networks.layers import pool_to
from localpipe.tasks.classification import Classification

POOLED_BLOCKS = (1, 3)
_POOLED = (2, 2)  # the size before the linear layers


class SimpleHead(nn.Module):
    """Pooling to a quarter of the image's side, then to 2x2, and two hidden linear layers.

    (B, C, H, W) to (B, classes). Each hidden layer has 4C units and a bias, and batch normalisation
    and a ReLU after it. The released code registers one more batch normalisation of C channels,
    which never runs and is left out here.

    shape: (C, H, W) per sample.
    """

    def __init__(self, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.side = (math.ceil(height / 4), math.ceil(width / 4))
        units = channels * math.prod(_POOLED)
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.Linear(units, units), nn.BatchNorm1d(units), nn.ReLU(inplace=True)]
        self.classifier = nn.Sequential(*layers, nn.Linear(units, num_classes))

    def forward(self, h: Tensor) -> Tensor:
        """Return the logits, (B, classes). h: (B, *shape)."""
        pooled = pool_to(pool_to(h, self.side), _POOLED)
        logits: Tensor = self.classifier(pooled.flatten(1))
        return logits


def _build_convolution(inputs: int, outputs: int, pools: bool) -> nn.Module:
    layers: list[nn.Module] = [nn.MaxPool2d(2)] if pools else []
    layers += [
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]
    return nn.Sequential(*layers)


def simple_cnn_blueprint(
    name: str,
    image: tuple[int, int, int],
    num_classes: int,
    *,
    depth: Blocks = 6,
    width: Positive = 128,
) -> Blueprint:
    """Return the blueprint of DGL's network: a block a convolution.

    image: (C, H, W). depth: the number of convolutions. width: the channels of the first one.
    Raises UserError for images that two max-poolings leave nothing of.
    """
    inputs, rows, columns = image
    if min(rows, columns) < 4:
        raise UserError(
            f"model: {name} halves its images twice, which {rows}x{columns} pixels do not allow; "
            "expected at least 4x4; set data.image_size, or choose another network"
        )

    # A pooling halves the sides and doubles the channels.
    blocks: list[Block] = []
    outputs = width
    for index in range(depth):
        pools = index in POOLED_BLOCKS
        if pools:
            outputs, rows, columns = 2 * outputs, rows // 2, columns // 2
        build = partial(_build_convolution, inputs, outputs, pools)
        blocks.append(Block(f"blocks.{index}", f"blocks.{index}.", build))
        inputs = outputs
    tail = Block("head", "", partial(SimpleHead, (inputs, rows, columns), num_classes))
    return Blueprint(name, tuple(blocks), tail, Classification(num_classes), image)

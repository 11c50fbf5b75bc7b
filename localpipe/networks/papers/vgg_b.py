"""VGG8b and VGG11b, PredSim's networks (Noekland and Eidnes, ICML 2019), for small images.

A 3x3 convolution with bias, batch normalisation, a ReLU or LeakyReLU and dropout of whole channels
are a layer. A max-pooling ends each of the four groups. One hidden linear layer and an output layer
follow. Parameters carry the names of the released code.

The paper's local losses see a layer before its dropout and its pooling. So both belong to the block
after it, as `mlp` says. `pipeline.cuts=layerwise` is the paper's cut: eight stages of VGG8b, eleven
of VGG11b.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import nn

from localpipe.config.keys import Positive
from localpipe.errors import UserError
from localpipe.networks.blueprint import Block, Blueprint
from localpipe.networks.papers.mlp import (
    Rate,
    build_activation,
    build_hidden_layer,
    build_last_dropout,
    build_output_layer,
)
from localpipe.tasks.classification import Classification

# The channels of the convolutions, by group.
GROUPS = {
    "vgg8b": ((128, 256), (256, 512), (512,), (512,)),
    "vgg11b": ((128, 128, 128, 256), (256, 512), (512, 512), (512,)),
}
HIDDEN = 1024  # units of the linear layer, at every width
LARGEST_SIDE = 64  # of images whose first convolution is 3x3
_SMALLEST = 2**4


def _build_entry(dropout: float, pools: bool) -> list[tuple[str, nn.Module]]:
    """Return the dropout and the max-pooling of the layer before, with their names."""
    layers: list[tuple[str, nn.Module]] = []
    if dropout > 0:
        layers.append(("dropout", nn.Dropout2d(dropout)))
    if pools:
        layers.append(("pool", nn.MaxPool2d(2)))
    return layers


def _build_convolution(
    inputs: int, outputs: int, dropout: float, pools: bool, slope: float, is_large: bool
) -> nn.Module:
    """Return a new block, (B, inputs, H, W) to (B, outputs, H, W), or half the size with `pools`.

    is_large: whether it is a first convolution of 7x7, which halves the size.
    """
    encoder = nn.Conv2d(inputs, outputs, 3, padding=1)
    if is_large:
        encoder = nn.Conv2d(inputs, outputs, 7, stride=2, padding=3)
    layers = [
        *_build_entry(dropout, pools),
        ("encoder", encoder),
        ("bn", nn.BatchNorm2d(outputs)),
        ("nonlin", build_activation(slope)),
    ]
    return nn.Sequential(OrderedDict(layers))


def _build_linear(inputs: int, dropout: float, slope: float) -> nn.Module:
    return build_hidden_layer(_build_entry(dropout, True), inputs, HIDDEN, slope)


def _list_convolutions(
    name: str, channels: int, is_large: bool, width: int, dropout: float, slope: float
) -> list[Block]:
    """Return the blocks of the convolutions. In the released code a pooling has a number too."""
    blocks: list[Block] = []
    number, inputs = 0, channels
    for group in GROUPS[name]:
        for index, outputs in enumerate(group):
            # The pooling that ends a group stands at the start of the next one.
            pools = index == 0 and number > 0
            build = partial(
                _build_convolution,
                inputs,
                width * outputs,
                dropout if number else 0.0,
                pools,
                slope,
                is_large and number == 0,
            )
            blocks.append(Block(f"features.{number}", f"features.{number}.", build))
            inputs = width * outputs
            number += 1
        number += 1
    return blocks


def vgg_b_blueprint(
    name: str,
    image: tuple[int, int, int],
    num_classes: int,
    *,
    width: Positive = 1,
    dropout: Rate = 0.0,
    slope: Rate = 0.0,
    zero_start: bool = False,
) -> Blueprint:
    """Return the blueprint of `vgg8b` or `vgg11b`: a block a hidden layer, and the last dropout.

    image: (C, H, W). Where a side has more than 64 pixels, the first convolution is 7x7 and halves
    both sides. width: what multiplies the channels of all convolutions. dropout: the rate after
    every hidden layer. slope: of the LeakyReLU below 0, where 0 is a ReLU. zero_start: whether the
    output layer's weights begin at 0, as the released code has it beside local losses.

    Raises UserError for images of less than 16 pixels. Raises KeyError for another name.
    """
    channels, rows, columns = image
    is_large = max(rows, columns) > LARGEST_SIDE
    if is_large:
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    if min(rows, columns) < _SMALLEST:
        raise UserError(
            f"model: {name} halves its images four times, which {rows}x{columns} pixels do not "
            f"allow; expected at least {_SMALLEST}x{_SMALLEST}; set data.image_size, or choose "
            "another network"
        )

    # The hidden linear layer begins with the last pooling. Its units are the same at every width.
    blocks = _list_convolutions(name, channels, is_large, width, dropout, slope)
    last_channels = width * GROUPS[name][-1][-1]
    features = last_channels * (rows // _SMALLEST) * (columns // _SMALLEST)
    build_linear = partial(_build_linear, features, dropout, slope)
    blocks.append(Block("classifier.layers.0", "classifier.layers.0.", build_linear))
    blocks.append(Block("classifier.dropout", "", partial(build_last_dropout, dropout)))
    build_output = partial(build_output_layer, HIDDEN, num_classes, zero_start)
    tail = Block("classifier.layer_out", "classifier.", build_output)
    return Blueprint(name, tuple(blocks), tail, Classification(num_classes), image)

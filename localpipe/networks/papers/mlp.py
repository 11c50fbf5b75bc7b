"""The multilayer perceptron of PredSim (Noekland and Eidnes, ICML 2019), and parts of its networks.

A hidden layer is a linear layer, batch normalisation, a ReLU or LeakyReLU, and dropout. The paper's
local losses see a layer before its dropout, so dropout belongs to the block after it. The last
block is dropout alone: with the output layer it is a stage of its own, as in the paper, where every
hidden layer has a local loss. Parameters carry the names of the released code.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from math import prod
from typing import Annotated

from pydantic import Field
from torch import nn

from localpipe.config.keys import Blocks, Positive
from localpipe.networks.blueprint import Block, Blueprint
from localpipe.tasks.classification import Classification

Rate = Annotated[float, Field(ge=0, lt=1)]


def build_activation(slope: float) -> nn.Module:
    """Return a ReLU that works in place, a LeakyReLU where its slope below 0 is not 0."""
    if slope == 0:
        return nn.ReLU(inplace=True)
    return nn.LeakyReLU(slope, inplace=True)


def build_hidden_layer(
    before: list[tuple[str, nn.Module]], inputs: int, units: int, slope: float
) -> nn.Module:
    """Return a hidden layer after the layers `before`, which give the block its name and module.

    What they give is flattened: (B, inputs) to (B, units). Weights begin as torch draws them.
    """
    layers = [
        *before,
        ("flatten", nn.Flatten()),
        ("encoder", nn.Linear(inputs, units)),
        ("bn", nn.BatchNorm1d(units)),
        ("nonlin", build_activation(slope)),
    ]
    return nn.Sequential(OrderedDict(layers))


def build_output_layer(inputs: int, num_classes: int, zero_start: bool) -> nn.Module:
    """Return a linear layer, (B, inputs) to (B, classes), its weights at 0 with `zero_start`."""
    layer = nn.Linear(inputs, num_classes)
    if zero_start:
        nn.init.zeros_(layer.weight)  # its bias stays as torch draws it
    return nn.Sequential(OrderedDict([("layer_out", layer)]))


def build_last_dropout(dropout: float) -> nn.Module:
    """Return the block between the last hidden layer and the output layer."""
    return nn.Dropout(dropout)


def _build_layer(inputs: int, units: int, dropout: float, slope: float) -> nn.Module:
    before: list[tuple[str, nn.Module]] = []
    if dropout > 0:
        before.append(("dropout", nn.Dropout(dropout)))
    return build_hidden_layer(before, inputs, units, slope)


def mlp_blueprint(
    name: str,
    image: tuple[int, ...],
    num_classes: int,
    *,
    depth: Blocks = 3,
    width: Positive = 1024,
    dropout: Rate = 0.0,
    slope: Rate = 0.0,
    zero_start: bool = False,
) -> Blueprint:
    """Return the blueprint of PredSim's `mlp`: depth + 1 blocks.

    image: of any shape. depth: the number of hidden layers. width: their units. dropout: the rate
    after each of them. slope: of the LeakyReLU below 0, where 0 is a ReLU. zero_start: whether the
    output layer's weights begin at 0, as the released code has it beside local losses.
    """
    blocks: list[Block] = []
    inputs = prod(image)
    for index in range(depth):
        # The dropout of a layer stands at the start of the next one.
        rate = dropout if index else 0.0
        build = partial(_build_layer, inputs, width, rate, slope)
        blocks.append(Block(f"layers.{index}", f"layers.{index}.", build))
        inputs = width
    blocks.append(Block("dropout", "", partial(build_last_dropout, dropout)))
    tail = Block("layer_out", "", partial(build_output_layer, width, num_classes, zero_start))
    return Blueprint(name, tuple(blocks), tail, Classification(num_classes), image)

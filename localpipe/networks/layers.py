"""The few layers that networks and auxiliary networks share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn_relu(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    """Return a convolution without bias (padding keeps the size at stride 1), batch normalisation, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def init_convolutions(module: nn.Module) -> None:
    """Draw every convolution from N(0, sqrt(2 / (k * k * out_channels))), as the published CIFAR networks do."""
    for layer in module.modules():
        if (
            isinstance(layer, nn.Conv2d) and not layer.weight.is_meta
        ):  # a plan has no values to draw
            fan_out = math.prod(layer.kernel_size) * layer.out_channels
            nn.init.normal_(layer.weight, 0.0, math.sqrt(2.0 / fan_out))


def pool_to(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Average-pool (B, C, H, W) to (B, C, *size), deterministic on CUDA too; a plain kernel wherever sizes divide.

    Where they do not, place i of n is the mean of floor(i * H / n) up to ceil((i + 1) * H / n), as in torch's adaptive pooling.
    """
    height, width = x.shape[2:]
    if height % size[0] == 0 and width % size[1] == 0:
        return F.avg_pool2d(x, (height // size[0], width // size[1]))
    rows = torch.stack([x[:, :, a:b].mean(2) for a, b in _places(height, size[0])], 2)
    return torch.stack([rows[..., a:b].mean(3) for a, b in _places(width, size[1])], 3)


def _places(length: int, count: int) -> list[tuple[int, int]]:
    return [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]

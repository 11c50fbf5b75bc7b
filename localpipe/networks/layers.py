"""Layers that networks and auxiliary networks share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_bn_relu(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    """Return [a convolution without bias, batch normalisation, ReLU], new and drawn as torch does.

    (B, inputs, H, W) to (B, outputs, H / stride, W / stride), rounded up. kernel: odd. The ReLU
    works in place.
    """
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def init_convolutions(module: nn.Module) -> None:
    """Draw the weights of every convolution of a module, as the published CIFAR networks do.

    The distribution is normal, with deviation sqrt(2 / (k * k * out_channels)). The weights change
    in place, in the order of module.modules(), from the default generator. Biases and other layers
    stay, and so do weights on the meta device.
    """
    for layer in module.modules():
        # On the meta device there are no values to draw.
        if isinstance(layer, nn.Conv2d) and not layer.weight.is_meta:
            fan_out = math.prod(layer.kernel_size) * layer.out_channels
            nn.init.normal_(layer.weight, 0.0, math.sqrt(2.0 / fan_out))


def pool_to(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Average-pool (B, C, H, W) to (B, C, *size), deterministic on CUDA too.

    Where the sizes divide, it is one plain pooling kernel. Elsewhere it pools as torch's adaptive
    pooling does. Output row i of n is the mean of rows floor(i * H / n) to below ceil((i + 1) * H /
    n). So `size` may be larger than (H, W), and rows then repeat.
    """
    height, width = x.shape[2:]
    if height % size[0] == 0 and width % size[1] == 0:
        return F.avg_pool2d(x, (height // size[0], width // size[1]))
    rows = [x[:, :, start:end].mean(2) for start, end in _pool_ranges(height, size[0])]
    x = torch.stack(rows, 2)
    columns = [x[..., start:end].mean(3) for start, end in _pool_ranges(width, size[1])]
    return torch.stack(columns, 3)


def _pool_ranges(length: int, count: int) -> list[tuple[int, int]]:
    """Return (start, end) of the inputs of every output of an adaptive pooling."""
    ranges = []
    for i in range(count):
        start = i * length // count
        end = -(-(i + 1) * length // count)
        ranges.append((start, end))
    return ranges


def normalise_rows(x: Tensor, eps: float) -> Tensor:
    """Return the rows of x (B, D) divided by their norm, or by eps where the norm is smaller.

    The values are those of F.normalize. Its second derivative is not a number for a row of zeros,
    and reconciliation differentiates twice.
    """
    is_small = x.detach().norm(dim=1, keepdim=True) < eps
    rows = F.normalize(torch.where(is_small, torch.ones_like(x), x), dim=1, eps=eps)
    return torch.where(is_small, x / eps, rows)

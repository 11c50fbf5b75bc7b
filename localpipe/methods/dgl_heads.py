"""DGL's own auxiliary networks (Belilovsky et al. 2020), as its released code has them.

`dgl_mlp_sr` is the one of the paper's results. `dgl_mlp` and `dgl_cnn` are those of its study of
auxiliary networks.
"""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor, nn

from localpipe.errors import UserError
from localpipe.methods.objective import Site
from localpipe.networks.layers import conv_bn_relu, pool_to

HEADS = ("dgl_mlp_sr", "dgl_mlp", "dgl_cnn")
_POOLED = (2, 2)  # the size before the linear layers


class PooledMLP(nn.Module):
    """Pooling to a quarter of the side, 1x1 convolutions, pooling to 2x2, an MLP.

    (B, C, H, W) to (B, classes). Each of the `convolutions` keeps the width and has batch
    normalisation and a ReLU after it. So has each of the three hidden linear layers, of 4C units
    and with a bias. Weights begin as torch draws them. The released code registers one more batch
    normalisation of C channels, which never runs and is left out here.

    shape: (C, H, W) per sample. convolutions: 3 of `dgl_mlp_sr`, 0 of `dgl_mlp`.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int, convolutions: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.side = (math.ceil(height / 4), math.ceil(width / 4))
        layers: list[nn.Module] = []
        for _ in range(convolutions):
            layers += conv_bn_relu(channels, channels, kernel=1)
        self.convolutions = nn.Sequential(*layers)

        features = channels * math.prod(_POOLED)
        layers = []
        for inputs, units in pairwise([features] * 4):
            layers += [nn.Linear(inputs, units), nn.BatchNorm1d(units), nn.ReLU(inplace=True)]
        self.linears = nn.Sequential(*layers, nn.Linear(features, num_classes))

    def forward(self, h: Tensor) -> Tensor:
        """Return the logits, (B, classes). h: (B, *shape)."""
        h = self.convolutions(pool_to(h, self.side))
        logits: Tensor = self.linears(pool_to(h, _POOLED).flatten(1))
        return logits


class PooledConvolutions(nn.Module):
    """Two 3x3 convolutions at full size, pooling to 2x2, batch normalisation, a linear layer.

    (B, C, H, W) to (B, classes). Each convolution keeps the width and has batch normalisation and a
    ReLU after it. Weights begin as torch draws them.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        layers = [*conv_bn_relu(channels, channels), *conv_bn_relu(channels, channels)]
        self.convolutions = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels * math.prod(_POOLED), num_classes)

    def forward(self, h: Tensor) -> Tensor:
        """Return the logits, (B, classes). h: (B, C, H, W)."""
        h = self.norm(pool_to(self.convolutions(h), _POOLED))
        logits: Tensor = self.fc(h.flatten(1))
        return logits


def build_own_head(kind: str, site: Site) -> nn.Module:
    """Return one of HEADS for a site, (B, *site.shape) to (B, classes).

    It is built as site.unit("head", ...). Tokens on a grid are folded first, which is not
    published. Raises UserError for activations that are no map, and for a task of tokens or places.
    """
    task = site.blueprint.task
    if task.reads != "sample":
        raise UserError(
            f"objective: head {kind} gives one output a sample, and the task reads every "
            f"{task.reads}; expected a task of samples; choose method.objective.head=mlp"
        )
    shape = site.map
    if len(shape) != 3 or 0 in shape:
        raise site.refuse(f"head {kind}")

    def build() -> nn.Module:
        if kind == "dgl_cnn":
            return site.folded(PooledConvolutions(shape[0], task.num_classes))
        convolutions = 3 if kind == "dgl_mlp_sr" else 0
        return site.folded(PooledMLP(shape, task.num_classes, convolutions))

    return site.unit("head", build)

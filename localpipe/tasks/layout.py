"""The grid of an image's tokens: first a few prefix tokens (the class token), then the patches.

image, height x width patches        tokens (B, prefix + height * width, D)

    p0 p1 p2
    p3 p4 p5                         cls p0 p1 p2 p3 p4 p5        prefix = 1
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Grid:
    """The layout of tokens (B, prefix + height * width, D). All after the prefix are patches.

    Patches are in rows from the top, each from the left. Nothing is checked when a grid is made.
    """

    height: int
    width: int
    prefix: int = 0

    @property
    def side(self) -> tuple[int, int]:
        """(height, width): the number of rows and of columns of patches."""
        return self.height, self.width

    def patches(self, tokens: Tensor) -> Tensor:
        """Return the patch tokens, (B, height * width, D), a view of `tokens`.

        The number of tokens is not checked.
        """
        patches: Tensor = tokens[:, self.prefix :]
        return patches

    def fold(self, tokens: Tensor) -> Tensor:
        """Return the patch tokens as a map, (B, D, height, width), without the prefix tokens.

        The map is contiguous. torch raises RuntimeError if there are not height * width patches.
        """
        maps: Tensor = self.patches(tokens).transpose(1, 2).unflatten(2, self.side)
        return maps.contiguous()

    def unfold(self, maps: Tensor) -> Tensor:
        """Return a map (B, D, height, width) as tokens, (B, prefix + height * width, D).

        The prefix tokens are zeros. The size of the map is not checked.
        """
        patches = maps.flatten(2).transpose(1, 2)
        return F.pad(patches, (0, 0, self.prefix, 0))


class Fold(nn.Module):
    """Tokens to a map, before a network of maps: (B, T, D) to (B, D, height, width)."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, tokens: Tensor) -> Tensor:
        """Return `grid.fold(tokens)`."""
        return self.grid.fold(tokens)


class Unfold(nn.Module):
    """A map to tokens, after a network of maps: (B, D, height, width) to (B, T, D)."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, maps: Tensor) -> Tensor:
        """Return `grid.unfold(maps)`."""
        return self.grid.unfold(maps)

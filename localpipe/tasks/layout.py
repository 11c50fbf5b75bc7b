"""How the tokens of an image lie: a few prefix tokens (the class token), then the patches, row by row."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Grid:
    """Tokens (B, prefix + height * width, D), of which all but the first `prefix` are patches of the image."""

    height: int
    width: int
    prefix: int = 0

    @property
    def side(self) -> tuple[int, int]:
        """The patches' rows and columns."""
        return self.height, self.width

    def patches(self, tokens: Tensor) -> Tensor:
        """Return the patch tokens, (B, height * width, D), a view."""
        patches: Tensor = tokens[:, self.prefix :]
        return patches

    def fold(self, tokens: Tensor) -> Tensor:
        """Return the patch tokens as a map, (B, D, height, width); what stands in front of them is dropped."""
        maps: Tensor = self.patches(tokens).transpose(1, 2).unflatten(2, self.side)
        return maps.contiguous()

    def unfold(self, maps: Tensor) -> Tensor:
        """Return a map (B, D, height, width) as tokens, with zeros in front for the prefix."""
        return F.pad(maps.flatten(2).transpose(1, 2), (0, 0, self.prefix, 0))


class Fold(nn.Module):
    """Tokens to a map, in front of a network that wants one."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, tokens: Tensor) -> Tensor:
        return self.grid.fold(tokens)


class Unfold(nn.Module):
    """A map to tokens, behind a network that makes one."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, maps: Tensor) -> Tensor:
        return self.grid.unfold(maps)

"""How an activation's dimensions lie: its layout, its order in memory, and the grid of its tokens.

Every network has activations of its own layout. Local losses, exits, contexts and probes read the
standard form: a map (B, C, H, W), tokens (B, T, D) or features (B, D).

Of tokens, first come a few prefix tokens (the class token), then the patches:

image, height x width patches        tokens (B, prefix + height * width, D)

    p0 p1 p2
    p3 p4 p5                         cls p0 p1 p2 p3 p4 p5        prefix = 1
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

MOST_PREFIX = 16  # tokens before the patches
# The layouts that are not their own standard form: the standard dimensions, by their positions.
_STANDARD_DIMENSIONS = {"hwc": (2, 0, 1), "ct": (1, 0)}
# Back from the standard form.
_OWN_DIMENSIONS = {"hwc": (1, 2, 0), "ct": (1, 0)}


@dataclass(frozen=True)
class Layout:
    """The layout of an activation, by its name: `chw`, `hwc`, `td`, `ct`, `d`, or "" for another.

    The standard form is a map (B, C, H, W) for chw and hwc, tokens (B, T, D) for td and ct, and (B,
    D) for d. An unknown name is its own standard form.
    """

    name: str = ""

    @property
    def is_standard(self) -> bool:
        """Whether an activation of this layout is its own standard form."""
        return self.name not in _STANDARD_DIMENSIONS

    def standard_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape per sample of the standard form. shape: per sample, in this layout.

        Raises IndexError for a shape of fewer dimensions than the layout has.
        """
        if self.is_standard:
            return tuple(shape)
        return tuple(shape[dim] for dim in _STANDARD_DIMENSIONS[self.name])

    def to_standard(self, h: Tensor) -> Tensor:
        """Return an activation (B, *shape) in its standard form, a view or the same tensor."""
        return _permute(h, _STANDARD_DIMENSIONS.get(self.name))

    def from_standard(self, h: Tensor) -> Tensor:
        """Return an activation in its standard form as one of this layout, a view or the same."""
        return _permute(h, _OWN_DIMENSIONS.get(self.name))


def _permute(h: Tensor, dimensions: tuple[int, ...] | None) -> Tensor:
    """Return a view of (B, ...) with the dimensions after the batch in another order."""
    if dimensions is None:
        return h
    return h.permute(0, *[dim + 1 for dim in dimensions])


def arrange(h: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return (B, ...) with its memory in an order, the same tensor where it lies so already.

    order: the dimensions after the batch, from the outermost to the innermost, () for a contiguous
    tensor. A new tensor keeps the graph.
    """
    dimensions = [0, *[dim + 1 for dim in order or range(h.dim() - 1)]]
    if h.permute(dimensions).is_contiguous():
        return h
    positions = [dimensions.index(dim) for dim in range(h.dim())]
    return h.permute(dimensions).contiguous().permute(positions)


@dataclass(frozen=True)
class Grid:
    """The layout of tokens (B, prefix + height * width, D). All after the prefix are patches.

    Patches are in rows from the top, each from the left. Nothing is checked when a grid is made.
    """

    height: int
    width: int
    prefix: int = 0

    def prefix_of(self, count: int) -> int | None:
        """Return how many of `count` tokens precede the patches, or None where they do not fit.

        They fit where 0 to 16 tokens are left beside height * width patches.
        """
        prefix = count - self.height * self.width
        if 0 <= prefix <= MOST_PREFIX:
            return prefix
        return None

    def at(self, count: int) -> Grid | None:
        """Return the grid of an activation of `count` tokens, or None where they have none.

        It has the prefix of `prefix_of`. The number of patches is this grid's.
        """
        prefix = self.prefix_of(count)
        if prefix is None:
            return None
        return replace(self, prefix=prefix)

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


def grid_of(shape: tuple[int, ...], grid: Grid | None) -> Grid | None:
    """Return the grid of activations of a standard shape per sample, or None where they have none.

    grid: the network's, or None. Only tokens (T, D) have a grid, with the prefix that T gives.
    """
    if grid is None or len(shape) != 2:
        return None
    return grid.at(shape[0])


def map_shape(shape: tuple[int, ...], grid: Grid | None) -> tuple[int, ...]:
    """Return the shape per sample of tokens folded to their grid, (D, h, w), and others as it is.

    shape: of the standard form, per sample. grid: as of `grid_of`.
    """
    grid = grid_of(shape, grid)
    if grid is None:
        return shape
    return (shape[1], *grid.side)


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

"""Consecutive blocks as one module, which passes on the companions of the main tensor.

A block of a recorded network may take and give more tensors than one: block(main, *companions)
returns main, or (main, *companions).
"""

from __future__ import annotations

from torch import Tensor, nn

# The main tensor, alone or with its companions after it.
Activation = Tensor | tuple[Tensor, ...]


def split_activation(activation: Activation) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the main tensor of what a block gave, and its companions, which may be none."""
    if isinstance(activation, tuple):
        return activation[0], activation[1:]
    return activation, ()


def join_activation(main: Tensor, companions: tuple[Tensor, ...]) -> Activation:
    """Return what a block gives: the main tensor alone, or a tuple with its companions."""
    if companions:
        return (main, *companions)
    return main


class Blocks(nn.Sequential):
    """Blocks that run one after another, each on all tensors that the one before gave."""

    def forward(self, x: Tensor, *companions: Tensor) -> Activation:
        """Return what the last block gives. x: the main tensor, (B, *input_shape)."""
        for block in self:
            x, companions = split_activation(block(x, *companions))
        return join_activation(x, companions)

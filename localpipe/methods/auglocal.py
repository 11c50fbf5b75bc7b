"""AugLocal (Ma et al., ICLR 2024): an auxiliary network that has the architecture of later blocks, picked evenly.

Depth falls with the stage (the pyramid). The picked blocks are rebuilt behind each other, each at its own width, the first
one taking the stage's output; a doubling of the width has stride 2, a fourfold jump has it at two blocks, or once where no
second block follows. A linear classifier on pooled features ends the network. Nothing is shared with the network's own later
blocks. On the networks of ImageNet the released code keeps the depth and normalises no features.

For tokens nothing is published: here later encoder layers are copied as they are, class token included, and the exit pools
the mean over the patch tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from localpipe.config import registry
from localpipe.errors import UserError
from localpipe.methods.objective import LocalLoss, Site
from localpipe.networks.blueprint import Blueprint
from localpipe.networks.layers import pool_to
from localpipe.tasks.classification import Classification


class AugLocal(LocalLoss):
    """The task's loss of the auxiliary network."""

    @dataclass(frozen=True)
    class Options:
        """`aux_depth` is d, `aux_min_depth` d_min, `pyramid` r; r = 0 keeps the depth."""

        aux_depth: Annotated[
            int, Field(ge=1, description="imitated blocks behind the first stage, d")
        ] = 3
        aux_min_depth: Annotated[
            int, Field(ge=1, description="the depth that the pyramid moves towards, d_min")
        ] = 1
        pyramid: Annotated[
            Literal["auto"] | Annotated[float, Field(ge=0, le=1)],
            Field(
                description="how far the depth falls over the stages, r; auto is 0 for the networks of ImageNet, else 0.5"
            ),
        ] = "auto"

    def __init__(self, options: Options, site: Site) -> None:
        super().__init__()
        if len(site.shape) not in (2, 3):
            raise site.refuse("auglocal")
        self.task = site.blueprint.task
        nominal = nominal_depth(options, site.stage, site.stages)
        chosen = select_blocks(site.last_block, len(site.blueprint.blocks), nominal)
        self.network = site.unit(
            "network",
            lambda: build_network(site.blueprint, site.last_block, site.shape, chosen, nominal),
        )

    @staticmethod
    def resolved(
        options: Options, network: str, data: str, cuts: str | tuple[int, ...], stages: int
    ) -> Options:
        """Return the options with the pyramid as released, where it is auto. Raise UserError for a depth that would rise."""
        if options.aux_min_depth > options.aux_depth:
            raise UserError(
                f"config: method.objective.aux_min_depth must be at most aux_depth, which is {options.aux_depth}; "
                f"got {options.aux_min_depth}; raise aux_depth, or leave aux_min_depth out"
            )
        released = 0.0 if network in registry.IMAGENET else 0.5
        return replace(options, pyramid=released if options.pyramid == "auto" else options.pyramid)

    def exit(self, h: Tensor) -> Tensor:
        """Return the auxiliary network's logits, (B, classes)."""
        logits: Tensor = self.network(h)
        return logits


def nominal_depth(options: AugLocal.Options, stage: int, stages: int) -> int:
    """Return the nominal depth at a local stage: from d in a straight line towards d_min, rounded half to even."""
    assert options.pyramid != "auto", "resolved before a stage is built"
    share = options.pyramid * stage / (stages - 2) if stages > 2 else 0.0
    return max(
        options.aux_min_depth,
        round((1 - share) * options.aux_depth + share * options.aux_min_depth),
    )


def select_blocks(last_block: int, blocks: int, wanted: int) -> list[int]:
    """Return the indices of the imitated blocks behind `last_block`, evenly spaced, the network's last one included."""
    remaining = blocks - 1 - last_block
    if wanted >= remaining:
        return list(range(last_block + 1, blocks))
    return [round(last_block + remaining * j / wanted) for j in range(1, wanted + 1)]


def block_strides(widths: list[int]) -> list[int]:
    """Return the stride of each block behind the first width: 2 for each doubling, a fourfold jump over two blocks."""
    result, pending = [], 0.0
    for before, width in zip(widths, widths[1:], strict=False):
        pending += math.log2(width / before)
        result.append(2 if pending >= 1 else 1)
        pending -= pending >= 1
    return result


class Exit(nn.Module):
    """Pooling, batch normalisation where it is asked for, and a linear classifier."""

    def __init__(
        self, features: int, task: Classification, num_classes: int, normalise: bool
    ) -> None:
        super().__init__()
        self.task = task
        self.norm: nn.Module = nn.BatchNorm1d(features) if normalise else nn.Identity()
        self.fc = nn.Linear(features, num_classes)

    def forward(self, h: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.norm(self.task.pool(h)))
        return logits


def build_network(
    blueprint: Blueprint, last_block: int, shape: tuple[int, ...], chosen: list[int], nominal: int
) -> nn.Sequential:
    """Return the auxiliary network for an activation of `shape` behind `last_block`.

    Features are normalised where the nominal depth is at most 1, but never on the networks of ImageNet.
    """
    task = blueprint.task
    layers, features = rebuild_blocks(blueprint, last_block, shape, chosen) or copy_blocks(
        blueprint, shape, chosen
    )
    normalise = nominal <= 1 and blueprint.name not in registry.IMAGENET
    return nn.Sequential(*layers, Exit(features, task, task.num_classes, normalise))


def rebuild_blocks(
    blueprint: Blueprint, last_block: int, shape: tuple[int, ...], chosen: list[int]
) -> tuple[list[nn.Module], int] | None:
    """Return the chosen blocks rebuilt behind each other and the channels behind them; None where the network cannot."""
    if blueprint.rebuild is None:
        return None
    widths = [blueprint.blocks[index].width for index in [last_block, *chosen]]
    channels, layers = shape[0], []  # of a stem they are its width, of a bottleneck a multiple
    for width, stride in zip(widths[1:], block_strides(widths), strict=True):
        layers.append(blueprint.rebuild(channels, width, stride))
        channels = width * blueprint.expansion
    return layers, channels


def copy_blocks(
    blueprint: Blueprint, shape: tuple[int, ...], chosen: list[int]
) -> tuple[list[nn.Module], int]:
    """Return fresh copies of the chosen blocks, each behind a small adapter where the shapes do not meet.

    None of it is published: it is what is left where a block cannot be rebuilt at another width. Raise UserError where no
    small adapter leads from one shape to the other.
    """
    shapes = [blueprint.image, *blueprint.shapes()]
    layers: list[nn.Module] = []
    for index, block in zip(chosen, blueprint.fresh(chosen), strict=True):
        wanted = shapes[index]
        if tuple(shape) != tuple(wanted):
            layers.append(build_adapter(shape, wanted))
        layers.append(block)
        shape = shapes[index + 1]
    return layers, blueprint.task.features(shape)


class MapAdapter(nn.Module):
    """A 1x1 convolution to the wanted channels, pooled to the wanted size; (B, C, H, W) to (B, C', *size)."""

    def __init__(self, channels: int, wanted: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, wanted, 1, bias=False)
        self.size = size

    def forward(self, h: Tensor) -> Tensor:
        return pool_to(self.conv(h), self.size)


def build_adapter(shape: tuple[int, ...], wanted: tuple[int, ...]) -> nn.Module:
    """Return the adapter from one per-sample shape to another: of maps, or of tokens as many, by a linear layer each."""
    if len(shape) == len(wanted) == 3:
        return MapAdapter(shape[0], wanted[0], (wanted[1], wanted[2]))
    if len(shape) == len(wanted) == 2 and shape[0] == wanted[0]:
        return nn.Linear(shape[1], wanted[1], bias=False)
    raise UserError(
        f"objective: auglocal has no adapter from an activation of shape {shape} to a copied block that takes {wanted}; "
        "expected maps, or as many tokens; move the cut, or choose another objective"
    )

"""AugLocal (Ma et al., ICLR 2024): an auxiliary network with the architecture of later blocks.

The blocks are picked evenly from those after the stage. Their number falls from stage to stage (the
pyramid). The picked blocks are rebuilt in a row, each at its own width, and the first one takes the
stage's output. A doubling of the width has stride 2. A fourfold jump has stride 2 at two blocks, or
once where no second block follows. A linear classifier on pooled features ends the network. Nothing
is shared with the network's own later blocks. On the networks of ImageNet, the released code keeps
the depth and normalises no features.

For tokens nothing is published. Here later encoder layers are copied as they are, class token
included, and the exit pools the mean over the patch tokens. Where the task reads every token, the
exit is a layer norm and a linear layer on each, and copied decoder layers are causal by themselves.

A copied block gets its input in the network's own layout. Between the copies, activations have
their standard form. A block that takes or gives more tensors than one is not copied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from localpipe.config import registry
from localpipe.errors import UserError
from localpipe.methods.objective import LocalLoss, Site
from localpipe.networks.blueprint import BlockOutput, Blueprint
from localpipe.networks.layers import pool_to
from localpipe.tasks.layout import Fold, Unfold, grid_of, map_shape
from localpipe.tasks.task import Task, read_exit


class AugLocal(LocalLoss):
    """The task's loss of the auxiliary network.

    The constructor takes resolved options. It raises UserError for activations of shape (D,), where
    no adapter leads to a copied block, and where no later block takes one tensor alone.
    """

    @dataclass(frozen=True)
    class Options:
        """`aux_depth` is d, `aux_min_depth` d_min, `pyramid` r. With r = 0 the depth stays d."""

        aux_depth: Annotated[
            int, Field(ge=1, description="imitated blocks after the first stage, d")
        ] = 3
        aux_min_depth: Annotated[
            int, Field(ge=1, description="the depth that the pyramid moves towards, d_min")
        ] = 1
        pyramid: Annotated[
            Literal["auto"] | Annotated[float, Field(ge=0, le=1)],
            Field(
                description="how far the depth falls over the stages, r; "
                "auto is 0 for the networks of ImageNet, else 0.5"
            ),
        ] = "auto"

    def __init__(self, options: Options, site: Site) -> None:
        super().__init__()
        if len(site.shape) not in (2, 3):
            raise site.refuse("auglocal")
        site.check_tokens("auglocal")
        if site.reads_places and len(site.map) != 3:
            raise site.refuse("auglocal")
        blueprint, last_block = site.blueprint, site.last_block
        self.task = blueprint.task
        depth = nominal_depth(options, site.stage, site.stages)
        indices = select_copied(blueprint, last_block, depth)
        if not indices and last_block < len(blueprint.blocks) - 1:
            raise UserError(
                f"objective: auglocal finds no block to copy after stage {site.stage}: every later "
                f"block of {blueprint.name} takes or gives several tensors; expected one that "
                "takes and gives one; move the cut, or choose another objective"
            )
        self.network = site.unit(
            "network", lambda: build_network(blueprint, last_block, site.shape, indices, depth)
        )

    @staticmethod
    def resolved(
        options: Options, network: str, data: str, cuts: str | tuple[int, ...], stages: int
    ) -> Options:
        """Return the options with the released pyramid where it is auto.

        network: a name of the registry or a user's. It alone decides, so `data`, `cuts` and
        `stages` are ignored. A pyramid that is set stays. Raises UserError if aux_min_depth is
        above aux_depth.
        """
        if options.aux_min_depth > options.aux_depth:
            raise UserError(
                "config: method.objective.aux_min_depth must be at most aux_depth, "
                f"which is {options.aux_depth}; got {options.aux_min_depth}; "
                "raise aux_depth, or leave aux_min_depth out"
            )
        if options.pyramid != "auto":
            return options
        if network in registry.IMAGENET:
            return replace(options, pyramid=0.0)
        return replace(options, pyramid=0.5)

    def exit(self, h: Tensor) -> Tensor:
        """Return the auxiliary network's logits, (B, classes). It is never None."""
        logits: Tensor = self.network(h)
        return logits


def nominal_depth(options: AugLocal.Options, stage: int, stages: int) -> int:
    """Return the nominal depth of a local stage, rounded half to even, at least d_min.

    It moves from d in a straight line towards d_min, as far as the pyramid r says. stage: 0 ..
    stages - 2. Raises AssertionError if the pyramid is auto.
    """
    assert options.pyramid != "auto", "resolved before a stage is built"
    progress = 0.0
    if stages > 2:
        progress = options.pyramid * stage / (stages - 2)
    depth = (1 - progress) * options.aux_depth + progress * options.aux_min_depth
    return max(options.aux_min_depth, round(depth))


def select_blocks(last_block: int, blocks: int, depth: int) -> list[int]:
    """Return the indices of `depth` blocks after `last_block`, evenly spaced and rising.

    blocks: the number of blocks of the network. The network's last block is one of them. Where
    fewer blocks remain, all of them are returned, so the list is empty after the last block. depth:
    at least 1.
    """
    remaining = blocks - 1 - last_block
    if depth >= remaining:
        return list(range(last_block + 1, blocks))
    return [round(last_block + remaining * j / depth) for j in range(1, depth + 1)]


def select_copied(blueprint: Blueprint, last_block: int, depth: int) -> list[int]:
    """Return the indices of the imitated blocks, as `select_blocks` does, rising.

    Only blocks that take and give one tensor are counted. The list may be empty. depth: at least 1.
    """
    candidates = []
    for index in range(last_block + 1, len(blueprint.blocks)):
        if not blueprint.input(index).companions and not blueprint.output(index).companions:
            candidates.append(index)
    # They are selected as if the others did not exist.
    first = last_block + 1
    selected = select_blocks(last_block, first + len(candidates), depth)
    return [candidates[position - first] for position in selected]


def block_strides(widths: list[int]) -> list[int]:
    """Return the stride of every block after the first width, 1 or 2.

    It is 2 for each doubling of the width. A fourfold jump takes two blocks. The list has one entry
    fewer than `widths`.
    """
    strides = []
    doublings = 0.0
    for previous_width, width in pairwise(widths):
        doublings += math.log2(width / previous_width)
        if doublings >= 1:
            strides.append(2)
            doublings -= 1
        else:
            strides.append(1)
    return strides


class Exit(nn.Module):
    """Pooling, batch normalisation with `normalise`, and a linear classifier.

    (B, C, H, W) or (B, T, D) to (B, classes), or for a task of places to (B, classes, H, W) of the
    image. A task of tokens has a layer norm, always, and outputs (B, T, classes). features: the
    width that `task` pools to.
    """

    def __init__(self, features: int, task: Task, num_classes: int, normalise: bool) -> None:
        super().__init__()
        self.task = task
        self.norm: nn.Module = nn.Identity()
        if task.reads == "token":
            self.norm = nn.LayerNorm(features)  # no token sees another one
        elif normalise:
            self.norm = nn.BatchNorm1d(features)
        self.fc = nn.Linear(features, num_classes)

    def forward(self, h: Tensor) -> Tensor:
        """Return the logits, as the task's loss takes them."""
        return read_exit(self.task.in_mode(self.training), self._classify, h)

    def _classify(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.norm(rows))
        return logits


def build_network(
    blueprint: Blueprint, last_block: int, shape: tuple[int, ...], indices: list[int], depth: int
) -> nn.Sequential:
    """Return the auxiliary network for activations after `last_block`, (B, *shape) to (B, classes).

    shape: of the activations, per sample. indices: those of the imitated blocks. depth: the nominal
    one. Features are normalised where it is at most 1, but never on the networks of ImageNet.
    Weights are drawn from the default generator. Raises UserError as `copy_blocks` does.
    """
    if blueprint.rebuild is not None:
        layers, features = rebuild_blocks(blueprint, last_block, shape, indices)
    else:
        layers, features = copy_blocks(blueprint, shape, indices)
    if blueprint.build_exit is not None:
        return nn.Sequential(*layers, blueprint.build_exit(features))
    task = blueprint.task
    normalise = depth <= 1 and blueprint.name not in registry.IMAGENET
    return nn.Sequential(*layers, Exit(features, task, task.num_classes, normalise))


def rebuild_blocks(
    blueprint: Blueprint, last_block: int, shape: tuple[int, ...], indices: list[int]
) -> tuple[list[nn.Module], int]:
    """Return the chosen blocks rebuilt in a row, and the channels after them.

    The blueprint must have `rebuild`, else AssertionError. shape: (C, H, W). The channels are C
    where `indices` is empty. Weights are drawn from the default generator.
    """
    assert blueprint.rebuild is not None, "copied otherwise"
    widths = [blueprint.blocks[index].width for index in [last_block, *indices]]
    # The channels after a stem are its width, and those after a bottleneck a multiple of it.
    channels = shape[0]
    layers = []
    for width, stride in zip(widths[1:], block_strides(widths), strict=True):
        layers.append(blueprint.rebuild(channels, width, stride))
        channels = width * blueprint.expansion
    return layers, channels


def copy_blocks(
    blueprint: Blueprint, shape: tuple[int, ...], indices: list[int]
) -> tuple[list[nn.Module], int]:
    """Return copies of the chosen blocks with new weights, and the features after them.

    Where two shapes differ, a small adapter precedes the copy. Nothing of it is published: it
    serves networks whose blocks cannot be rebuilt at another width. shape: (C, H, W) or (T, D), of
    the standard form. A copy of another layout, or of another order in memory, has a conversion
    before and after it. Raises UserError if there is no adapter from one shape to the other.
    """
    layers: list[nn.Module] = []
    for index, block in zip(indices, blueprint.build_new_blocks(indices), strict=True):
        takes, gives = blueprint.input(index), blueprint.output(index)
        if tuple(shape) != tuple(takes.standard_shape):
            layers.append(build_adapter(shape, takes.standard_shape, blueprint.task))
        if not takes.is_plain:
            layers.append(FromStandard(takes))
        layers.append(block)
        if not gives.is_plain:
            layers.append(ToStandard(gives))
        shape = gives.standard_shape
    return layers, blueprint.task.features(shape)


class FromStandard(nn.Module):
    """An activation in its standard form as a block takes it, in layout and memory."""

    def __init__(self, output: BlockOutput) -> None:
        super().__init__()
        self.output = output

    def forward(self, h: Tensor) -> Tensor:
        """Return the main tensor, (B, *output.shape)."""
        return self.output.from_standard(h)

    def extra_repr(self) -> str:
        """Return the layout and the order, for the module's text."""
        return f"{self.output.layout} {self.output.order}"


class ToStandard(nn.Module):
    """What a block gives in its standard form, a view."""

    def __init__(self, output: BlockOutput) -> None:
        super().__init__()
        self.output = output

    def forward(self, h: Tensor) -> Tensor:
        """Return the main tensor in its standard form."""
        return self.output.to_standard(h)

    def extra_repr(self) -> str:
        """Return the layout, for the module's text."""
        return self.output.layout


class MapAdapter(nn.Module):
    """A 1x1 convolution, then pooling to a size: (B, channels, H, W) to (B, outputs, *size)."""

    def __init__(self, channels: int, outputs: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, outputs, 1, bias=False)
        self.size = size

    def forward(self, h: Tensor) -> Tensor:
        """Return the map, (B, outputs, *size)."""
        return pool_to(self.conv(h), self.size)


class FlatAdapter(nn.Module):
    """The mean over positions, then a linear layer: (B, C, H, W) or (B, T, D) to (B, outputs).

    features: the width that `task` pools to.
    """

    def __init__(self, features: int, outputs: int, task: Task) -> None:
        super().__init__()
        self.task = task
        self.linear = nn.Linear(features, outputs, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """Return the features, (B, outputs)."""
        features: Tensor = self.linear(self.task.pool(h))
        return features


def build_adapter(shape: tuple[int, ...], output: tuple[int, ...], task: Task) -> nn.Module:
    """Return the adapter from activations of one shape per sample to another, a new module.

    shape: of its input, a map (C, H, W), tokens (T, D) or features (D,). output: of its output.
    Where the task reads samples, features are made of everything. A map is made of a map, and
    tokens of as many tokens. Where `task` has a grid, tokens on it are adapted as a map of their
    patches. Raises UserError otherwise.
    """
    if len(output) == 1 and task.reads == "sample":
        return FlatAdapter(task.features(shape), output[0], task)
    if len(shape) == len(output) == 2 and shape[0] == output[0]:
        return nn.Linear(shape[1], output[1], bias=False)
    folded, unfolded = map_shape(shape, task.grid), map_shape(output, task.grid)
    if not len(folded) == len(unfolded) == 3:
        raise UserError(
            f"objective: auglocal has no adapter from an activation of shape {shape} "
            f"to a copied block that takes {output}; "
            "expected maps, or as many tokens; move the cut, or choose another objective"
        )

    # Tokens are folded before the convolution, and unfolded after it.
    layers: list[nn.Module] = [MapAdapter(folded[0], unfolded[0], (unfolded[1], unfolded[2]))]
    input_grid, output_grid = grid_of(shape, task.grid), grid_of(output, task.grid)
    if input_grid is not None:
        layers.insert(0, Fold(input_grid))
    if output_grid is not None:
        layers.append(Unfold(output_grid))
    if len(layers) == 1:
        return layers[0]
    return nn.Sequential(*layers)

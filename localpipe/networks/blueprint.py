"""What a network is: named blocks built on demand, a tail, and the names its parameters have in the whole network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from localpipe import seeds
from localpipe.tasks.classification import Classification


@dataclass(frozen=True)
class Block:
    """The smallest unit that is never cut. `prefix` leads its parameters' names in the whole network's state_dict."""

    name: str
    prefix: str
    build: Callable[[], nn.Module]
    width: int = 0  # where blocks can be rebuilt at another one: channels behind it, before a bottleneck's expansion


@dataclass(frozen=True)
class Blueprint:
    """An ordered list of blocks and the network's own head, the tail, which always lives with the last stage.

    `whole` is set for a network that comes as one object: it is one unit, built whole under the seed wherever a part of
    it is needed, and its children are the blocks and, last, the tail.
    """

    name: str
    blocks: tuple[Block, ...]
    tail: Block
    task: Classification
    image: tuple[int, int, int]  # (C, H, W) of one sample
    whole: Callable[[], nn.Sequential] | None = None
    rebuild: Callable[[int, int, int], nn.Module] | None = (
        None  # a block of this family from (channels, width, stride)
    )
    expansion: int = 1  # channels behind a rebuilt block, in widths: 4 for bottlenecks

    @property
    def parts(self) -> tuple[Block, ...]:
        """The blocks and the tail, in order."""
        return (*self.blocks, self.tail)

    def build(self, wanted: Sequence[int], seed: int) -> list[nn.Module]:
        """Return the wanted parts (the tail's index is len(blocks)) with the initial weights of this seed, on the CPU."""
        if self.whole is None:
            return [
                seeds.build_seeded(seed, self.parts[i].name, self.parts[i].build) for i in wanted
            ]
        children = list(seeds.build_seeded(seed, "network", self.whole))
        return [children[i] for i in wanted]

    def build_meta(self, wanted: Sequence[int]) -> list[nn.Module]:
        """Return the wanted parts on the meta device: shapes without values, for plans."""
        if self.whole is not None:
            return [part.to("meta") for part in self.build(wanted, 0)]
        with torch.device("meta"):
            return [self.parts[i].build() for i in wanted]

    def fresh(self, wanted: Sequence[int]) -> list[nn.Module]:
        """Return new modules of the wanted blocks' architecture, drawn from the default generator as it stands."""
        if self.whole is not None:
            children = list(self.whole())
            return [children[i] for i in wanted]
        return [self.blocks[i].build() for i in wanted]

    def shapes(self) -> list[tuple[int, ...]]:
        """Return the per-sample shape behind every block, found by running the blocks on the meta device."""
        return list(self._shapes)

    @cached_property
    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(h.shape[1:]) for h in self._walk())

    def _walk(self) -> Iterator[Tensor]:
        h = torch.empty(2, *self.image, device="meta")
        with torch.no_grad():
            for block in self.build_meta(range(len(self.blocks))):
                h = block(h)
                yield h

"""A network as data: named blocks built on demand, a tail, and the parameters' full names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from localpipe import seeds
from localpipe.errors import UserError
from localpipe.tasks.task import Task


@dataclass(frozen=True)
class Block:
    """The smallest unit, which is never cut.

    `prefix` precedes the names of its parameters in the whole network's state_dict. `width` is set
    where blocks can be rebuilt at another width, and 0 elsewhere: the output channels before a
    bottleneck's expansion. `build` returns a new module on every call, drawn from the default
    generator.
    """

    name: str
    prefix: str
    build: Callable[[], nn.Module]
    width: int = 0


@dataclass(frozen=True)
class Companion:
    """A tensor that crosses beside the main one, (B, *shape). Only blocks read it.

    dtype: torch's name without `torch.`. order: as in BlockOutput.
    """

    shape: tuple[int, ...]
    dtype: str
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class BlockOutput:
    """What a block gives: the main tensor, (B, *shape) of floating point, and its companions.

    The block after it is called with the main tensor first, then the companions in order.

    layout: what the dimensions after the batch are. `chw` is a map, `hwc` a map with its channels
    last, `td` tokens of D features, `ct` C channels of a sequence, `d` features alone. order: the
    dimensions of `shape` from the outermost to the innermost in memory, as (1, 2, 0) for (C, H, W)
    whose channels are innermost. () is a contiguous tensor.
    """

    shape: tuple[int, ...]
    layout: str
    order: tuple[int, ...] = ()
    companions: tuple[Companion, ...] = ()


# The layout of a tensor by its number of dimensions after the batch, where nothing else is known.
PLAIN_LAYOUTS = {1: "d", 2: "td", 3: "chw"}


@dataclass(frozen=True)
class Blueprint:
    """An ordered list of blocks and the network's own head, the tail, which the last stage holds.

    `image` is the shape (C, H, W) of one sample.

    `build_network` is set for a network that is one object. Wherever a part is needed, the whole
    network is built under one seed. Its children are the blocks and, last, the tail.

    `rebuild(channels, width, stride)` returns a new block of this family, where there is such a
    rule. `expansion` is the ratio of such a block's output channels to its width: 4 for
    bottlenecks.

    `uncut` says for every block what its output is, where that cannot cross to another stage, else
    None. It is empty where all outputs can.

    `recorded_outputs` describes the output of every block of a recorded network. It is empty for
    the others, whose blocks give one contiguous tensor.
    """

    name: str
    blocks: tuple[Block, ...]
    tail: Block
    task: Task
    image: tuple[int, int, int]
    build_network: Callable[[], nn.Sequential] | None = None
    rebuild: Callable[[int, int, int], nn.Module] | None = None
    expansion: int = 1
    uncut: tuple[str | None, ...] = ()
    recorded_outputs: tuple[BlockOutput, ...] = ()

    @property
    def parts(self) -> tuple[Block, ...]:
        """The blocks and the tail, in order."""
        return (*self.blocks, self.tail)

    def build(self, indices: Sequence[int], seed: int) -> list[nn.Module]:
        """Return parts with the initial weights of a seed, on the CPU, in the order of `indices`.

        indices: positions in `parts`. The index of the tail is len(blocks). Every call builds new
        modules. A part's weights depend on the seed and its name alone, or with `build_network` on
        the seed alone. The default generator stays as it is. Raises IndexError for an index out of
        range.
        """
        if self.build_network is not None:
            children = list(seeds.build_unit(seed, "network", self.build_network))
            return [children[index] for index in indices]
        modules = []
        for index in indices:
            part = self.parts[index]
            modules.append(seeds.build_unit(seed, part.name, part.build))
        return modules

    def build_meta(self, indices: Sequence[int]) -> list[nn.Module]:
        """Return parts on the meta device, shapes without values, in the order of `indices`.

        indices: positions in `parts`. With `build_network`, the whole network is first built on the
        CPU. Raises IndexError for an index out of range.
        """
        if self.build_network is not None:
            return [to_meta(part) for part in self.build(indices, 0)]
        with torch.device("meta"):
            return [to_meta(self.parts[index].build()) for index in indices]

    def build_new_blocks(self, indices: Sequence[int]) -> list[nn.Module]:
        """Return new modules of these blocks' architecture, drawn from the default generator.

        indices: positions in `blocks`. The modules are on the default device, and a second call
        draws other weights. Raises IndexError for an index out of range.
        """
        if self.build_network is not None:
            children = list(self.build_network())
            return [children[index] for index in indices]
        return [self.blocks[index].build() for index in indices]

    def check_cut(self, index: int) -> None:
        """Raise UserError where the network cannot be cut after the block at `index`."""
        if index < len(self.uncut) and self.uncut[index] is not None:
            raise UserError(
                f"model: block {self.blocks[index].name} of {self.name} {self.uncut[index]}; "
                "expected one real floating-point tensor, the batch first, where the network is "
                "cut; put it and the next block into one nested nn.Sequential, or move the cut"
            )

    @cached_property
    def state(self) -> tuple[dict[str, Tensor], ...]:
        """The parameters and buffers of every part, by their names in the whole network.

        The parts have the order of `parts`. The tensors lie on the meta device: they have shapes
        and no values. The parts are built at the first call.
        """
        state = []
        modules = self.build_meta(range(len(self.parts)))
        for part, module in zip(self.parts, modules, strict=True):
            tensors = module.state_dict().items()
            state.append({part.prefix + name: tensor for name, tensor in tensors})
        return tuple(state)

    def shapes(self) -> list[tuple[int, ...]]:
        """Return the output shape per sample of every block. The blocks run on the meta device.

        They run at the first call only. The tail is not among them. The list is new, so it may be
        changed. Raises what the blocks raise for images of shape `image`.
        """
        return list(self._shapes)

    def output(self, index: int) -> BlockOutput:
        """Return what the block at `index` gives. The blocks run on the meta device at first.

        A tensor of four dimensions or more after the batch has the layout "". Raises IndexError for
        an index out of range, and what the blocks raise for images of shape `image`.
        """
        if self.recorded_outputs:
            return self.recorded_outputs[index]
        shape = self._shapes[index]
        return BlockOutput(shape, PLAIN_LAYOUTS.get(len(shape), ""))

    @cached_property
    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        if self.recorded_outputs:
            return tuple(output.shape for output in self.recorded_outputs)
        shapes = []
        h = torch.empty(2, *self.image, device="meta")
        with torch.no_grad():
            for block in self.build_meta(range(len(self.blocks))):
                h = block(h)
                shapes.append(tuple(h.shape[1:]))
        return tuple(shapes)


def to_meta(module: nn.Module) -> nn.Module:
    """Move a new module to the meta device, and return it: it keeps shapes and loses values.

    A batch normalisation with momentum=None averages over the batches that it has counted. Without
    values there is no count, so it gets a momentum.
    """
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and layer.momentum is None:
            layer.momentum = 0.1
    return module.to("meta")

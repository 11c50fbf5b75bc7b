"""A network as data: named blocks built on demand, a tail, and the parameters' full names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from localpipe import seeds
from localpipe.errors import UserError, suggest
from localpipe.fields import IMAGE, INPUT, Field
from localpipe.tasks.layout import Layout, arrange
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

    @property
    def is_plain(self) -> bool:
        """Whether it is one contiguous tensor in its standard form."""
        return Layout(self.layout).is_standard and not self.order and not self.companions

    @property
    def standard_shape(self) -> tuple[int, ...]:
        """The shape of the main tensor's standard form, per sample: (C, H, W), (T, D) or (D,)."""
        return Layout(self.layout).standard_shape(self.shape)

    def to_standard(self, h: Tensor) -> Tensor:
        """Return the main tensor, (B, *shape), in its standard form, a view or the same tensor."""
        return Layout(self.layout).to_standard(h)

    def from_standard(self, h: Tensor) -> Tensor:
        """Return a main tensor in its standard form as this output lies, in layout and memory.

        A plain one is the same tensor.
        """
        if self.is_plain:
            return h
        return arrange(Layout(self.layout).from_standard(h), self.order)


# The layout of a tensor by its number of dimensions after the batch, where nothing else is known.
PLAIN_LAYOUTS = {1: "d", 2: "td", 3: "chw"}


@dataclass(frozen=True)
class Blueprint:
    """An ordered list of blocks and the network's own head, the tail, which the last stage holds.

    `sample` is the shape of one input, (C, H, W) of an image or (T,) of tokens. `dtype` is that of
    the inputs: uint8 for images of bytes, which are normalised before the first block.
    `image_dtype` is that of such images in a message: float32 in 0..255 where they are mixed.

    `build_network` is set for a network that is one object. Wherever a part is needed, the whole
    network is built under one seed. Its children are the blocks and, last, the tail.

    `rebuild(channels, width, stride)` returns a new block of this family, where there is such a
    rule. `expansion` is the ratio of such a block's output channels to its width: 4 for
    bottlenecks. `build_exit(channels)` returns a new classifier at the end of rebuilt blocks, where
    the published one is not pooling and a linear layer.

    `uncut` says for every block what its output is, where that cannot cross to another stage, else
    None. It is empty where all outputs can.

    `recorded_outputs` describes the output of every block of a recorded network. It is empty for
    the others, whose blocks give one contiguous tensor. `library` is the library that it comes
    from, with its version, as `timm 1.0.3`.

    `build_original` returns a new network of the user's or library's own class, whose state_dict
    has the names of the parts. It is None for a shipped network.

    `evaluation_sample` is the shape of one input in an evaluation, None where it is the same.
    `evaluation_outputs` then has the place of `recorded_outputs`.

    `notes` are lines for the user on what the recording has found. `functional_batch_norms` are
    modules that normalise over the batch without a layer of torch's for it, which no stage can
    replace. `why_whole` says why a recorded network is one block, and is None for the others.
    """

    name: str
    blocks: tuple[Block, ...]
    tail: Block
    task: Task
    sample: tuple[int, ...]
    build_network: Callable[[], nn.Sequential] | None = None
    rebuild: Callable[[int, int, int], nn.Module] | None = None
    expansion: int = 1
    build_exit: Callable[[int], nn.Module] | None = None
    uncut: tuple[str | None, ...] = ()
    recorded_outputs: tuple[BlockOutput, ...] = ()
    library: str | None = None
    build_original: Callable[[], nn.Module] | None = None
    notes: tuple[str, ...] = ()
    functional_batch_norms: tuple[str, ...] = ()
    why_whole: str | None = None
    dtype: str = "uint8"
    image_dtype: str = "uint8"
    evaluation_sample: tuple[int, ...] | None = None
    evaluation_outputs: tuple[BlockOutput, ...] = ()

    def for_evaluation(self) -> Blueprint | None:
        """Return the network of evaluations, None where their inputs have the same shape."""
        if self.evaluation_sample is None:
            return None
        return replace(
            self,
            sample=self.evaluation_sample,
            evaluation_sample=None,
            recorded_outputs=self.evaluation_outputs,
            task=self.task.in_mode(is_training=False),
        )

    @property
    def inputs(self) -> Field:
        """The field of a message that holds the inputs."""
        if self.dtype == "uint8":
            return Field(IMAGE, self.sample, self.image_dtype)
        return Field(INPUT, self.sample, self.dtype)

    @property
    def parts(self) -> tuple[Block, ...]:
        """The blocks and the tail, in order."""
        return (*self.blocks, self.tail)

    def example_inputs(self, rows: int, device: torch.device | str = "meta") -> Tensor:
        """Return inputs (rows, *sample) as the first block gets them: zeros, or noise of floats."""
        shape, dtype = (rows, *self.sample), input_dtype(self.dtype)
        if dtype.is_floating_point:
            return torch.rand(shape, device=device)
        return torch.zeros(shape, dtype=dtype, device=device)

    def build(self, indices: Sequence[int], seed: int) -> list[nn.Module]:
        """Return parts with the initial weights of a seed, on the CPU, in the order of `indices`.

        indices: positions in `parts`. The index of the tail is len(blocks). Every call builds new
        modules. A part's weights depend on the seed and its name alone, or with `build_network` on
        the seed alone. The default generator stays as it is. Raises IndexError for an index out of
        range.
        """
        if self.build_network is not None:
            return self._take_children(indices, seed)
        modules = []
        for index in indices:
            part = self.parts[index]
            modules.append(seeds.build_unit(seed, part.name, part.build))
        return modules

    def _take_children(self, indices: Sequence[int], seed: int | None) -> list[nn.Module]:
        """Return parts of one object. Those that are not taken wait for a later call.

        So a process that builds several stages builds the network once. seed: None for the meta
        device.
        """
        waiting = self._waiting
        count = len(self.parts)
        places = [range(count)[index] for index in indices]
        if any((seed, place) not in waiting for place in places):
            children = separate_modules(self._build_children(seed))
            waiting.update({(seed, place): child for place, child in enumerate(children)})
        return [waiting.pop((seed, place)) for place in places]

    def _build_children(self, seed: int | None) -> list[nn.Module]:
        """Return all parts of one object, with the weights of a seed, or on the meta device."""
        assert self.build_network is not None, "the network is one object"
        if seed is not None:
            return list(seeds.build_unit(seed, "network", self.build_network))
        with seeds.preserved_generators(), torch.device("meta"):
            return list(self.build_network())

    @cached_property
    def _waiting(self) -> dict[tuple[int | None, int], nn.Module]:
        return {}

    def drop_waiting_parts(self) -> None:
        """Drop the parts that were built with others and that no call has asked for."""
        self._waiting.clear()

    def build_meta(self, indices: Sequence[int]) -> list[nn.Module]:
        """Return parts on the meta device, shapes without values, in the order of `indices`.

        indices: positions in `parts`. With `build_network`, the whole network is first built on the
        CPU, unless it is recorded. Raises IndexError for an index out of range.
        """
        if self.build_network is not None:
            # A recording is replayed by pieces of any device, so no values are needed.
            seed = None if self.recorded_outputs else 0
            return [to_meta(part) for part in self._take_children(indices, seed)]
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

    def find_cuts(self, names: Sequence[str]) -> tuple[int, ...]:
        """Return the indices of the blocks that `pipeline.cuts` names.

        Raises UserError for a name that no block has, and for names that do not rise.
        """
        known = [block.name for block in self.blocks]
        for name in names:
            if name not in known:
                raise UserError(
                    f"partition: pipeline.cuts names {name!r}, which is no block of {self.name}; "
                    f"{suggest(name, known)}"
                )
        indices = tuple(known.index(name) for name in names)
        if list(indices) != sorted(set(indices)):
            raise UserError(
                f"partition: pipeline.cuts must rise; got {', '.join(names)}, which are blocks "
                f"{', '.join(map(str, indices))}; name them in the order of the network"
            )
        return indices

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
        changed. Raises what the blocks raise for inputs of shape `sample`.
        """
        return list(self._shapes)

    def output(self, index: int) -> BlockOutput:
        """Return what the block at `index` gives. The blocks run on the meta device at first.

        A tensor of four dimensions or more after the batch has the layout "". Raises IndexError for
        an index out of range, and what the blocks raise for inputs of shape `sample`.
        """
        if self.recorded_outputs:
            return self.recorded_outputs[index]
        shape = self._shapes[index]
        return BlockOutput(shape, PLAIN_LAYOUTS.get(len(shape), ""))

    def input(self, index: int) -> BlockOutput:
        """Return what the block at `index` takes: the image, or what the block before it gives.

        Raises what `output` raises.
        """
        if index == 0:
            return BlockOutput(self.sample, PLAIN_LAYOUTS.get(len(self.sample), ""))
        return self.output(index - 1)

    @cached_property
    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        if self.recorded_outputs:
            return tuple(output.shape for output in self.recorded_outputs)
        shapes = []
        h = self.example_inputs(2)
        with torch.no_grad():
            for block in self.build_meta(range(len(self.blocks))):
                h = block(h)
                shapes.append(tuple(h.shape[1:]))
        return tuple(shapes)


def input_dtype(name: str) -> torch.dtype:
    """Return the dtype in which the first block gets inputs: images of bytes become float32."""
    dtype: torch.dtype = torch.float32 if name == "uint8" else getattr(torch, name)
    return dtype


def separate_modules(parts: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the parts with copies of what they share, so that each has a mode of its own.

    Parts may share modules without parameters, as one dropout that a forward calls everywhere.
    """
    owners: dict[int, int] = {}
    separate = []
    for number, part in enumerate(parts):
        if owners.setdefault(id(part), number) != number:
            part = copy.deepcopy(part)
        for parent in list(part.modules()):
            for name, child in parent._modules.items():
                if child is not None and owners.setdefault(id(child), number) != number:
                    parent._modules[name] = copy.deepcopy(child)
        separate.append(part)
    return separate


def to_meta(module: nn.Module) -> nn.Module:
    """Move a new module to the meta device, and return it: it keeps shapes and loses values.

    A batch normalisation with momentum=None averages over the batches that it has counted. Without
    values there is no count, so it gets a momentum.
    """
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and layer.momentum is None:
            layer.momentum = 0.1
    return module.to("meta")

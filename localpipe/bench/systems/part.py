"""Consecutive blocks of the whole network as one module, which the peers train end to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from localpipe.bench.systems.step_timer import CPU
from localpipe.config.resolved import Resolved
from localpipe.networks.blueprint import Blueprint
from localpipe.networks.freeze import find_frozen_blocks, freeze_blocks
from localpipe.pipeline.stages.blocks import Activation, Blocks, split_activation
from localpipe.pipeline.stages.precision import autocast_context
from localpipe.pipeline.stages.weights import collect_weights


class Part(nn.Module):
    """Blocks first..last with localpipe's initial weights; after the last block the tail too.

    On the meta device it has shapes without values. Input and output are contiguous fp32 tensors
    (B, ...) on `device`, without companions. The computation has the configuration's precision and
    memory format. Blocks of model.freeze are frozen, as in a stage: set no `segments` and protect
    no input then.

    Set `segments` above 1 to store only the input of each segment for the backward pass, which
    computes the rest again (Chen et al. 2016, arXiv 1604.06174). Batch normalisation then counts a
    batch twice in its running statistics. A segment whose first block writes in place gets a copy.
    Set `reentrant` for torch's reentrant checkpoints, without a random state. The tail's extra
    outputs follow its main one in a tuple, unless `gives_extra` is set to False.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        first: int,
        last: int,
        config: Resolved,
        device: torch.device = CPU,
    ) -> None:
        super().__init__()
        indices = list(range(first, last + 1))
        if last == len(blueprint.blocks) - 1:
            indices.append(len(blueprint.blocks))
        if device.type == "meta":
            modules = blueprint.build_meta(indices)
        else:
            modules = blueprint.build(indices, config.run.seed)
        blueprint.drop_waiting_parts()
        self.blocks = Blocks(*modules)
        self._freeze(blueprint, indices, config)
        self.segments = 1
        self.reentrant = False
        self.gives_extra = last == len(blueprint.blocks) - 1
        self._prefixes = [blueprint.parts[index].prefix for index in indices]
        self._precision_context = autocast_context(config, device)
        self._device = device
        self._format = torch.contiguous_format
        if config.run.channels_last:
            self._format = torch.channels_last
        # torch's annotation leaves out that only four-dimensional weights change.
        self.to(device, memory_format=self._format)  # type: ignore[call-overload]
        self._copies_input = False
        self._writing: frozenset[int] | None = None  # known when segments run for the first time

    def _freeze(self, blueprint: Blueprint, indices: Sequence[int], config: Resolved) -> None:
        """Freeze the blocks of model.freeze, as a stage does."""
        positions = find_frozen_blocks(blueprint, config.model.freeze)
        frozen, trained = {}, []
        for index, block in zip(indices, self.blocks, strict=True):
            if index in positions:
                frozen[blueprint.blocks[index].name] = block
            else:
                trained.append(block)
        if frozen:
            freeze_blocks(frozen, trained)

    def forward(self, x: Tensor) -> Any:
        """Return the blocks' output, contiguous and fp32. A protected input stays as it is."""
        if self._copies_input:
            x = x.clone()
        with self._precision_context():
            if x.dim() == 4:
                x = x.contiguous(memory_format=self._format)
            if self.segments > 1:
                activation = self._run_segments(x)
            else:
                activation = self.blocks(x)
        h, others = split_activation(activation)
        if others and self.gives_extra:
            return tuple(output.float().contiguous() for output in (h, *others))
        return h.float().contiguous()

    def _run_segments(self, x: Tensor) -> Activation:
        # Plans on the meta device have no random state.
        keeps_random_state = not self.reentrant
        if self._writing is None:
            self._writing = self._find_writing_blocks(x)
        # The input of a segment is read again, so its first block may not write into it.
        length = len(self.blocks) // self.segments
        blocks: list[Callable[[Activation], Activation]] = []
        for block in self.blocks:
            blocks.append(partial(_run_block, block))
        for first in range(0, length * self.segments, length):
            if first in self._writing:
                blocks[first] = partial(_run_block, self.blocks[first], copies=True)
        if self.reentrant and not x.is_floating_point():
            # torch runs a segment again only if its input needs a gradient, which tokens cannot.
            first_block, tokens = blocks[0], x
            blocks[0] = lambda _: first_block(tokens)
            x = torch.empty(len(x), 0, device=x.device, requires_grad=True)
        activation: Activation = checkpoint_sequential(
            blocks,
            self.segments,
            x,
            use_reentrant=self.reentrant,
            preserve_rng_state=keeps_random_state,
        )
        return activation

    def _find_writing_blocks(self, x: Tensor) -> frozenset[int]:
        """Return the blocks that write into their input: two samples are evaluated, and left."""
        writing = set()
        self.blocks.eval()
        with torch.no_grad():
            x = x[:2].detach()
            companions: tuple[Tensor, ...] = ()
            for index, block in enumerate(self.blocks):
                original = x.clone()
                version = original._version
                x, companions = split_activation(block(original, *companions))
                if original._version != version:
                    writing.add(index)
        self.blocks.train()
        return frozenset(writing)

    def protect_input(self, shape: tuple[int, ...]) -> None:
        """Copy every following input of `forward` if the first block writes in place.

        A peer's input is a leaf of autograd, which allows no writing. shape: one sample's, without
        the batch. The first block runs once on two zero samples, in evaluation mode, and is in
        training mode afterwards. Raises that block's RuntimeError if it is not about writing in
        place, for example for a wrong shape. A second call never takes the copy back.
        """
        leaf = torch.zeros(2, *shape, device=self._device, requires_grad=True)
        try:
            self.blocks[0].eval()(leaf)
        except RuntimeError as error:
            if "in-place" not in str(error):
                raise
            self._copies_input = True
        finally:
            self.blocks[0].train()

    def weights(self) -> dict[str, Tensor]:
        """Return parameters and buffers under their names in the whole network.

        The tensors share memory with the module. Buffers that no state dictionary has are left out.
        """
        return collect_weights(zip(self._prefixes, self.blocks, strict=True))


def _run_block(block: nn.Module, activation: Activation, copies: bool = False) -> Activation:
    """Run a block on what the one before gave. copies: whether it gets a copy of the main tensor.

    No block writes into companions.
    """
    main, companions = split_activation(activation)
    if copies:
        main = main.clone()
    output: Activation = block(main, *companions)
    return output

"""Costs of a network's blocks trained end to end, and the cut that balances them.

Rival systems train end to end, so their forecasts need these costs and not those of a stage.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from localpipe.networks.blueprint import Blueprint
from localpipe.networks.cuts import balance
from localpipe.pipeline.stages.blocks import split_activation
from localpipe.plan.costs import BATCH
from localpipe.plan.flops import count_flops
from localpipe.plan.saved_bytes import SavedBytes, fuse_attention


@dataclass(frozen=True)
class BlockCost:
    """The cost of one block trained end to end, per sample.

    `macs` are of the forward pass. `train_macs` includes the gradient of the block's input, except
    for the network's first block. `saved_bytes` are the bytes that autograd saves, in fp32.
    `outputs` is the number of values in the block's output. The network's tail counts with the last
    block, but not in `outputs`.
    """

    name: str
    params: int
    macs: int
    train_macs: int
    saved_bytes: int
    outputs: int


def measure_blocks(blueprint: Blueprint) -> list[BlockCost]:
    """Return the cost of every block, from one end-to-end training pass on the meta device.

    Blocks are in order. Every product counts, those of attention too.
    """
    modules = blueprint.build_meta(range(len(blueprint.parts)))
    x = blueprint.example_inputs(BATCH)
    macs, saved_bytes, outputs = _measure_modules(modules, x)
    train_macs = _count_train_macs(modules, x)

    costs = []
    last = len(blueprint.blocks) - 1
    for index, block in enumerate(blueprint.blocks):
        # The last block takes the tail, every module that follows it.
        end = index + 1
        if index == last:
            end = len(modules)
        cost = BlockCost(
            block.name,
            _count_params(modules[index:end]),
            sum(macs[index:end]),
            sum(train_macs[index:end]),
            saved_bytes[end] - saved_bytes[index],
            outputs[index],
        )
        costs.append(cost)
    return costs


def _measure_modules(
    modules: Sequence[nn.Module], x: Tensor
) -> tuple[list[int], list[int], list[int]]:
    """Run the modules in sequence on the meta device, and return counts per sample.

    x: (BATCH, C, H, W). Returns the MACs of every module's forward pass, the bytes saved before and
    after every module, and every output's size, its companions included.
    """
    inputs: tuple[Tensor, ...] = (x,)
    ignored: list[Tensor] = []
    for module in modules:
        ignored += [*module.parameters(), *module.buffers()]
    saved = SavedBytes(ignored)
    macs = []
    saved_bytes = [0]
    outputs = []
    with saved.hooks(), fuse_attention():
        for module in modules:
            with count_flops() as counter:
                main, companions = split_activation(module(*inputs))
            inputs = (main, *companions)
            macs.append(counter.get_total_flops() // 2 // BATCH)
            # Nothing is released before the backward pass, so the peak is the sum so far.
            saved_bytes.append(saved.peak // BATCH)
            outputs.append(sum(tensor[0].numel() for tensor in inputs))
    return macs, saved_bytes, outputs


def _count_train_macs(modules: Sequence[nn.Module], x: Tensor) -> list[int]:
    """Return the MACs a sample of every module's forward and backward pass.

    x: (BATCH, C, H, W), whose own gradient is not needed. That of every later input is.
    """
    train_macs = []
    companions: tuple[Tensor, ...] = ()
    for module in modules:
        with count_flops() as counter, fuse_attention():
            # A module may write into its input, which no leaf allows.
            output, companions = split_activation(module(x.clone(), *companions))
            if output.requires_grad:
                output.sum().backward()
        train_macs.append(counter.get_total_flops() // 2 // BATCH)
        x = output.detach().requires_grad_()
        companions = tuple(tensor.detach() for tensor in companions)
    return train_macs


def _count_params(modules: Sequence[nn.Module]) -> int:
    count = 0
    for module in modules:
        for parameter in module.parameters():
            count += parameter.numel()
    return count


def sum_blocks(blocks: Sequence[BlockCost]) -> BlockCost:
    """Return the cost of consecutive blocks as that of one block: sums, and the last output.

    blocks: at least one, else IndexError. The name is `first..last`, also of one block.
    """
    params = macs = train_macs = saved_bytes = 0
    for block in blocks:
        params += block.params
        macs += block.macs
        train_macs += block.train_macs
        saved_bytes += block.saved_bytes
    last = blocks[-1]
    name = f"{blocks[0].name}..{last.name}"
    return BlockCost(name, params, macs, train_macs, saved_bytes, last.outputs)


def balance_blocks(
    compute_s: Sequence[float], edge_s: Sequence[float], stages: int
) -> tuple[int, ...]:
    """Return the cut whose slowest stage or edge is fastest.

    compute_s: seconds of every block. edge_s: seconds of the message after every block, that after
    the last one is not read. Returns the last block of every stage but the last. Raises UserError
    for more stages than blocks.
    """
    elapsed_s = list(itertools.accumulate(compute_s, initial=0.0))

    def slowest_part(first: int, last: int, stage: int) -> float:
        stage_s = elapsed_s[last + 1] - elapsed_s[first]
        if stage == stages - 1:
            return stage_s
        return max(stage_s, edge_s[last])

    return balance(len(compute_s), stages, slowest_part)

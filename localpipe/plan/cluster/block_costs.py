"""The network without any method: what each block costs end to end, and the cut that suits it. For the peers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.autograd.graph import saved_tensors_hooks

from localpipe.networks.blueprint import Blueprint
from localpipe.networks.cuts import balance
from localpipe.plan.costs import BATCH, SavedBytes
from localpipe.plan.flops import count_flops


@dataclass(frozen=True)
class BlockCost:
    """One block trained end to end, per sample; the tail counts with the last block.

    `train_macs` has the gradient of the block's input, but the first block's; `held_bytes` is what autograd holds,
    in fp32; `outputs` are the values behind the block.
    """

    name: str
    params: int
    macs: int
    train_macs: int
    held_bytes: int
    outputs: int


def measure_blocks(blueprint: Blueprint) -> list[BlockCost]:
    """Return the cost of every block from one end-to-end pass on the meta device."""
    modules = blueprint.build_meta(range(len(blueprint.parts)))
    saved = SavedBytes(
        [tensor for module in modules for tensor in [*module.parameters(), *module.buffers()]]
    )
    h = torch.empty(BATCH, *blueprint.image, device="meta")
    macs, held, outputs = [], [0], []
    with count_flops() as whole, saved_tensors_hooks(saved.hold, lambda holder: holder.tensor):
        for module in modules:
            with count_flops() as counter:
                h = module(h)
            macs.append(counter.get_total_flops() // 2 // BATCH)
            held.append(saved.peak // BATCH)  # nothing is released before the backward pass
            outputs.append(h[0].numel())
        if h.requires_grad:
            h.sum().backward()
    # Every product has two gradients, but the first block's input needs none.
    missing = 3 * sum(macs) - int(whole.get_total_flops()) // 2 // BATCH
    costs = []
    for i, block in enumerate(blueprint.blocks):
        own = slice(i, i + 1 if i + 1 < len(blueprint.blocks) else None)
        params = sum(p.numel() for module in modules[own] for p in module.parameters())
        forward, kept = sum(macs[own]), held[1:][own][-1] - held[i]
        costs.append(
            BlockCost(
                block.name, params, forward, 3 * forward - (0 if i else missing), kept, outputs[i]
            )
        )
    return costs


def balance_blocks(
    seconds: Sequence[float], edge_s: Sequence[float], stages: int
) -> tuple[int, ...]:
    """Return the last block of every stage but the last, for the smallest worst stage or edge.

    seconds: of every block. edge_s: of the message behind every block.
    """
    before = list(itertools.accumulate(seconds, initial=0.0))

    def worst(first: int, last: int, stage: int) -> float:
        behind = edge_s[last] if stage < stages - 1 else 0.0
        return max(before[last + 1] - before[first], behind)

    return balance(len(seconds), stages, worst)

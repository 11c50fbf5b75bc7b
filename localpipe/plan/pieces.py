"""What every possible stage is made of, so that each piece is measured once and any stage is a sum.

    stage k, blocks f..l  =  lead(k, f)  +  block(f + 1) + ... + block(l)  +  loss(k, l)

The lead is the entry (the image's normalisation, or the adapter) and block f; the loss is the auxiliary network behind block
l, or the network's own head behind the last one. Pieces with equal keys cost the same and are measured once.
"""

from __future__ import annotations

from functools import cached_property, partial

from localpipe.config.resolved import Resolved
from localpipe.methods.context import context_sources
from localpipe.networks.blueprint import Blueprint
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import fields_read, plan_candidate


class Pieces:
    """The pieces of a network under a resolved configuration, as small stages on any device."""

    def __init__(self, blueprint: Blueprint, config: Resolved) -> None:
        self.blueprint, self.config = blueprint, config
        self.blocks = len(blueprint.blocks)

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """The per-sample shape behind every block."""
        return self.blueprint.shapes()

    def stage(self, first: int, last: int, stage: int, stages: int, device: str) -> Stage:
        """Return a small stage that holds the wanted piece."""
        wanted = fields_read(self.config, stage, stages)
        batch, reconciled = self.config.data.batch_size, self.config.reconciles
        plan = plan_candidate(
            self.blueprint, self.shapes, (first, last), stage, stages, batch, wanted, reconciled
        )
        return Stage(plan, self.blueprint, self.config, device)

    def lead(self, stage: int, first: int, device: str) -> Stage:
        """Return a stage of one block with the entry of stage `stage`; its loss is of no interest."""
        return self.stage(first, first, stage, stage + 2, device)

    def loss(self, stage: int, stages: int, last: int, device: str) -> Stage:
        """Return a stage with the loss of stage `stage` of `stages` behind block `last`, and no more blocks than need be."""
        return self.stage(last if stage else 0, last, stage, stages, device)

    def lead_key(self, stage: int, first: int) -> str:
        """Return what a lead's cost depends on."""
        entry = "image" if stage == 0 else context_sources(self.config.method.context.mode, stage)
        return f"lead {entry} {self.block_key(first)}"

    def block_key(self, index: int) -> str:
        """Return what a block's cost depends on: how it is built, where that can be told, and what comes in."""
        build = self.blueprint.blocks[index].build
        came_in = self.shapes[index - 1] if index else self.blueprint.image
        if self.blueprint.whole is not None or not isinstance(build, partial):
            return f"block {index}"
        return f"block {getattr(build.func, '__qualname__', index)} {build.args} {build.keywords} {came_in}"

    def loss_key(self, stage: int, stages: int, last: int) -> str:
        """Return what a loss's cost depends on: its layers, and which of its weights are not 0 (such a term does not run)."""
        if stage == stages - 1:
            return "tail"
        objective = self.stage(last, last, stage, stages, "meta").objective
        runs = sorted(
            name
            for name, value in vars(objective).items()
            if isinstance(value, int | float) and value
        )
        return f"loss {objective!r} {runs} {self.shapes[last]}"

"""The pieces that every possible stage is made of, so that each is measured once.

    stage k, blocks f..l  =  lead(k, f)  +  block(f + 1) + ... + block(l)  +  loss(k, l)

The lead is the entry (the image's normalisation, or the adapter) and block f. The loss is the
auxiliary network after block l, or the network's own head after the last block. Pieces with equal
keys cost the same.
"""

from __future__ import annotations

from functools import cached_property, partial

from localpipe.config.load import update
from localpipe.config.resolved import Resolved
from localpipe.methods.context import context_sources
from localpipe.methods.feedback import find_own_loss
from localpipe.networks.blueprint import Blueprint
from localpipe.networks.freeze import find_frozen_blocks
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import StagePlan, find_read_fields, plan_candidate


class Pieces:
    """The pieces of a network under a resolved configuration, as small stages on any device.

    `blocks` is the number of blocks. `stage`, `lead` and `loss` build a new stage in every call,
    with the weights of the configuration's seed. device: `meta`, `cpu` or `cuda`. Their boundaries
    are fp32, whatever the configuration's `pipeline.wire_dtype`, so that any two pieces fit.
    """

    def __init__(self, blueprint: Blueprint, config: Resolved) -> None:
        if config.pipeline.wire_dtype != "fp32":
            config = update(config, {"pipeline.wire_dtype": "fp32"})
        self.blueprint, self.config = blueprint, config
        self.blocks = len(blueprint.blocks)

    @cached_property
    def frozen(self) -> frozenset[int]:
        """The positions of the blocks that are not trained."""
        return find_frozen_blocks(self.blueprint, self.config.model.freeze)

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """The per-sample shape after every block, counted once."""
        return self.blueprint.shapes()

    def plan(self, first: int, last: int, stage: int, stages: int) -> StagePlan:
        """Return the plan of blocks first..last, both included, as stage `stage` of `stages`.

        Its messages have `data.batch_size` / `optim.accumulate` samples.
        """
        return plan_candidate(
            self.blueprint,
            (first, last),
            stage,
            stages,
            batch=self.config.data.batch_size // self.config.optim.accumulate,
            reads=find_read_fields(self.config, stage, stages),
            gradients=self.config.reconciles,
        )

    def stage(self, first: int, last: int, stage: int, stages: int, device: str) -> Stage:
        """Return the stage of `plan`, which has the same arguments."""
        plan = self.plan(first, last, stage, stages)
        return Stage(plan, self.blueprint, self.config, device)

    def lead(self, stage: int, first: int, device: str) -> Stage:
        """Return a stage of block `first` alone with the entry of stage `stage`.

        Its loss does not matter: it is that of an earlier stage than the last.
        """
        return self.stage(first, first, stage, stage + 2, device)

    def loss(self, stage: int, stages: int, last: int, device: str) -> Stage:
        """Return a stage with the loss of stage `stage` of `stages` after block `last`.

        It has as few blocks as possible: one, but all up to `last` for stage 0. The last stage has
        the network's own head.
        """
        first = last if stage else 0
        return self.stage(first, last, stage, stages, device)

    def lead_key(self, stage: int, first: int) -> str:
        """Return text that is equal for leads of equal cost. Arguments are those of `lead`."""
        entry: object = "image"
        if stage > 0:
            mode, inputs = self.config.method.context.mode, self.config.inputs.name
            entry = context_sources(mode, stage, inputs)
        return f"lead {entry} {self.block_key(first)}"

    def block_key(self, index: int) -> str:
        """Return text that is equal for blocks of equal cost: the same build, the same input.

        Where it cannot be seen how a block is built, the text has its index, and is equal to no
        other.
        """
        build = self.blueprint.blocks[index].build
        frozen = " frozen" if index in self.frozen else ""
        if self.blueprint.build_network is not None or not isinstance(build, partial):
            return f"block {index}{frozen}"  # how it is built cannot be seen
        input_shape = self.shapes[index - 1] if index else self.blueprint.sample
        name = getattr(build.func, "__qualname__", index)
        text = f"block {name} {build.args} {build.keywords} {input_shape}{frozen}"
        return text + self._describe_output(index - 1)

    def loss_key(self, stage: int, stages: int, last: int) -> str:
        """Return text that is equal for losses of equal cost: their layers, and which terms run.

        It builds a stage on the meta device. It is `tail` for the last stage, whatever its block.
        """
        if stage == stages - 1:
            return "tail"
        objective = self.stage(last, last, stage, stages, "meta").objective
        # A term whose coefficient is 0 does not run.
        terms = []
        for name, value in vars(find_own_loss(objective)).items():
            if isinstance(value, int | float) and value:
                terms.append(name)
        text = f"loss {objective!r} {sorted(terms)} {self.shapes[last]}"
        return text + self._describe_output(last)

    def _describe_output(self, index: int) -> str:
        """Return text on what the block at `index` gives, empty where it is one plain tensor."""
        if index < 0 or self.blueprint.output(index).is_plain:
            return ""
        return f" {self.blueprint.output(index)}"

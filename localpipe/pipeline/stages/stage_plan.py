"""The plan of a stage: its blocks, what it receives and what it sends. Frozen data, printed and tested without a process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from localpipe.config import registry
from localpipe.config.options import network_arguments
from localpipe.config.resolved import Resolved
from localpipe.fields import Field, Schema
from localpipe.methods.context import context_sources
from localpipe.networks.blueprint import Blueprint
from localpipe.networks.cuts import cut_blocks
from localpipe.networks.user_network import user_blueprint
from localpipe.pipeline.stages.codecs import BOUNDARY_DTYPES

IMAGE = "image"


@dataclass(frozen=True)
class StagePlan:
    """One stage: blocks first..last of the network (the tail too, for the last stage), and the schemas of its edges."""

    stage: int
    stages: int
    first: int
    last: int
    blocks: tuple[str, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    receives: Schema
    sends: Schema | None

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    @property
    def input(self) -> str:
        """The name of the activation that comes in: the image, or the predecessor's output."""
        return IMAGE if self.is_first else f"h.{self.stage - 1}"


def plan_candidate(
    blueprint: Blueprint,
    shapes: list[tuple[int, ...]],
    bounds: tuple[int, int],
    stage: int,
    stages: int,
    batch: int,
    reads: frozenset[str],
    gradients: bool = False,
) -> StagePlan:
    """Return the plan of one stage, blocks bounds[0]..bounds[1], wherever the others are cut.

    `shapes` are blueprint.shapes(). What the stage reads of earlier boundaries is taken to have its own input's shape.
    """
    first, last = bounds
    came_in = blueprint.image if stage == 0 else shapes[first - 1]
    target, image = blueprint.task.target, Field(IMAGE, blueprint.image, "uint8")
    fields = [image if stage == 0 else Field(f"h.{stage - 1}", came_in, "float32"), target]
    fields += [
        image if name == IMAGE else Field(name, came_in, "float32") for name in sorted(reads)
    ]
    if gradients and stage:
        fields.append(Field(f"grad.{stage - 1}", came_in, "float32"))
    fields = list(dict.fromkeys(fields))
    names = tuple(block.name for block in blueprint.blocks[first : last + 1])
    sends = (
        Schema((Field(f"h.{stage}", shapes[last], "float32"), target), batch)
        if stage < stages - 1
        else None
    )
    received = Schema(tuple(fields), batch)
    return StagePlan(stage, stages, first, last, names, came_in, shapes[last], received, sends)


def plan_stages(
    blueprint: Blueprint,
    stages: int,
    cuts: str | tuple[int, ...],
    batch: int,
    reads: Callable[[int], frozenset[str]] = lambda stage: frozenset(),
    gradients: bool = False,
    wire: str = "float32",
) -> tuple[StagePlan, ...]:
    """Return the plan of every stage. Which tensors cross a boundary follows from the configuration alone.

    `reads` says what a stage looks at beside its predecessor's output and the target: `image`, or `ctx.j`, the merged
    activation at boundary j. A stage passes on only what a later one still reads. With `gradients` every activation has its
    sender's gradient beside it. `wire` is the dtype in which activations, contexts and gradients travel; `batch` the most
    samples of a message.
    """
    shapes = blueprint.shapes()
    bounds = cut_blocks(len(blueprint.blocks), stages, cuts)
    target = blueprint.task.target
    received = Schema((Field(IMAGE, blueprint.image, "uint8"), target), batch)
    plans = []
    for stage, (first, last) in enumerate(bounds):
        sends = None
        if stage < stages - 1:
            later = frozenset(name for after in range(stage + 1, stages) for name in reads(after))
            fields = [Field(f"h.{stage}", shapes[last], wire), target]
            if IMAGE in later:
                fields.append(Field(IMAGE, blueprint.image, "uint8"))
            merged = [j for j in range(stage) if context_field(j) in later]
            fields += [Field(context_field(j), shapes[bounds[j][1]], wire) for j in merged]
            if gradients:
                fields.append(Field(f"grad.{stage}", shapes[last], wire))
            sends = Schema(tuple(fields), batch)
        names = tuple(block.name for block in blueprint.blocks[first : last + 1])
        came_in = blueprint.image if stage == 0 else shapes[first - 1]
        plans.append(
            StagePlan(stage, stages, first, last, names, came_in, shapes[last], received, sends)
        )
        received = sends if sends is not None else received
    return tuple(plans)


def context_field(boundary: int) -> str:
    """Return the field of the merged activation at a boundary."""
    return f"ctx.{boundary}"


def fields_read(config: Resolved, stage: int, stages: int) -> frozenset[str]:
    """Return the fields that a stage looks at beside its predecessor's output and the target."""
    objective, options = config.objective
    names = {source.field for source in context_sources(config.method.context.mode, stage)}
    if stage < stages - 1 and objective.needs_image(options, stage, stages):
        names.add(IMAGE)
    return frozenset(names)


def build_blueprint(config: Resolved) -> Blueprint:
    """Return the blueprint of the configuration's network."""
    name, classes = config.model.name, config.model.num_classes
    if name not in registry.MODELS:
        return user_blueprint(name, config.image, classes, config.model.args)
    function = registry.look_up(registry.MODELS, name, "config: model.name")
    arguments = network_arguments(function, config)
    blueprint: Blueprint = function(name, config.image, classes, **arguments)
    return blueprint


def build_plans(config: Resolved) -> tuple[Blueprint, tuple[StagePlan, ...]]:
    """Return the blueprint and the plan of every stage."""
    blueprint = build_blueprint(config)
    plans = plan_stages(
        blueprint,
        config.stages,
        config.pipeline.cuts,
        batch=config.data.batch_size // config.optim.accumulate,
        reads=lambda stage: fields_read(config, stage, config.stages),
        gradients=config.reconciles,
        wire=BOUNDARY_DTYPES[config.pipeline.wire_dtype],
    )
    return blueprint, plans

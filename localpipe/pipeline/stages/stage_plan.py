"""The plan of a stage: its blocks, what it receives and what it sends.

Plans are frozen data. They are printed and tested without a process.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import zip_longest
from typing import Any

from localpipe.config import registry
from localpipe.config.keys import Model, TaskKeys
from localpipe.config.network_name import split_library
from localpipe.config.options import call_objective, check_network_arguments
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError, first_line
from localpipe.fields import IMAGE, Field, Schema
from localpipe.methods.context import context_sources
from localpipe.networks.blueprint import BlockOutput, Blueprint
from localpipe.networks.cuts import cut_blocks
from localpipe.networks.recorded_network import library_blueprint
from localpipe.networks.user_network import user_blueprint
from localpipe.pipeline.stages.codecs import CODECS, FP32, Codec
from localpipe.tasks.build_task import build_task
from localpipe.tasks.classification import Classification
from localpipe.tasks.task import Task

# The keys of `model` that shape the network. The others say what is done with it.
_NETWORK_KEYS = {"name", "args", "crossing", "layout", "untie"}


@dataclass(frozen=True)
class StagePlan:
    """One stage: blocks first..last of the network, and the schemas of its edges.

    stages: their number. first, last: positions, both included. blocks: their names. The last stage
    has the network's tail too, and sends None. Shapes are per sample. The schemas' batch is the
    undivided one of a message, over all replicas. The first stage's `receives` is its images and
    targets. `decoded` are the received fields as the stage reads them: activations, contexts and
    gradients in fp32, whatever crosses.

    takes, gives: what the first block reads and the last one gives, with layout, order in memory
    and companions. `input_shape` and `output_shape` are those of the main tensors.

    evaluation: the plan of evaluation messages, where their samples have other shapes, else None.
    The schemas then hold those of evaluation messages too.
    """

    stage: int
    stages: int
    first: int
    last: int
    blocks: tuple[str, ...]
    takes: BlockOutput
    gives: BlockOutput
    receives: Schema
    sends: Schema | None
    decoded: tuple[Field, ...]
    evaluation: StagePlan | None = None

    def in_mode(self, is_training: bool) -> StagePlan:
        """Return the plan of training messages, or that of evaluation messages."""
        if is_training or self.evaluation is None:
            return self
        return self.evaluation

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape per sample of what the first block reads: the image, or the main tensor."""
        return self.takes.shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape per sample of the main tensor that the last block gives."""
        return self.gives.shape

    @property
    def is_first(self) -> bool:
        """Whether this is stage 0."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether this is the last stage, which has the network's tail."""
        return self.stage == self.stages - 1

    @property
    def input(self) -> str:
        """The name of the received field that the blocks read: the inputs, or `h.` and a stage."""
        if self.is_first:
            return self.receives.fields[0].name
        return f"h.{self.stage - 1}"

    @property
    def input_fields(self) -> list[Field]:
        """The fields of what the blocks take, the main tensor first, in the network's dtypes."""
        main, *companions = activation_fields(self.input, self.takes, FP32)
        if self.is_first and self.receives.fields[0].dtype == "int64":
            main = replace(main, dtype="int64")  # tokens
        return [main, *companions]

    @property
    def output(self) -> str:
        """The name of the field of the stage's output: `h.` and its number."""
        return f"h.{self.stage}"

    @property
    def made_fields(self) -> tuple[Field, ...]:
        """The fields in fp32 that the stage can make for a later one, sent or not.

        They are its output with companions of fp32, the context of its input, and the gradient.
        """
        outputs = activation_fields(self.output, self.gives, FP32)
        fields = [field for field in outputs if field.dtype == "float32"]
        if not self.is_first:
            name = context_field(self.stage - 1)
            fields.append(Field(name, self.takes.standard_shape, "float32"))
        fields.append(Field(gradient_field(self.stage), self.gives.shape, "float32"))
        return tuple(fields)

    @property
    def encoded(self) -> tuple[Field, ...]:
        """The fields of `made_fields` that the stage sends, each encoded once."""
        if self.sends is None:
            return ()
        return tuple(field for field in self.made_fields if self.sends.has(field.name))


def companion_field(name: str, number: int) -> str:
    """Return the name of the field of a companion, as `h.0.1`.

    name: of the main tensor's field. number: from 1, in the order of the companions.
    """
    return f"{name}.{number}"


def activation_fields(name: str, output: BlockOutput, codec: Codec) -> list[Field]:
    """Return the fields of what a block gives: the main tensor's, then those of its companions.

    name: of the main tensor's field. codec: of the boundary, by which the main tensor and fp32
    companions cross. Companions of other dtypes cross as they are.
    """
    fields = list(codec.coded_fields(Field(name, output.shape, "float32", output.order)))
    for number, companion in enumerate(output.companions, 1):
        field_name = companion_field(name, number)
        field = Field(field_name, companion.shape, companion.dtype, companion.order)
        if companion.dtype == "float32":
            fields += codec.coded_fields(field)
        else:
            fields.append(field)
    return fields


def plan_candidate(
    blueprint: Blueprint,
    bounds: tuple[int, int],
    stage: int,
    stages: int,
    batch: int,
    reads: frozenset[str],
    gradients: bool = False,
) -> StagePlan:
    """Return the plan of one stage, blocks bounds[0]..bounds[1], for any cut of the others.

    batch: the samples of a message. reads: what the stage reads besides
    its input and the target. The fields of earlier boundaries get the shape of its own input, since
    the cut is open. With `gradients`, it receives `grad` too, after stage 0. It sends its output
    and the target only. All floating-point fields are float32. The bounds are not checked, except
    that UserError is raised where the network cannot be cut.
    """
    first, last = bounds
    if stage > 0:
        blueprint.check_cut(first - 1)
    if stage < stages - 1:
        blueprint.check_cut(last)
    inputs = blueprint.inputs
    target = blueprint.task.target
    takes, gives = blueprint.input(first), blueprint.output(last)
    received = [inputs]
    if stage > 0:
        received = activation_fields(f"h.{stage - 1}", takes, FP32)
    received.append(target)

    # What the stage reads besides its input. The first stage may read the image, which it has.
    for name in sorted(reads):
        if name == inputs.name:
            received.append(inputs)
        else:
            received.append(Field(name, takes.standard_shape, "float32"))
    if gradients and stage > 0:
        received.append(Field(gradient_field(stage - 1), takes.shape, "float32"))
    received = list(dict.fromkeys(received))

    sends = None
    if stage < stages - 1:
        fields = activation_fields(f"h.{stage}", gives, FP32)
        sends = Schema((*fields, target), batch)
    return StagePlan(
        stage=stage,
        stages=stages,
        first=first,
        last=last,
        blocks=_block_names(blueprint, first, last),
        takes=takes,
        gives=gives,
        receives=Schema(tuple(received), batch),
        sends=sends,
        decoded=tuple(received),
    )


def _read_nothing(stage: int) -> frozenset[str]:
    return frozenset()


def plan_stages(
    blueprint: Blueprint,
    stages: int,
    cuts: str | tuple[int, ...],
    batch: int,
    reads: Callable[[int], frozenset[str]] = _read_nothing,
    gradients: bool = False,
    codec: Codec = FP32,
    evaluation_batch: int | None = None,
) -> tuple[StagePlan, ...]:
    """Return the plan of every stage, in order. The configuration alone decides what crosses.

    cuts: `equal`, `layerwise`, or the last block of every stage but the last, stages - 1 of them.
    `reads` returns the fields that a stage reads besides its predecessor's output and the target:
    `image`, or `ctx.j`, the merged activation at boundary j. A stage sends only what a later stage
    reads. With `gradients`, the sender's gradient goes with every activation. Activations, contexts
    and gradients cross as `codec` says. `batch` is the largest number of samples of a message, and
    `evaluation_batch` that of an evaluation message, where their samples have other shapes.
    Raises UserError where the blocks cannot be cut into that many stages, or not there. Raises
    AssertionError for another word in `cuts`.
    """
    plans = _plan_messages(blueprint, stages, cuts, batch, reads, gradients, codec)
    evaluated = blueprint.for_evaluation()
    if evaluated is None:
        return plans
    assert evaluation_batch is not None, "the samples of an evaluation have another shape"
    # No gradient travels with an evaluation.
    others = _plan_messages(evaluated, stages, cuts, evaluation_batch, reads, False, codec)
    return tuple(_join_plans(plan, other) for plan, other in zip(plans, others, strict=True))


def _join_plans(plan: StagePlan, evaluation: StagePlan) -> StagePlan:
    """Return the plan of a stage whose evaluation messages have a plan of their own."""
    sends = plan.sends
    if sends is not None:
        sends = replace(sends, evaluation=evaluation.sends)
    receives = replace(plan.receives, evaluation=evaluation.receives)
    return replace(plan, receives=receives, sends=sends, evaluation=evaluation)


def _plan_messages(
    blueprint: Blueprint,
    stages: int,
    cuts: str | tuple[int, ...],
    batch: int,
    reads: Callable[[int], frozenset[str]],
    gradients: bool,
    codec: Codec,
) -> tuple[StagePlan, ...]:
    """Return the plan of every stage, for messages whose samples have one shape."""
    bounds = cut_blocks(len(blueprint.blocks), stages, cuts)
    for _, last in bounds[:-1]:
        blueprint.check_cut(last)
    outputs = [blueprint.output(last) for _, last in bounds]
    inputs = blueprint.inputs
    receives = Schema((inputs, blueprint.task.target), batch)
    decoded = receives.fields
    plans = []
    for stage, (first, last) in enumerate(bounds):
        sends = None
        next_decoded: tuple[Field, ...] = ()
        if stage < stages - 1:
            later = _read_later(reads, stage, stages)
            fields = _sent_fields(blueprint, outputs, stage, later, gradients, codec)
            sends = Schema(fields, batch)
            next_decoded = _sent_fields(blueprint, outputs, stage, later, gradients, FP32)
        plan = StagePlan(
            stage=stage,
            stages=stages,
            first=first,
            last=last,
            blocks=_block_names(blueprint, first, last),
            takes=blueprint.input(first),
            gives=outputs[stage],
            receives=receives,
            sends=sends,
            decoded=decoded,
        )
        plans.append(plan)

        # The next stage receives what this one sends.
        if sends is not None:
            receives, decoded = sends, next_decoded
    return tuple(plans)


def _read_later(reads: Callable[[int], frozenset[str]], stage: int, stages: int) -> frozenset[str]:
    """Return the fields that any stage after this one reads."""
    names: set[str] = set()
    for later in range(stage + 1, stages):
        names |= reads(later)
    return frozenset(names)


def _sent_fields(
    blueprint: Blueprint,
    outputs: list[BlockOutput],
    stage: int,
    later: frozenset[str],
    gradients: bool,
    codec: Codec,
) -> tuple[Field, ...]:
    """Return the fields that a stage sends: its output, the target, and what is read later.

    A context crosses in its standard form, since only adapters read it.
    """
    fields = activation_fields(f"h.{stage}", outputs[stage], codec)
    fields.append(blueprint.task.target)
    if blueprint.inputs.name in later:
        fields.append(blueprint.inputs)
    for boundary in range(stage):
        name = context_field(boundary)
        if name in later:
            fields += codec.coded_fields(Field(name, outputs[boundary].standard_shape, "float32"))
    if gradients:
        fields += codec.coded_fields(Field(gradient_field(stage), outputs[stage].shape, "float32"))
    return tuple(fields)


def _block_names(blueprint: Blueprint, first: int, last: int) -> tuple[str, ...]:
    return tuple(block.name for block in blueprint.blocks[first : last + 1])


def context_field(boundary: int) -> str:
    """Return the name of the field of the merged activation at a boundary: `ctx.` and its number.

    Boundary j is after stage j.
    """
    return f"ctx.{boundary}"


def gradient_field(boundary: int) -> str:
    """Return the name of the field of the sender's gradient at a boundary: `grad.`, its number."""
    return f"grad.{boundary}"


def find_read_fields(config: Resolved, stage: int, stages: int) -> frozenset[str]:
    """Return the fields that a stage reads besides its predecessor's output and the target.

    They are the inputs and `ctx.J`, or none. `image` is among them where stage 0's loss reads it.
    """
    objective, options = config.objective
    sources = context_sources(config.method.context.mode, stage, config.inputs.name)
    names = {source.field for source in sources}
    if stage == stages - 1:
        return frozenset(names)
    name = config.method.objective["name"]
    if call_objective(name, lambda: objective.needs_image(options, stage, stages)):
        names.add(IMAGE)
    return frozenset(names)


def build_blueprint(config: Resolved) -> Blueprint:
    """Return the blueprint of the configuration's network.

    A user's function is imported and called. Raises UserError if it fails, if it cannot be cut and
    there are several stages, if the network has no such argument, if the name is unknown, or if a
    run has recorded other blocks.
    """
    blueprint = _find_blueprint(config)
    if blueprint.why_whole is not None and config.stages > 1:
        raise UserError(
            f"model: {blueprint.name}: {blueprint.why_whole}, or train it end to end with "
            "pipeline.stages=1"
        )
    _check_recorded_blocks(config, blueprint)
    if config.inputs.name == IMAGE and config.inputs.dtype != blueprint.image_dtype:
        return replace(blueprint, image_dtype=config.inputs.dtype)
    return blueprint


def _check_recorded_blocks(config: Resolved, blueprint: Blueprint) -> None:
    """Raise UserError for the first block that is not the one that the run has recorded."""
    recorded, names = config.model.blocks, [block.name for block in blueprint.blocks]
    if recorded is None or list(recorded) == names:
        return
    index, one, other = _find_difference(recorded, names)
    libraries = ""
    if config.model.library != blueprint.library:
        libraries = f", by {config.model.library} then and {blueprint.library} now"
    raise UserError(
        f"model: block {index} of {blueprint.name} is {other}, but the run has recorded "
        f"{one}{libraries}; bring the recorded version back, or begin a new run with its weights: "
        "run.init_from"
    )


def _find_difference(
    recorded: Sequence[str], names: Sequence[str]
) -> tuple[int, str | None, str | None]:
    """Return the first index at which two lists differ, and both names there, None after an end."""
    for index, (one, other) in enumerate(zip_longest(recorded, names)):
        if one != other:
            return index, one, other
    raise AssertionError("they differ")


@lru_cache(maxsize=1)
def _record_blueprint(
    keys: str,
    task_keys: str,
    inputs: Field,
    evaluation_sample: tuple[int, ...] | None,
    classes: int,
    folder: str,
) -> Blueprint:
    """Return the blueprint of a user's or a library's network, recorded once a process.

    keys: those of `model` that shape it, as JSON. task_keys: the section `task`, as JSON. folder:
    in which a `file.py:function` is found.
    """
    model = Model.model_validate_json(keys)
    section = TaskKeys.model_validate_json(task_keys)
    task = build_task(section, classes, inputs.shape, evaluation_sample)
    library = split_library(model.name)
    if library is not None:
        return library_blueprint(model.name, *library, inputs.shape, task, model, inputs.dtype)
    return user_blueprint(
        model.name, inputs.shape, classes, model.args, model, task=task, dtype=inputs.dtype
    )


def _find_blueprint(config: Resolved) -> Blueprint:
    name = config.model.name
    classes = config.model.num_classes
    if name not in registry.MODELS:
        keys = config.model.model_dump_json(include=_NETWORK_KEYS)
        task_keys = config.task.model_dump_json()
        inputs = replace(config.inputs, dtype=_find_input_dtype(config))
        evaluation_sample = config.evaluation_sample
        return _record_blueprint(keys, task_keys, inputs, evaluation_sample, classes, os.getcwd())
    function = registry.look_up(registry.MODELS, name, "config: model.name")
    _check_shipped_inputs(config, function)
    arguments = check_network_arguments(function, config)
    blueprint: Blueprint = function(name, config.sample, classes, **arguments)
    return _take_task(config, blueprint)


def _find_input_dtype(config: Resolved) -> str:
    """Return the dtype that says what inputs are: uint8 for images, also where these are mixed."""
    return config.data.dtype or "uint8"


def _check_reconcile(config: Resolved, task: Task) -> None:
    """Raise UserError for the distance l2 of a task whose loss is no cross-entropy."""
    if config.reconciles and config.method.reconcile.distance == "l2" and not task.is_cross_entropy:
        raise UserError(
            "config: method.reconcile.distance l2 needs a cross-entropy, so that gradients have a "
            f"scale; the loss of task {config.task.name} is none, choose cosine"
        )


def _check_evaluation(config: Resolved, blueprint: Blueprint) -> None:
    """Raise UserError for what has no rule for evaluations of images of another size."""
    if config.evaluation_sample is None:
        return
    sizes = f"are {config.sample} in training and {config.evaluation_sample} in an evaluation"
    if config.method.context.mode != "none":
        raise UserError(
            f"context: the images of {config.data.name} {sizes}, and a context encodes one size; "
            "set method.context.mode=none"
        )
    if blueprint.task.grid is not None:
        raise UserError(
            f"model: the images of {config.data.name} {sizes}, and the tokens of {blueprint.name} "
            "are for one size; choose a network of convolutions"
        )


def _check_shipped_inputs(config: Resolved, function: Any) -> None:
    """Raise UserError if a shipped network does not take the data's inputs.

    Its function names what it takes: `image`, or `tokens` for tokens (T,).
    """
    inputs = config.inputs
    if "tokens" in inspect.signature(function).parameters:
        expected = "tokens (T,) of int64"
        fits = len(inputs.shape) == 1 and inputs.dtype == "int64"
    else:
        expected = "images (C, H, W)"
        fits = len(inputs.shape) == 3 and inputs.dtype != "int64"
    if fits:
        return
    raise UserError(
        f"model: {config.model.name} takes {expected}, but the inputs of {config.data.name} are "
        f"{inputs.dtype} of shape {inputs.shape}; choose another model.name or data.name"
    )


def _take_task(config: Resolved, blueprint: Blueprint) -> Blueprint:
    """Return the blueprint of a shipped network with the task and the inputs of a configuration."""
    evaluation_sample = config.evaluation_sample
    task = build_task(config.task, config.model.num_classes, config.sample, evaluation_sample)
    if type(blueprint.task) in (Classification, type(task)):
        task = replace(task, grid=blueprint.task.grid)
    elif type(task) is Classification and isinstance(blueprint.task, Classification):
        # That of the chain, whose messages are ballast.
        task = replace(blueprint.task, sample=task.sample, options=task.options)
    else:
        raise UserError(
            f"model: {blueprint.name} is not for task {config.task.name}; choose another "
            "model.name or task.name"
        )
    if task.output_shape != blueprint.task.output_shape:
        raise UserError(
            f"model: {blueprint.name} gives outputs of shape {blueprint.task.output_shape} a "
            f"sample, but task {config.task.name} takes {task.output_shape}; choose another "
            "model.name or task.name"
        )
    return replace(
        blueprint,
        task=task,
        dtype=_find_input_dtype(config),
        evaluation_sample=evaluation_sample,
    )


def build_plans(config: Resolved) -> tuple[Blueprint, tuple[StagePlan, ...]]:
    """Return the blueprint and the plan of every stage, in order.

    A batch in the plans is data.batch_size / optim.accumulate. Raises the UserError of
    `build_blueprint`, and one where the blocks cannot be cut. Raises AssertionError if
    pipeline.cuts is still `memory` or `time`.
    """
    blueprint = build_blueprint(config)
    _check_reconcile(config, blueprint.task)
    _check_evaluation(config, blueprint)

    def reads(stage: int) -> frozenset[str]:
        return find_read_fields(config, stage, config.stages)

    with refuse_sizes(config):
        plans = plan_stages(
            blueprint,
            config.stages,
            config.pipeline.cuts,
            batch=config.data.batch_size // config.optim.accumulate,
            reads=reads,
            gradients=config.reconciles,
            codec=CODECS[config.pipeline.wire_dtype],
            evaluation_batch=config.evaluation_batch,
        )
    return blueprint, plans


@contextmanager
def refuse_sizes(config: Resolved) -> Iterator[None]:
    """Enter a context in which shapes that torch cannot represent are a UserError.

    For what is built and run on the meta device, where nothing else can fail in a network of
    localpipe's own.
    """
    try:
        yield
    except (RuntimeError, OverflowError) as error:
        raise UserError(
            f"model: {config.model.name} has no shapes for images {config.sample} and "
            f"{config.model.num_classes} classes: {first_line(error)}; change data.image_size, "
            "data.batch_size, model.num_classes or model.args"
        ) from error

"""Tries a configuration before the first worker starts: every stage runs its step without values.

The stages lie on torch's meta device, so shapes, dtypes and derivatives are checked and nothing is
computed. The messages have the sizes that the run will have.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from localpipe import seeds
from localpipe.config.resolved import Resolved
from localpipe.config.user_code import describe_exception
from localpipe.errors import UserError, describe_names
from localpipe.networks.blueprint import Blueprint
from localpipe.pipeline.channels.message import Header, Kind, Message, empty_rows, replica_rows
from localpipe.pipeline.stages.batch_norm import find_own_batch_norms
from localpipe.pipeline.stages.blocks import split_activation
from localpipe.pipeline.stages.precision import autocast_context
from localpipe.pipeline.stages.stage import (
    Stage,
    TailLoss,
    mark_nothing,
    send_nothing,
    train_step,
)
from localpipe.pipeline.stages.stage_plan import StagePlan, refuse_sizes
from localpipe.pipeline.workers.steps import StepSchedule


def try_stages(
    config: Resolved,
    blueprint: Blueprint,
    plans: Sequence[StagePlan],
    schedule: StepSchedule | None = None,
) -> list[Stage]:
    """Build every stage on the meta device, and run its step and its evaluation there.

    They run where the network or the objective is a user's own.
    plans, schedule: of `config`. Without a schedule, a whole batch and two images are tried.
    Returns the stages in order, without weights. Random generators stay as they are. Raises
    UserError if a stage cannot be built, or fails: the text names the block or the objective.
    Raises it too where no local loss reaches a parameter, unless the configuration allows that.
    """
    with refuse_sizes(config):
        stages = [Stage(plan, blueprint, config, "meta") for plan in plans]
    if config.model.crossing_untrained == "refuse":
        for stage in stages:
            _check_untrained(stage, config)
    _check_frozen_neighbours(stages, config)
    _check_functional_batch_norms(blueprint, config)
    _check_probes(stages, config)
    names = (config.model.name, config.method.objective["name"])
    if not any(":" in name for name in names):
        return stages  # the tests of localpipe have tried its own networks and objectives
    with seeds.preserved_generators():
        for stage in stages:
            _check_batch_norms(stage, config)
            for kind, rows in _message_sizes(schedule, config, stage.plan):
                _Trial(stage, config, kind, rows).run()
    return stages


def build_empty_message(plan: StagePlan, kind: Kind, rows: int) -> Message:
    """Return a message of `rows` samples on the meta device: shapes without values.

    It has all fields that the plan receives of this kind, in their dtypes. Its step and epoch
    are 1.
    """
    fields = {}
    for field in plan.receives.choose(kind.is_evaluation).fields:
        fields[field.name] = empty_rows(field, rows)
    return Message(Header(kind, 1, 1, rows), fields)


def find_untrained(stage: Stage) -> list[str]:
    """Return the names of the blocks' parameters that no local loss reaches, in their order.

    Their output leaves the stage beside the main tensor alone, and no gradient comes back. stage:
    on the meta device. It runs a training step where it sends such tensors, and nothing else.
    Parameters without requires_grad are left out. Random generators stay as they are.
    """
    if stage.plan.is_last or not stage.plan.gives.companions:
        return []
    message = build_empty_message(stage.plan, Kind.TRAIN, 2)
    with seeds.preserved_generators():
        train_step(stage, message, 0.0, send_nothing, mark_nothing)
    parameters = stage.block_parameters()
    return [name for name, parameter in parameters.items() if parameter.grad is None]


def _check_untrained(stage: Stage, config: Resolved) -> None:
    """Raise UserError where no local loss reaches a parameter of a stage."""
    names = find_untrained(stage)
    if names:
        raise UserError(
            f"model: no local loss of {config.model.name} reaches {describe_names(names)} of stage "
            f"{stage.plan.stage}, since later stages alone read what they make; expected a loss "
            "for every parameter; move the cut, freeze their blocks with model.freeze, or set "
            "model.crossing_untrained=allow"
        )


def _check_frozen_neighbours(stages: Sequence[Stage], config: Resolved) -> None:
    """Raise UserError for gradients that are reconciled though no block of a stage follows them."""
    if not config.reconciles:
        return
    for stage in stages:
        if len(stage.frozen) == len(stage.blocks):
            raise UserError(
                f"method: reconcile draws neighbouring gradients together, and all blocks of stage "
                f"{stage.plan.stage} are frozen, so none follows its gradient; move the cut, leave "
                "a block of it out of model.freeze, or set method.reconcile.distance=none"
            )


def _check_probes(stages: Sequence[Stage], config: Resolved) -> None:
    """Raise UserError where the task has no features of a stage's output for its probe."""
    if config.run.probe != "none":
        for stage in stages:
            stage.task.features(stage.plan.gives.standard_shape)


def _check_functional_batch_norms(blueprint: Blueprint, config: Resolved) -> None:
    """Raise UserError for a batch normalisation that is no layer and should be synchronised."""
    names = blueprint.functional_batch_norms
    if names and config.pipeline.batch_norm == "sync" and max(config.replicas) > 1:
        raise UserError(
            f"pipeline: batch_norm sync has no rule for {describe_names(names)} of "
            f"{blueprint.name}, which calls F.batch_norm; set pipeline.batch_norm=local, or use a "
            "layer of torch's"
        )


def _check_batch_norms(stage: Stage, config: Resolved) -> None:
    """Raise UserError for a batch normalisation that cannot be synchronised but should be."""
    if config.pipeline.batch_norm != "sync" or config.replicas[stage.plan.stage] < 2:
        return
    for module in (stage.blocks, stage.objective):
        for path, layer in find_own_batch_norms(module):
            # A frozen one normalises by its running statistics, which need no other rows.
            if module is stage.blocks and int(path.partition(".")[0]) in stage.frozen:
                continue
            raise UserError(
                f"pipeline: batch_norm sync has no rule for the {type(layer).__name__} at {path} "
                f"of stage {stage.plan.stage}, which does more than torch's batch normalisation; "
                "set pipeline.batch_norm=local, or use a plain layer"
            )


def _message_sizes(
    schedule: StepSchedule | None, config: Resolved, plan: StagePlan
) -> list[tuple[Kind, int]]:
    """Return (kind, rows) of every message that one replica of a stage gets, each once."""
    if schedule is None:
        evaluation_batch = plan.in_mode(is_training=False).receives.batch
        training = [(Kind.TRAIN, rows) for rows in (2, plan.receives.batch)]
        return [*training, (Kind.TEST, min(2, evaluation_batch)), (Kind.TEST, evaluation_batch)]
    replicas = config.replicas[plan.stage]
    train_size = schedule.train_size
    if schedule.max_steps is not None:
        train_size = min(train_size, schedule.max_steps * schedule.batch)
    short = replace(
        schedule,
        epochs=1,
        max_steps=None,
        train_size=_shorten(train_size, schedule.batch),
        test_size=_shorten(schedule.test_size, schedule.batch),
        validation_size=_shorten(schedule.validation_size, schedule.batch),
    )
    sizes: dict[tuple[Kind, int], None] = {}
    for header, _ in short.headers(0):
        if header.kind.is_evaluation:
            sizes[Kind.TEST, header.count] = None
            continue
        for replica in range(replicas):
            rows = replica_rows(header.total_count, replica, replicas)
            sizes[Kind.TRAIN, rows.stop - rows.start] = None
    return list(sizes)


def _shorten(size: int, batch: int) -> int:
    """Return a number of images that is cut into batches of the same sizes, but fewer of them."""
    if size <= 2 * batch:
        return size
    return batch + size % batch


@dataclass(frozen=True)
class _Failure:
    """A block that fails by itself. `lack` is the derivative that it lacks, None if it raises."""

    block: str
    lack: str | None
    cause: str


@dataclass(frozen=True)
class _Trial:
    """One message of `rows` images through one stage."""

    stage: Stage
    config: Resolved
    kind: Kind
    rows: int

    def run(self) -> None:
        """Run the message's step or evaluation. Raise UserError where it fails."""
        message = build_empty_message(self.stage.plan, self.kind, self.rows)
        try:
            if self.kind is Kind.TRAIN:
                train_step(self.stage, message, 0.0, self._check_sent, mark_nothing)
            else:
                h = self.stage.forward(message)
                self._check_sent(h, None)
                self.stage.measure(message, h)
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise self._explain(error) from error

    @property
    def _plan(self) -> StagePlan:
        """The plan of messages of this kind."""
        return self.stage.plan.in_mode(self.kind is Kind.TRAIN)

    @property
    def _situation(self) -> str:
        mode = "training" if self.kind is Kind.TRAIN else "evaluation"
        return f"in {mode} with {self.rows} images, tried without values"

    @property
    def _is_twice(self) -> bool:
        """Whether the step differentiates a gradient."""
        is_training = self.kind is Kind.TRAIN
        return is_training and self.config.reconciles and not self.stage.plan.is_first

    def _check_sent(self, h: Tensor, gradient: Tensor | None) -> None:
        """Stand in for `send`: check the shape of what leaves the stage."""
        plan = self._plan
        if plan.is_last:
            return
        expected = (self.rows, *plan.output_shape)
        if tuple(h.shape) != expected:
            raise UserError(
                f"model: block {plan.blocks[-1]} of {self.config.model.name} gives "
                f"{tuple(h.shape)} {self._situation}; expected {expected}, the shape of every batch"
            )

    def _explain(self, error: BaseException) -> UserError:
        """Return the error of a stage, with the block that fails by itself, if there is one."""
        failure = self._find_failure()
        if failure is not None:
            return self._describe_failure(failure)
        plan = self._plan
        objective = self.config.method.objective["name"]
        if plan.is_last:
            objective = "the network's own loss"
        return UserError(
            f"objective: {objective} fails at stage {plan.stage} {self._situation}, on an output "
            f"of shape {plan.output_shape}: {describe_exception(error)}; "
            "move the cut, or choose another objective"
        )

    def _describe_failure(self, failure: _Failure) -> UserError:
        name = self.config.model.name
        if failure.lack is None:
            return UserError(
                f"model: block {failure.block} of {name} fails {self._situation}: {failure.cause}; "
                "expected a block for batches of every size of the run, which reads no values; "
                "change the block, or data.batch_size"
            )
        way_out = "use differentiable layers"
        if self._is_twice:
            way_out = "use layers that have one, or set method.reconcile.distance=none"
        return UserError(
            f"model: block {failure.block} of {name} has no {failure.lack}, which stage "
            f"{self.stage.plan.stage} needs {self._situation}: {failure.cause}; {way_out}"
        )

    def _find_failure(self) -> _Failure | None:
        """Run block after block, and return the first failure. The head counts as a block."""
        stage = self.stage
        parts = list(zip(stage.plan.blocks, stage.blocks, strict=True))
        if isinstance(stage.objective, TailLoss):
            parts.append(("head", stage.objective.tail))
        input_field, *others = self._plan.input_fields
        x = empty_rows(input_field, self.rows)
        companions = tuple(empty_rows(field, self.rows) for field in others)
        for name, part in parts:
            lack: str | None = None
            try:
                with self._precision():
                    leaf = x.detach()
                    if self._is_twice and leaf.is_floating_point():
                        leaf.requires_grad_()
                    x, companions = split_activation(part(leaf.clone(), *companions))
                    lack = "derivative"
                    gradient = self._differentiate(x, leaf)
                    lack = "second derivative"
                    if gradient is not None and gradient.requires_grad:
                        gradient.square().sum().backward()
            except (Exception, SystemExit) as error:
                return _Failure(name, lack, describe_exception(error))

            # The last block of a stage, unlike the others, has a shape to compare with.
            expected = (self.rows, *self._plan.output_shape)
            if name == stage.plan.blocks[-1] and tuple(x.shape) != expected:
                return _Failure(name, None, f"gives {tuple(x.shape)}, expected {expected}")
        return None

    def _differentiate(self, output: Tensor, leaf: Tensor) -> Tensor | None:
        """Back-propagate through a block; return the gradient at its input, where one is needed."""
        if self.kind is not Kind.TRAIN or not output.is_floating_point():
            return None
        loss = output.float().square().sum()
        if leaf.requires_grad:
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
            return gradient
        if loss.requires_grad:
            loss.backward()
        return None

    def _precision(self) -> ExitStack:
        """Return the context of the stage's arithmetic."""
        stack = ExitStack()
        stack.enter_context(torch.set_grad_enabled(self.kind is Kind.TRAIN))
        stack.enter_context(autocast_context(self.config, self.stage.device)())
        if self._is_twice:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        return stack

"""A stage: consecutive blocks, their local loss and their optimizer. And the recipe of its step.

The gradient of a stage's loss reaches no other stage. What comes in is detached and read-only, and
the channel copies what goes out before the stage's own update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from localpipe import seeds
from localpipe.config.keys import Reconcile
from localpipe.config.resolved import Resolved, ResolvedFeedback
from localpipe.config.user_code import is_user_code
from localpipe.errors import UserError
from localpipe.methods.context import Adapter, context_sources, has_encoders
from localpipe.methods.feedback import FeedbackLoss, build_with_feedback, find_readout
from localpipe.methods.objective import LocalLoss, Site
from localpipe.methods.reconcile import gradient_distance
from localpipe.methods.user_objective import build_user_objective, check_user_objective
from localpipe.networks.blueprint import Blueprint, to_meta
from localpipe.networks.freeze import find_frozen_blocks, freeze_blocks
from localpipe.pipeline.channels.message import Header, Kind, Message
from localpipe.pipeline.stages.batch_norm import SyncBatchNorm, TwiceBatchNorm, replace_batch_norms
from localpipe.pipeline.stages.blocks import (
    Activation,
    Blocks,
    join_activation,
    split_activation,
)
from localpipe.pipeline.stages.boundary import Boundary, build_entry
from localpipe.pipeline.stages.codecs import CODECS, Codec
from localpipe.pipeline.stages.in_place import (
    check_unwritten,
    copy_inputs,
    find_written_inputs,
    input_versions,
)
from localpipe.pipeline.stages.optimizer import build_update, load_optimizer_state, set_rate
from localpipe.pipeline.stages.precision import autocast_context, build_scaler
from localpipe.pipeline.stages.recompute import checkpoint_block
from localpipe.pipeline.stages.replicas import Replicas
from localpipe.pipeline.stages.stage_plan import StagePlan, companion_field
from localpipe.pipeline.stages.weights import (
    check_finite,
    check_same_weights,
    collect_weights,
    copy_weights,
    find_matching_names,
)
from localpipe.tasks.layout import Layout
from localpipe.tasks.task import Task, measure_batch

M = TypeVar("M", bound=nn.Module)


class TailLoss(LocalLoss):
    """The last stage's objective: the network's own head and the task's loss.

    companions: the names of the fields of what the head takes beside the main tensor.
    """

    def __init__(self, tail: nn.Module, task: Task, companions: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.tail = tail
        self.task = task
        self._companions = companions

    def exit(self, h: Tensor, *companions: Tensor) -> Tensor:
        """Return the network's logits, (B, classes), never None. h: (B, *output_shape)."""
        logits: Tensor = self.tail(h, *companions)
        return logits

    def forward(self, h: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """Return the task's loss, a scalar. fields: `target`, and the companions by name."""
        outputs = self.tail(h, *[fields[name] for name in self._companions])
        return self.task.loss(outputs, fields["target"])


class Stage:
    """One gradient-isolated stage with its modules, optimizer and loss scale.

    `device` may be meta, for plans. replicas: this replica's connection, or None for a single one.
    h is always the raw output of the blocks, (B, *output_shape), the main tensor. `companions` are
    what the blocks gave beside it for the last message. `adapter` and `optimizer` are None where
    the stage has no context and nothing to train. `feedback` is None unless parameters of later
    stages come back. `frozen` are positions in `blocks`. Frozen blocks
    are in evaluation mode and not in the optimizer. They have a graph only where their input has
    one, as after a trained block or an adapter.

    The order for one message is `forward`, `outgoing`, `local_loss`, `add_distance`, `update`.
    `forward` keeps the tensors that the others read. Raises UserError if the context has no rule
    for the input, or if the objective cannot be built. On the meta device, a user's objective is
    also tried.
    """

    def __init__(
        self,
        plan: StagePlan,
        blueprint: Blueprint,
        config: Resolved,
        device: torch.device | str = "cpu",
        replicas: Replicas | None = None,
    ) -> None:
        self.plan = plan
        self.task = blueprint.task
        self.seed = config.run.seed
        self.device = torch.device(device)
        self.replicas = replicas or Replicas()
        self._is_meta = self.device.type == "meta"
        self._autocast = autocast_context(config, self.device)
        self._scaler = build_scaler(config, self.device)
        self._recomputes = config.run.checkpointing == "block"
        self._reconcile: Reconcile | None = None
        if config.reconciles:
            self._reconcile = config.method.reconcile
        self.feedback: ResolvedFeedback | None = None
        if config.feeds_back:
            self.feedback = config.method.feedback

        # The network's modules, then the methods'. Each draws from a random stream of its own.
        frozen = find_frozen_blocks(blueprint, config.model.freeze)
        self.frozen = frozenset(i - plan.first for i in frozen if plan.first <= i <= plan.last)
        parts = self._build_parts(blueprint)
        block_count = plan.last - plan.first + 1
        self.blocks = Blocks(*parts[:block_count])
        self.objective = self._build_objective(blueprint, config, parts[block_count:])
        self.adapter = self._build_adapter(config)
        self.entry = build_entry(config)
        self._memory_format = torch.contiguous_format
        if config.run.channels_last:
            self._memory_format = torch.channels_last
        self._prepare_modules(config)
        self._check_objective(config.method.objective["name"])
        with self.precision():
            self._written_inputs = find_written_inputs(
                self.objective, plan, self.replicas, kept=(self, blueprint)
            )
        self._prefixes = _weight_prefixes(plan, blueprint)

        codec = CODECS[config.pipeline.wire_dtype]
        # Of training messages and of evaluations, which are one where their samples are alike.
        self.boundary = self._build_boundary(plan, codec)
        self._boundaries = {True: self.boundary, False: self.boundary}
        if plan.evaluation is not None:
            self._boundaries[False] = self._build_boundary(plan.evaluation, codec)
        self.companions: tuple[Tensor, ...] = ()
        self._parameters = self.parameters()
        is_captured = config.run.capture == "graphs"
        self._update = build_update(config.optim, self._parameters, captured=is_captured)
        self.optimizer = self._update.optimizer if self._update is not None else None
        self._average = self._update.average if self._update is not None else None
        self._is_training = True

    # -- Construction -----------------------------------------------------------------------------

    def _build_parts(self, blueprint: Blueprint) -> list[nn.Module]:
        """Return the stage's blocks and, in the last stage, the tail."""
        indices = list(range(self.plan.first, self.plan.last + 1))
        if self.plan.is_last:
            indices.append(len(blueprint.blocks))
        if self._is_meta:
            return blueprint.build_meta(indices)
        return blueprint.build(indices, self.seed)

    def _build_objective(
        self, blueprint: Blueprint, config: Resolved, tail: list[nn.Module]
    ) -> LocalLoss:
        plan = self.plan
        if plan.is_last:
            return TailLoss(tail[0], blueprint.task, _tail_fields(plan))
        site = Site(
            stage=plan.stage,
            stages=plan.stages,
            last_block=plan.last,
            shape=plan.gives.standard_shape,
            blueprint=blueprint,
            unit=partial(self._build_unit, "aux"),
            replicas=self.replicas,
        )
        cls, options = config.objective
        name = config.method.objective["name"]
        build_loss = partial(cls, options)
        if is_user_code(name):
            build_loss = partial(build_user_objective, name, cls, options)
        build = partial(build_with_feedback, config.method.feedback, site, build_loss)

        # This seed is for modules outside of every unit: those that a user's class makes by itself.
        objective: LocalLoss = seeds.build_unit(self.seed, f"aux.{plan.stage}", build)
        return objective

    def _build_adapter(self, config: Resolved) -> Adapter | None:
        """Return the adapter of the stage's context, or None where the context has no source."""
        plan = self.plan
        mode = config.method.context.mode
        sources = context_sources(mode, plan.stage, config.inputs.name)
        if not sources:
            return None

        shapes = {field.name: field.shape for field in plan.decoded}
        shape, grid = plan.takes.standard_shape, self.task.grid
        vocabulary = self.task.num_classes if self.task.reads == "token" else None
        if not has_encoders(sources, shapes, shape, grid, vocabulary):
            raise UserError(
                f"context: mode {mode} has no rule for stage {plan.stage}'s input of shape "
                f"{plan.input_shape}; expected (C, H, W), or (T, D) of a network that says how its "
                "tokens lie; move the cut, or set method.context.mode=none"
            )
        build = partial(Adapter, sources, shapes, shape, grid, vocabulary)
        return self._build_unit("context", "adapter", build)

    def _build_unit(self, owner: str, name: str, build: Callable[[], M]) -> M:
        """Build an auxiliary network or an adapter with a seed of its own."""
        if self._is_meta:
            with torch.device("meta"):
                return build()
        return seeds.build_unit(self.seed, f"{owner}.{self.plan.stage}.{name}", build)

    def _prepare_modules(self, config: Resolved) -> None:
        """Replace the batch normalisations where needed, and move all modules to the device."""
        is_synchronised = self.replicas.count > 1 and config.pipeline.batch_norm == "sync"
        for module in self._modules():
            if is_synchronised:
                replace_batch_norms(module, partial(SyncBatchNorm, replicas=self.replicas))
            elif self._differentiates_twice:
                replace_batch_norms(module, TwiceBatchNorm)
            if self._is_meta:
                to_meta(module)
            # Only four-dimensional weights take the memory format.
            module.to(self.device, memory_format=self._memory_format)  # type: ignore[call-overload]
        self._freeze()

    def _freeze(self) -> None:
        """Freeze the blocks of model.freeze. Their batch normalisations may have been replaced."""
        frozen = {}
        trained = [module for module in self._modules() if module is not self.blocks]
        for position, block in enumerate(self.blocks):
            if position in self.frozen:
                frozen[self.plan.blocks[position]] = block
            else:
                trained.append(block)
        if frozen:
            freeze_blocks(frozen, trained)

    def _build_boundary(self, plan: StagePlan, codec: Codec) -> Boundary:
        return Boundary(plan, codec, self.entry, self.adapter, self._differentiates_twice)

    def _check_objective(self, name: str) -> None:
        """Try a user's objective on the meta device, before a run starts."""
        plan = self.plan
        if self._is_meta and is_user_code(name) and not plan.is_last:
            received = plan.receives.fields
            shape = plan.gives.standard_shape
            check_user_objective(name, self.objective, plan.stage, shape, received)

    # -- The step ---------------------------------------------------------------------------------

    @property
    def _differentiates_twice(self) -> bool:
        """Whether the loss contains a gradient: the local loss's gradient at the received input."""
        return self._reconcile is not None and not self.plan.is_first

    @property
    def sends_gradient(self) -> bool:
        """Whether the next stage gets the gradient at the boundary together with the activation.

        It is true with reconciliation, for every stage but the last.
        """
        return self._reconcile is not None and not self.plan.is_last

    def forward(self, message: Message) -> Tensor:
        """Run the blocks on a message. Return h, (header.count, *output_shape) in fp32.

        A message of kind TRAIN sets training mode, and h has its graph. Any other kind sets
        evaluation mode, without gradient. It seeds torch's default generators by seed, stage,
        replica, step and part. The blocks may write into the message's tensors in place.
        Raises KeyError if the message lacks a field that the stage reads, and NeighbourLostError if
        another replica is lost.
        """
        is_training = message.header.kind is Kind.TRAIN
        self._set_mode(is_training)
        self.replicas.begin_message(message.header.total_count)
        self._seed_random_stream(message.header)
        return self._compute(message, is_training)

    def _seed_random_stream(self, header: Header) -> None:
        """Start the random stream of a message. A step's first message has the step's stream."""
        parts: list[object] = ["stage", self.plan.stage, self.replicas.index, header.step]
        if header.part > 0:
            parts.append(header.part)
        seeds.enter_stream(self.seed, *parts)

    def _compute(self, message: Message, is_training: bool) -> Tensor:
        self.boundary = self._boundaries[is_training]
        self.companions = ()  # those of the message before are not needed any more
        with torch.set_grad_enabled(is_training), self.precision():
            x = self.boundary.read_input(message.fields, is_training)
            companions = self.boundary.read_companions(message.fields)
            activation = self._run_blocks(self._to_memory_format(x), companions, is_training)
            h, self.companions = split_activation(activation)
            h = h.float()
        if is_training and self.sends_gradient and not h.requires_grad:
            # The blocks have no parameters. Torch's counting hooks take no leaf, so it is a view.
            h = h.detach().requires_grad_().view_as(h)
        return h

    def _to_memory_format(self, x: Tensor) -> Tensor:
        """Return images in the stage's memory format, by default as the boundary says.

        Only channels that come first can be put last.
        """
        takes = self.plan.takes
        if x.dim() != 4 or not Layout(takes.layout).is_standard:
            return x
        if takes.order and self._memory_format == torch.contiguous_format:
            return x
        return x.contiguous(memory_format=self._memory_format)

    def _run_blocks(
        self, x: Tensor, companions: tuple[Tensor, ...], is_training: bool
    ) -> Activation:
        if is_training and self._recomputes:
            for position, block in enumerate(self.blocks):
                # A frozen block without a graph is not run again.
                has_graph = any(tensor.requires_grad for tensor in (x, *companions))
                if position in self.frozen and not has_graph:
                    activation = block(x, *companions)
                else:
                    activation = checkpoint_block(block, x, *companions)
                x, companions = split_activation(activation)
            return join_activation(x, companions)
        output: Activation = self.blocks(x, *companions)
        return output

    def outgoing(
        self, message: Message, h: Tensor, gradient: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """Return the tensors that the next stage gets, encoded. The channel copies them.

        Call it after `forward` of the same message. gradient: `boundary_gradient`, of the shape of
        h, where the stage sends one, else None. The names are those of the received fields,
        `h.STAGE` with its companions, and where needed `ctx.J` and `grad.STAGE`. Fields that the
        edge does not carry are among them. The tensors may share memory with h and the message.
        """
        return self.boundary.build_outgoing(message.fields, h, gradient, self.companions)

    def to_standard(self, h: Tensor) -> Tensor:
        """Return h in its standard form, (B, C, H, W), (B, T, D) or (B, D), a view or itself."""
        return self.plan.gives.to_standard(h)

    def objective_inputs(self, message: Message, h: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return what the objective is called with: an activation, and fields by name.

        Local losses get h in its standard form and the message's fields. The network's own head
        gets h as it is, and the companions of the last `forward` among the fields.
        """
        if not self.plan.is_last:
            return self.to_standard(h), message.fields
        names = _tail_fields(self.plan)
        if not names:
            return h, message.fields
        return h, {**message.fields, **dict(zip(names, self.companions, strict=True))}

    def local_loss(self, message: Message, h: Tensor) -> Tensor:
        """Return the stage's own loss, 0-dim, with its graph, without the gradient distance.

        h: of `forward` for the same message. message.fields holds `target`, and `image` where the
        objective reads it (KeyError). In the last stage it is the network's own loss. h and the
        message stay as they are: what the objective writes into in place is copied. Raises RunError
        where it writes into something else than when it was tried.
        """
        inputs = self.objective_inputs(message, h)
        versions = input_versions(*inputs)
        with self.precision():
            loss = self._run_objective(*copy_inputs(self._written_inputs, *inputs))
        check_unwritten(self.plan.stage, versions, input_versions(*inputs))
        return loss

    def _run_objective(self, h: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = self.objective(h, fields)
        return loss

    def boundary_gradient(self, loss: Tensor, h: Tensor) -> Tensor:
        """Return the gradient of the local loss at h, per sample (times B), like h, unscaled.

        The backward pass runs through the auxiliary network only, and the graph stays for `update`.
        Raises RuntimeError if h has no graph, as after an evaluation message.
        """
        (gradient,) = torch.autograd.grad(self._scale_loss(loss), h, retain_graph=True)
        return self._unscale_gradient(gradient) * len(h)

    def add_distance(self, loss: Tensor, message: Message) -> Tensor:
        """Return the local loss plus, after the first stage, the weighted gradient distance (SGR).

        The distance is between the gradients of two local losses at the received activation: this
        stage's and the sender's. Call it after `forward` of the same training message. Without
        reconciliation, or in the first stage, the same loss object comes back. Raises KeyError if
        the message has no gradient.
        """
        leaf = self.boundary.leaf
        if self._reconcile is None or leaf is None:
            return loss
        (gradient,) = torch.autograd.grad(self._scale_loss(loss), leaf, create_graph=True)
        gradient = self._unscale_gradient(gradient) * len(gradient)
        received = self.boundary.read_gradient(message.fields)
        distance = gradient_distance(self._reconcile.distance, gradient, received)
        return loss + self._reconcile.weight * distance

    def update(self, loss: Tensor, message: Message, rate: float) -> None:
        """Back-propagate inside the stage. After the last message of a step, update the weights.

        loss: with its graph, which is freed. rate: the learning rate, read at the last message
        only. Part 0 clears the gradients. Every loss is weighted by header.weight. Gradients add up
        over a step's messages and all replicas, and are clipped then. With a loss scale, gradients
        that overflowed skip the update, and the step counts nevertheless. A stage without
        parameters does nothing.
        Raises RuntimeError if the loss has no graph, NeighbourLostError if another replica is lost.
        """
        if self._update is None:
            return
        header = message.header
        if header.part == 0:
            self._clear_gradients()
        if header.weight != 1.0:
            loss = loss * header.weight
        self._scale_loss(loss).backward()
        if header.ends_step:
            self.replicas.sum_gradients(self._parameters)
            set_rate(self._update.optimizer, rate)
            self._update.run(self._scaler)

    def _clear_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _scale_loss(self, loss: Tensor) -> Tensor:
        """Return a loss times the loss scale. The scale stays on the device, without a wait."""
        if self._scaler is None:
            return loss
        return self._scaler.scale(loss)

    def _unscale_gradient(self, gradient: Tensor) -> Tensor:
        if self._scaler is None:
            return gradient
        return gradient / self._scaler.scale(gradient.new_ones(()))

    def precision(self) -> AbstractContextManager[object]:
        """Return the context of the stage's arithmetic. Its outputs and every loss are fp32."""
        if self._differentiates_twice:
            return self._plain_attention()
        return self._autocast()

    @contextmanager
    def _plain_attention(self) -> Iterator[None]:
        """Enter autocast without the fused attention kernels, which have no double backward."""
        with self._autocast(), sdpa_kernel(SDPBackend.MATH):
            yield

    def measure(self, message: Message, h: Tensor) -> dict[str, Tensor] | None:
        """Return the sums of a batch at the stage's exit: `loss`, in float64, and the task's own.

        h: of `forward` for the same message, whose mode still holds. Returns None where the
        objective has no exit. Raises KeyError if the message lacks `target`.
        """
        with torch.no_grad(), self.precision():
            h, _ = self.objective_inputs(message, h)
            h, _ = copy_inputs(self._written_inputs, h, {})
            if isinstance(self.objective, TailLoss):
                outputs: Tensor | None = self.objective.exit(h, *self.companions)
            else:
                outputs = self.objective.exit(h)
            if outputs is None:
                return None
            task = self.task.in_mode(is_training=False)
            return measure_batch(task, outputs, message.fields["target"])

    # -- Parameters that come back ----------------------------------------------------------------

    def shared_parameters(self) -> dict[str, Tensor]:
        """Return the parameters that earlier stages copy, by the names that their copies have.

        They are the stage's own, detached and not copied: those of its first block, or of the
        network's last Linear. The mapping is empty where no stage copies this one.
        """
        shared: nn.Module | None = None
        if self.feedback is None:
            return {}
        if self.feedback.mode == "block" and not self.plan.is_first:
            shared = self.blocks[0]
        elif self.feedback.mode == "readout" and isinstance(self.objective, TailLoss):
            found = find_readout(self.objective.tail)
            assert found is not None, "the earlier stages have copied it"
            shared = found[1]
        if shared is None:
            return {}
        return {name: value.detach() for name, value in shared.named_parameters()}

    def copied_parameters(self) -> dict[str, Tensor]:
        """Return the copies that `refresh` moves, by the names that their originals have.

        They are the stage's own. The mapping is empty where this stage copies none.
        """
        if not isinstance(self.objective, FeedbackLoss):
            return {}
        return {name: value.detach() for name, value in self.objective.list_copies()}

    def refresh(self, parameters: Mapping[str, Tensor]) -> None:
        """Take parameters of a later stage into this stage's copies.

        parameters: `shared_parameters` of that stage after an earlier step. They may be on the
        host. Raises AssertionError where this stage has no copies, KeyError where one is missing.
        """
        assert isinstance(self.objective, FeedbackLoss), "the last stage copies nothing"
        self.objective.refresh(parameters)

    def _set_mode(self, is_training: bool) -> None:
        if is_training == self._is_training:
            return
        for module in self._modules():
            module.train(is_training)
        for position in self.frozen:
            self.blocks[position].eval()
        self._is_training = is_training

    # -- Parameters, weights and state ------------------------------------------------------------

    def _modules(self) -> list[nn.Module]:
        if self.adapter is None:
            return [self.entry, self.blocks, self.objective]
        return [self.entry, self.adapter, self.blocks, self.objective]

    def parameters(self) -> list[nn.Parameter]:
        """Return every trained parameter: the adapter's, the blocks', the objective's.

        They come in this order. Parameters without requires_grad, as those of frozen blocks, are
        left out.
        """
        parameters = []
        for module in self._modules():
            parameters += [p for p in module.parameters() if p.requires_grad]
        return parameters

    def block_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters of the blocks alone, by their names in the network."""
        parameters = {}
        for prefix, block in zip(self._prefixes, self.blocks, strict=False):
            for name, parameter in block.named_parameters():
                if parameter.requires_grad:
                    parameters[prefix + name] = parameter
        return parameters

    def auxiliary(self) -> list[nn.Parameter]:
        """Return the parameters of the networks that exist in training only: the objective's.

        The list is empty in the last stage. The adapter is not counted, since inference keeps it.
        """
        if self.plan.is_last:
            return []
        return list(self.objective.parameters())

    def weights(self) -> dict[str, Tensor]:
        """Return parameters and buffers by their names in the whole network, not copied.

        Auxiliary networks have the prefix `aux.STAGE.`, adapters `context.STAGE.`. The order is
        blocks, objective (or tail), adapter. Buffers that state_dict leaves out are left out.
        """
        modules = list(self.blocks)
        if isinstance(self.objective, TailLoss):
            # The user's network has no TailLoss, so the names of its head carry no `tail.`.
            modules.append(self.objective.tail)
        else:
            modules.append(self.objective)
        pairs = list(zip(self._prefixes, modules, strict=True))
        if self.adapter is not None:
            pairs.append((f"context.{self.plan.stage}.", self.adapter))
        return collect_weights(pairs)

    def use_average(self) -> AbstractContextManager[None]:
        """Return a context in which the parameters have the values of their moving average.

        Without an average it does nothing. Buffers stay as they are.
        """
        if self._average is None:
            return nullcontext()
        return self._average.applied()

    def averaged_weights(self) -> dict[str, Tensor] | None:
        """Return `weights` with the moving average of the parameters, None without an average.

        The tensors are the average's own and the stage's buffers, not copied.
        """
        if self._average is None:
            return None
        with self._average.applied():
            return self.weights()

    def check_finite(self) -> None:
        """Raise RunError with the name of the first weight that is not finite.

        A gradient may have been infinite although the loss was finite.
        """
        check_finite(self.weights())

    def state(self) -> dict[str, Any]:
        """Return weights, optimizer state, loss scale and average, readable with weights_only.

        The keys are `weights`, `optimizer`, `scaler` and `ema`. The last three are None where the
        stage has none. The tensors are the stage's own, not copies, so later updates change them.
        """
        state: dict[str, Any] = {"weights": self.weights(), "optimizer": None, "scaler": None}
        state["ema"] = self.averaged_weights()
        if self.optimizer is not None:
            state["optimizer"] = self.optimizer.state_dict()
        if self._scaler is not None:
            state["scaler"] = self._scaler.state_dict()
        return state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state`.

        The tensors may be on another device. Raises RunError unless weights have exactly this
        stage's names and shapes. Nothing is changed then. Raises KeyError if a key is missing. An
        optimizer or scaler state that does not fit raises torch's error, after the weights were
        loaded.
        """
        self.load_weights(state["weights"])
        if self.optimizer is not None:
            load_optimizer_state(self.optimizer, state["optimizer"])
        if self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])
        if self._average is not None:
            with self._average.applied():
                copy_weights(self.weights(), state["ema"])

    def take_weights(self, weights: Mapping[str, Tensor]) -> set[str]:
        """Load the weights that fit by name and shape, and return their names. Ignore the others.

        It never fails: without a match the set is empty. On the meta device nothing is copied. A
        moving average begins again. Copies of a later stage's parameters take those of their own
        names, or else of what they copy.
        """
        current = self.weights()
        weights = {**self._find_copied(weights), **weights}
        names = find_matching_names(current, weights)
        if not self._is_meta:
            copy_weights(current, {name: weights[name] for name in names})
            self._restart_average()
        return names

    def _find_copied(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights of the network by the names that this stage's copies of them have."""
        if not isinstance(self.objective, FeedbackLoss):
            return {}
        copied = {}
        prefix = self._prefixes[-1]
        for own_prefix, source in self.objective.sources.items():
            for name in self.objective.state_dict():
                source_name = source + name.removeprefix(own_prefix)
                if name.startswith(own_prefix) and source_name in weights:
                    copied[prefix + name] = weights[source_name]
        return copied

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights, converted to this stage's dtypes. A moving average begins again.

        Raises RunError, before anything is copied, unless names and shapes are exactly this
        stage's.
        """
        current = self.weights()
        check_same_weights(self.plan.stage, current, weights)
        copy_weights(current, weights)
        self._restart_average()

    def _restart_average(self) -> None:
        if self._average is not None:
            self._average.restart()


def _tail_fields(plan: StagePlan) -> tuple[str, ...]:
    """Return the names of the companions that the network's own head takes."""
    count = len(plan.gives.companions)
    return tuple(companion_field(plan.output, number) for number in range(1, count + 1))


def _weight_prefixes(plan: StagePlan, blueprint: Blueprint) -> list[str]:
    """Return the prefix of every block's weights and, last, of the objective's."""
    prefixes = [block.prefix for block in blueprint.blocks[plan.first : plan.last + 1]]
    if plan.is_last:
        prefixes.append(blueprint.tail.prefix)
    else:
        prefixes.append(f"aux.{plan.stage}.")
    return prefixes


def train_step(
    stage: Stage,
    message: Message,
    rate: float,
    send: Callable[[Tensor, Tensor | None], None],
    enter: Callable[[str], None],
) -> tuple[Tensor, Tensor]:
    """Train a stage on one message: forward, send, local loss, backward, update.

    send(h, gradient) is called once. Without a gradient to send it gets (h, None) before the loss.
    Where `stage.sends_gradient`, it gets the gradient at h, like h, after the loss and before the
    update. h may carry its graph. enter(phase) is called at the start of `forward`, `loss` and
    `update`.
    rate: the learning rate of the step. Only the last message of a step updates the weights.
    Returns h and the local loss, 0-dim, without the gradient distance. Both may carry their graphs,
    and a CapturedStage overwrites them in its next step. Errors of `send` and of the stage pass
    through.
    """
    enter("forward")
    h = stage.forward(message)
    if not stage.sends_gradient:
        # The activation needs nothing else, so it goes first.
        send(h, None)

    enter("loss")
    loss = stage.local_loss(message, h)
    if stage.sends_gradient:
        send(h, stage.boundary_gradient(loss, h))

    enter("update")
    stage.update(stage.add_distance(loss, message), message, rate)
    return h, loss


def encode_output(stage: Stage, message: Message, h: Tensor, gradient: Tensor | None) -> None:
    """Stand in for `send` without an edge: build what the next stage would get, and drop it.

    The codec's seconds are the stage's own, so they belong to every bound.
    """
    if not stage.plan.is_last:
        stage.outgoing(message, h, gradient)


def send_nothing(h: Tensor, gradient: Tensor | None) -> None:
    """Stand in for `send` where only the computation counts: ignore both arguments."""


def mark_nothing(phase: str) -> None:
    """Stand in for `enter` where no time is taken: ignore the phase."""

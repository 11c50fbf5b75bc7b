"""A stage: consecutive blocks, their local loss and their optimizer. The only place that knows what a boundary does.

What comes in is detached and read-only; what goes out is copied by the channel before the stage's own update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from localpipe import seeds
from localpipe.config.resolved import Resolved
from localpipe.config.user_code import is_user_code
from localpipe.errors import RunError, UserError
from localpipe.methods.context import Adapter, context_sources
from localpipe.methods.objective import LocalLoss, Site
from localpipe.methods.reconcile import gradient_distance
from localpipe.methods.user_objective import build_user_objective, check_user_objective
from localpipe.networks.blueprint import Blueprint
from localpipe.pipeline.channels.message import Header, Kind, Message
from localpipe.pipeline.stages.batch_norm import SyncBatchNorm, TwiceBatchNorm, replace_batch_norms
from localpipe.pipeline.stages.boundary import Normalise
from localpipe.pipeline.stages.codecs import BOUNDARY_DTYPES
from localpipe.pipeline.stages.optimizer import build_optimizer, load_optimizer_state, set_rate
from localpipe.pipeline.stages.precision import autocast_context, build_scaler
from localpipe.pipeline.stages.recompute import run_recomputed
from localpipe.pipeline.stages.replicas import Replicas
from localpipe.pipeline.stages.stage_plan import IMAGE, StagePlan, context_field
from localpipe.tasks.classification import Classification

M = TypeVar("M", bound=nn.Module)


class TailLoss(LocalLoss):
    """The last stage's objective: the network's own head and the task's loss."""

    def __init__(self, tail: nn.Module, task: Classification) -> None:
        super().__init__()
        self.tail, self.task = tail, task

    def exit(self, h: Tensor) -> Tensor:
        """Return the network's logits."""
        logits: Tensor = self.tail(h)
        return logits


class Stage:
    """One gradient-isolated stage with everything it owns. `device` may be meta, for plans."""

    def __init__(
        self,
        plan: StagePlan,
        blueprint: Blueprint,
        config: Resolved,
        device: torch.device | str = "cpu",
        replicas: Replicas | None = None,
    ) -> None:
        self.plan, self.task, self.seed = plan, blueprint.task, config.run.seed
        self.replicas = Replicas() if replicas is None else replicas
        self.device = torch.device(device)
        self._meta = self.device.type == "meta"
        self._autocast = autocast_context(config, self.device)
        self._scaler = build_scaler(config, self.device)
        self._wire: torch.dtype = getattr(torch, BOUNDARY_DTYPES[config.pipeline.wire_dtype])
        self._checkpointing = config.run.checkpointing == "block"
        self._reconcile = config.method.reconcile if config.reconciles else None
        wanted = list(range(plan.first, plan.last + 1))
        own_tail = [len(blueprint.blocks)] if plan.is_last else []
        modules = (
            blueprint.build_meta(wanted + own_tail)
            if self._meta
            else blueprint.build(wanted + own_tail, self.seed)
        )
        self.blocks = nn.Sequential(*modules[: len(wanted)])
        self.objective = self._objective(blueprint, config, modules[len(wanted) :])
        self.adapter = self._adapter(config)
        self._prefixes = [blueprint.parts[i].prefix for i in wanted]
        self._objective_prefix = blueprint.tail.prefix if plan.is_last else f"aux.{plan.stage}."
        self.entry: nn.Module = nn.Identity()
        if isinstance(config.data.mean, tuple) and isinstance(config.data.std, tuple):
            self.entry = Normalise(config.data.mean, config.data.std)
        self._format = torch.channels_last if config.run.channels_last else torch.contiguous_format
        for module in self._modules():
            if self.replicas.count > 1 and config.pipeline.batch_norm == "sync":
                replace_batch_norms(module, lambda layer: SyncBatchNorm(layer, self.replicas))
            elif self._twice:
                replace_batch_norms(module, TwiceBatchNorm)
            module.to(device, memory_format=self._format)  # type: ignore[call-overload]  # four-dimensional weights only
        if (
            self._meta
            and is_user_code(name := config.method.objective["name"])
            and not plan.is_last
        ):
            check_user_objective(
                name, self.objective, plan.stage, plan.output_shape, plan.receives.fields
            )
        self._trained = self.parameters()
        self.optimizer = build_optimizer(
            config.optim, self._trained, captured=config.run.capture == "graphs"
        )
        self._training = True
        self._leaf: Tensor | None = None  # what came in, while its gradient is asked for
        self._merged: Tensor | None = None  # what the blocks saw, where a later stage reads it

    def _objective(
        self, blueprint: Blueprint, config: Resolved, tail: list[nn.Module]
    ) -> LocalLoss:
        plan = self.plan
        if plan.is_last:
            return TailLoss(tail[0], blueprint.task)
        cls, options = config.objective
        site = Site(
            plan.stage,
            plan.stages,
            plan.last,
            plan.output_shape,
            blueprint,
            partial(self._unit, "aux"),
            self.replicas,
        )
        name = config.method.objective["name"]
        build = partial(build_user_objective, name, cls) if is_user_code(name) else cls
        # Its own seed is for what no unit holds: a network that a user's class makes by itself.
        objective: LocalLoss = seeds.build_seeded(
            self.seed, f"aux.{plan.stage}", lambda: build(options, site)
        )
        return objective

    def _adapter(self, config: Resolved) -> Adapter | None:
        read = context_sources(config.method.context.mode, self.plan.stage)
        if not read:
            return None
        grid = self.task.grid
        if len(self.plan.input_shape) not in ((3,) if grid is None else (2, 3)):
            raise UserError(
                f"context: mode {config.method.context.mode} has no rule for stage {self.plan.stage}'s input of "
                f"shape {self.plan.input_shape}; expected (C, H, W), or (T, D) of a network that says how its tokens lie; "
                "move the cut, or set method.context.mode=none"
            )
        shapes = {field.name: field.shape for field in self.plan.receives.fields}
        return self._unit(
            "context", "adapter", lambda: Adapter(read, shapes, self.plan.input_shape, grid)
        )

    def _unit(self, owner: str, name: str, build: Callable[[], M]) -> M:
        """Build an auxiliary network or an adapter under a seed of its own."""
        if self._meta:
            with torch.device("meta"):
                return build()
        return seeds.build_seeded(self.seed, f"{owner}.{self.plan.stage}.{name}", build)

    def _modules(self) -> list[nn.Module]:
        return [
            module
            for module in (self.entry, self.adapter, self.blocks, self.objective)
            if module is not None
        ]

    # -- what the worker's loop says ------------------------------------------------------------------------------

    @property
    def _twice(self) -> bool:
        """Whether the stage differentiates a gradient: its own at what it receives."""
        return self._reconcile is not None and not self.plan.is_first

    @property
    def sends_gradient(self) -> bool:
        """Whether the next stage gets the gradient at the boundary beside the activation."""
        return self._reconcile is not None and not self.plan.is_last

    def forward(self, message: Message) -> Tensor:
        """Run the blocks on a message and return the raw output h, (B, *shape), with gradient in training."""
        training = message.header.kind is Kind.TRAIN
        self._set_mode(training)
        self.replicas.begin(message.header.whole)
        self._seed(message.header)
        return self._compute(message, training)

    def _seed(self, header: Header) -> None:
        """Begin this message's random stream; the first message of a step has the step's own."""
        later = [header.part] if header.part else []
        seeds.enter_stream(
            self.seed, "stage", self.plan.stage, self.replicas.index, header.step, *later
        )

    def _compute(self, message: Message, training: bool) -> Tensor:
        with torch.set_grad_enabled(training), self._arithmetic():
            h = self._through(self._formatted(self._input(message, training)), training).float()
        if training and self.sends_gradient and not h.requires_grad:
            h = h.detach().requires_grad_()  # blocks without parameters
        return h

    def _input(self, message: Message, training: bool) -> Tensor:
        """Return what the blocks see: the normalised image, or what was received, merged with its context.

        What is received is read-only. The blocks get a copy where the stage differentiates its input, or sends it on, since
        their first layer may write in place.
        """
        fields = message.fields
        x: Tensor = (
            self.entry(fields[IMAGE]) if self.plan.is_first else fields[self.plan.input].float()
        )
        self._leaf = None
        if training and self._twice:
            self._leaf = x.detach().requires_grad_()
            x = self._leaf.clone()
        if self.adapter is not None:
            read = {
                name: self.entry(fields[name]) if name == IMAGE else fields[name].float()
                for name in self.adapter.fields
            }
            x = self.adapter(x, read)
        sent = (
            not self.plan.is_first
            and self.plan.sends is not None
            and self.plan.sends.has(context_field(self.plan.stage - 1))
        )
        self._merged = x.detach() if sent else None
        return x.clone() if sent else x

    def _formatted(self, x: Tensor) -> Tensor:
        """Return images in the memory format of the stage's arithmetic; what crosses a boundary is always contiguous."""
        return x.contiguous(memory_format=self._format) if x.dim() == 4 else x

    def _through(self, x: Tensor, training: bool) -> Tensor:
        if not (training and self._checkpointing):
            h: Tensor = self.blocks(x)
            return h
        for block in self.blocks:
            x = run_recomputed(block, x)
        return x

    def outgoing(
        self, message: Message, h: Tensor, gradient: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """Return the tensors that the next stage gets, its own as they travel; the channel copies them."""
        own: dict[str, Tensor] = {f"h.{self.plan.stage}": h.detach()}
        if self._merged is not None:
            own[context_field(self.plan.stage - 1)] = self._merged
        if gradient is not None:
            own[f"grad.{self.plan.stage}"] = gradient
        return {**message.fields, **{name: tensor.to(self._wire) for name, tensor in own.items()}}

    def local_loss(self, message: Message, h: Tensor) -> Tensor:
        """Return the stage's own loss, a scalar."""
        with self._arithmetic():
            return self._loss(h, message.fields)

    def _loss(self, h: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = self.objective(h, fields)
        return loss

    def boundary_gradient(self, loss: Tensor, h: Tensor) -> Tensor:
        """Return the gradient of the local loss at the raw output, per sample, like h; only the head is gone through."""
        (gradient,) = torch.autograd.grad(self._scaled(loss), h, retain_graph=True)
        return self._unscaled(gradient) * len(h)

    def reconciled(self, loss: Tensor, message: Message) -> Tensor:
        """Return the local loss and, behind the first stage, the weighted distance to the sender's gradient."""
        if self._reconcile is None or self._leaf is None:
            return loss
        (mine,) = torch.autograd.grad(self._scaled(loss), self._leaf, create_graph=True)
        received = message.fields[f"grad.{self.plan.stage - 1}"]
        apart = gradient_distance(
            self._reconcile.distance, self._unscaled(mine) * len(mine), received
        )
        return loss + self._reconcile.weight * apart

    def update(self, loss: Tensor, message: Message, rate: float) -> None:
        """Back-propagate inside the stage; behind the last message of a step, take one step of its optimizer.

        Gradients of several messages, and of all replicas, add up to that of their samples' mean. With a loss scale,
        gradients that overflowed skip the update, and the step has been made all the same.
        """
        if self.optimizer is None:
            return
        header = message.header
        if header.part == 0:
            self._forget_gradients()
        self._scaled(loss if header.share == 1.0 else loss * header.share).backward()
        if header.ends_step:
            self.replicas.sum_gradients(self._trained)
            set_rate(self.optimizer, rate)
            self._step(self.optimizer)

    def _forget_gradients(self) -> None:
        for parameter in self._trained:
            parameter.grad = None

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._scaler is None:
            optimizer.step()
            return
        self._scaler.step(optimizer)
        self._scaler.update()

    def _scaled(self, loss: Tensor) -> Tensor:
        """Return a loss times the loss scale, a tensor of the device that is never waited for."""
        return loss if self._scaler is None else self._scaler.scale(loss)

    def _unscaled(self, gradient: Tensor) -> Tensor:
        return (
            gradient
            if self._scaler is None
            else gradient / self._scaler.scale(gradient.new_ones(()))
        )

    def _arithmetic(self) -> AbstractContextManager[object]:
        """The stage's precision (what leaves it and every loss is fp32), and attention that can be differentiated twice.

        The fused attention kernels have no double backward, which every reconciled stage but the first needs.
        """
        return self._plain_attention() if self._twice else self._autocast()

    @contextmanager
    def _plain_attention(self) -> Iterator[None]:
        with self._autocast(), sdpa_kernel(SDPBackend.MATH):
            yield

    def judge(self, message: Message, h: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the task's loss of the stage's own exit and how many samples it has right; None without an exit."""
        with torch.no_grad(), self._arithmetic():
            logits = self.objective.exit(h)
            if logits is None:
                return None
            target = message.fields["target"]
            return self.task.loss(logits, target), self.task.score(logits, target)

    def _set_mode(self, training: bool) -> None:
        if training != self._training:
            for module in self._modules():
                module.train(training)
            self._training = training

    # -- what the stage owns --------------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """Return every trained parameter, blocks first."""
        return [p for module in self._modules() for p in module.parameters() if p.requires_grad]

    def auxiliary(self) -> list[nn.Parameter]:
        """Return the parameters of training-only networks."""
        return [] if self.plan.is_last else list(self.objective.parameters())

    def weights(self) -> dict[str, Tensor]:
        """Return parameters and buffers under their names in the whole network.

        Auxiliary networks are named `aux.STAGE.`, adapters `context.STAGE.`.
        """
        named = {}
        for prefix, block in zip(self._prefixes, self.blocks, strict=True):
            named.update({prefix + name: value for name, value in block.state_dict().items()})
        # The tail's own names carry no `tail.`: OwnLoss is ours, the network is the user's.
        inner = self.objective.tail if isinstance(self.objective, TailLoss) else self.objective
        named.update(
            {self._objective_prefix + name: value for name, value in inner.state_dict().items()}
        )
        if self.adapter is not None:
            adapter = self.adapter.state_dict()
            named.update(
                {f"context.{self.plan.stage}.{name}": value for name, value in adapter.items()}
            )
        return named

    def check_finite(self) -> None:
        """Raise RunError naming the first weight that is not finite: a finite loss may have had a gradient that is not."""
        for name, tensor in self.weights().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise RunError(f"{name} is no longer finite; lower optim.lr, or look at the data")

    def state(self) -> dict[str, Any]:
        """Return weights and optimizer state, readable with weights_only."""
        return {
            "weights": self.weights(),
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "scaler": self._scaler.state_dict() if self._scaler else None,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned; raise RunError when it belongs to another stage."""
        self.load_weights(state["weights"])
        if self.optimizer is not None:
            load_optimizer_state(self.optimizer, state["optimizer"])
        if self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])

    def take_weights(self, weights: Mapping[str, Tensor]) -> set[str]:
        """Copy in what fits by name and shape; return the names taken."""
        own = self.weights()
        taken = {
            name
            for name, tensor in own.items()
            if name in weights and tensor.shape == weights[name].shape
        }
        if not self._meta:
            self.load_weights({**own, **{name: weights[name] for name in taken}})
        return taken

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights in; names and shapes must be this stage's own."""
        own = self.weights()
        if own.keys() != weights.keys():
            names = sorted(own.keys() ^ weights.keys())
            raise RunError(
                f"stage {self.plan.stage}: the checkpoint has other weights: {', '.join(names[:3])}"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                if tensor.shape != weights[name].shape:
                    raise RunError(
                        f"stage {self.plan.stage}: {name} is {tuple(weights[name].shape)} in the checkpoint, "
                        f"expected {tuple(tensor.shape)}"
                    )
                tensor.copy_(weights[name])

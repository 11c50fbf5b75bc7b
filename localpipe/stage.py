"""A stage: consecutive blocks, their local loss and their optimizer. The only place that knows what a boundary does.

What comes in is detached and read-only; what goes out is copied by the channel before the stage's own update.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from localpipe import optim, registry, seeds
from localpipe.blueprint import Blueprint
from localpipe.config import Config
from localpipe.errors import RunError
from localpipe.message import Kind, Message
from localpipe.objectives.objective import Objective, Site
from localpipe.partition import StagePlan


class Normalise(nn.Module):
    """uint8 images (B, C, H, W) to floats of the data set's mean 0 and deviation 1."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1) * 255, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return (image.float() - self.mean) / self.std


class OwnLoss(nn.Module):
    """The last stage's objective: the network's own head and the task's loss."""

    def __init__(self, tail: nn.Module, task: Any) -> None:
        super().__init__()
        self.tail, self.task = tail, task

    def forward(self, h: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = self.task.loss(self.tail(h), fields["target"])
        return loss

    def exit(self, h: Tensor) -> Tensor:
        logits: Tensor = self.tail(h)
        return logits


class Stage:
    """One gradient-isolated stage with everything it owns. `device` may be meta, for plans."""

    def __init__(
        self, plan: StagePlan, blueprint: Blueprint, config: Config, device: torch.device | str = "cpu"
    ) -> None:
        self.plan, self.task, self.seed = plan, blueprint.task, config.run.seed
        self._meta = torch.device(device).type == "meta"
        wanted = list(range(plan.first, plan.last + 1))
        own_tail = [len(blueprint.blocks)] if plan.is_last else []
        modules = (
            blueprint.build_meta(wanted + own_tail) if self._meta else blueprint.build(wanted + own_tail, self.seed)
        )
        self.blocks = nn.Sequential(*modules[: len(wanted)])
        self.objective: Objective = self._objective(blueprint, config, modules[len(wanted) :])
        self._prefixes = [blueprint.parts[i].prefix for i in wanted]
        self._objective_prefix = blueprint.tail.prefix if plan.is_last else f"aux.{plan.stage}."
        # Only the stage that reads images normalises them; a neighbour's output is what the next blocks expect.
        self.entry: nn.Module = nn.Identity()
        if plan.is_first and isinstance(config.data.mean, tuple) and isinstance(config.data.std, tuple):
            self.entry = Normalise(config.data.mean, config.data.std)
        for module in self._modules():
            module.to(device)
        self.optimizer = optim.build(config.optim, self.parameters())
        self._training = True

    def _objective(self, blueprint: Blueprint, config: Config, tail: list[nn.Module]) -> Any:
        if self.plan.is_last:
            return OwnLoss(tail[0], blueprint.task)
        options = dict(config.method.objective)
        cls = registry.look_up(registry.OBJECTIVES, options.pop("name"), "config: method.objective.name")
        plan = self.plan

        def unit(name: str, build: Any) -> Any:
            if self._meta:
                with torch.device("meta"):
                    return build()
            return seeds.built(self.seed, f"aux.{plan.stage}.{name}", build)

        return cls(cls.Options(**options), Site(plan.stage, plan.stages, plan.last, plan.output_shape, blueprint, unit))

    def _modules(self) -> list[nn.Module]:
        assert isinstance(self.objective, nn.Module)
        return [self.entry, self.blocks, self.objective]

    # -- what the worker's loop says ------------------------------------------------------------------------------

    def forward(self, message: Message) -> Tensor:
        """Run the blocks on a message and return the raw output h, (B, *shape), with gradient in training."""
        training = message.header.kind is Kind.TRAIN
        self._set_mode(training)
        seeds.enter(self.seed, "stage", self.plan.stage, 0, message.header.step)
        with torch.set_grad_enabled(training):
            h: Tensor = self.blocks(self.entry(message.fields[self.plan.input]))
        return h

    def outgoing(self, message: Message, h: Tensor) -> Mapping[str, Tensor]:
        """Return the tensors that the next stage gets; the channel copies them, so the stage may go on."""
        return {**message.fields, f"h.{self.plan.stage}": h.detach()}

    def local_loss(self, message: Message, h: Tensor) -> Tensor:
        """Return the stage's own loss, a scalar."""
        return self.objective(h, message.fields)

    def update(self, loss: Tensor, rate: float) -> None:
        """Back-propagate inside the stage and take one step of its optimizer."""
        if self.optimizer is None:
            return
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def judge(self, message: Message, h: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return the task's loss of the stage's own exit and how many samples it has right; None without an exit."""
        with torch.no_grad():
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
        assert isinstance(self.objective, nn.Module)
        return [] if self.plan.is_last else list(self.objective.parameters())

    def weights(self) -> dict[str, Tensor]:
        """Return parameters and buffers under their names in the whole network; auxiliary ones under `aux.STAGE.`."""
        assert isinstance(self.objective, nn.Module)
        named = {}
        for prefix, block in zip(self._prefixes, self.blocks, strict=True):
            named.update({prefix + name: value for name, value in block.state_dict().items()})
        # The tail's own names carry no `tail.`: OwnLoss is ours, the network is the user's.
        inner = self.objective.tail if isinstance(self.objective, OwnLoss) else self.objective
        named.update({self._objective_prefix + name: value for name, value in inner.state_dict().items()})
        return named

    def state(self) -> dict[str, Any]:
        """Return weights and optimizer state, readable with weights_only."""
        return {"weights": self.weights(), "optimizer": self.optimizer.state_dict() if self.optimizer else None}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned; raise RunError when it belongs to another stage."""
        self.load_weights(state["weights"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights in; names and shapes must be this stage's own."""
        own = self.weights()
        if own.keys() != weights.keys():
            names = sorted(own.keys() ^ weights.keys())
            raise RunError(f"stage {self.plan.stage}: the checkpoint has other weights: {', '.join(names[:3])}")
        with torch.no_grad():
            for name, tensor in own.items():
                if tensor.shape != weights[name].shape:
                    raise RunError(
                        f"stage {self.plan.stage}: {name} is {tuple(weights[name].shape)} in the checkpoint, "
                        f"expected {tuple(tensor.shape)}"
                    )
                tensor.copy_(weights[name])

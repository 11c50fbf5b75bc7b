"""A trained network as one nn.Module, for use: the stages' blocks and adapters in a row, and a classifier behind them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from localpipe.config.load import parse_resolved, to_dict
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.networks.blueprint import Blueprint
from localpipe.pipeline.stages.probe import Probe
from localpipe.pipeline.stages.stage import Stage, TailLoss
from localpipe.pipeline.stages.stage_plan import IMAGE, build_plans, context_field


@dataclass(frozen=True)
class Description:
    """What a network is built from: sections of a configuration, and the stage that it ends with, None for the last one.

    `probe` says that the stage's linear probe is the classifier.
    """

    config: dict[str, Any]
    exit: int | None = None
    probe: bool = False

    def to_json(self, **facts: Any) -> str:
        """Return it as JSON, with facts that nothing is built from."""
        return json.dumps({"schema": 1, **asdict(self), **facts})

    @staticmethod
    def from_json(text: str) -> Description:
        """Return what `to_json` wrote; raise ValueError or KeyError where it is something else."""
        read = json.loads(text)
        return Description(read["config"], read["exit"], read["probe"])

    @property
    def is_plain(self) -> bool:
        """Whether the network is the plain one: no adapter, no exit of a stage."""
        return self.exit is None and self.config["method"]["context"]["mode"] == "none"


def describe_network(config: Resolved, exit_stage: int | None) -> Description:
    """Return the description of a run's network, whole or up to a stage: no path, and no code that it does not need."""
    whole = to_dict(config)
    method = {"context": whole["method"]["context"], "objective": {"name": "greedy"}}
    pipeline = {key: whole["pipeline"][key] for key in ("stages", "cuts")}
    if exit_stage is not None and exit_stage == pipeline["stages"] - 1:
        exit_stage = None
    if exit_stage is not None:
        method["objective"] = whole["method"]["objective"]
    elif config.method.context.mode == "none":
        pipeline = {"stages": 1, "cuts": "equal"}  # cuts leave no trace in the plain network
    data = {key: whole["data"][key] for key in ("name", "mean", "std", "image_size")}
    return Description(
        {"model": whole["model"], "method": method, "pipeline": pipeline, "data": data}, exit_stage
    )


class Network(nn.Module):
    """Classifies (B, C, H, W) images: uint8 as they are stored, or floats that are normalised already; (B, classes) logits.

    Its state_dict has the names of the plain network; adapters are `context.STAGE.`, a stage's own classifier is `exit.`.
    """

    def __init__(
        self, blueprint: Blueprint, stages: Sequence[Stage], classifier: nn.Module
    ) -> None:
        super().__init__()
        self.entry = stages[0].entry
        self.parts = nn.ModuleList(stage.blocks for stage in stages)
        adapters = {
            str(stage.plan.stage): stage.adapter for stage in stages if stage.adapter is not None
        }
        self.adapters = nn.ModuleDict(adapters)
        self.classifier = classifier
        read = {name for adapter in adapters.values() for name in adapter.fields}
        self._kept = [
            name for name in (IMAGE, *map(context_field, range(len(stages) - 1))) if name in read
        ]
        self._names = _names(blueprint, stages, classifier)
        self.register_state_dict_post_hook(_to_plain)
        self.register_load_state_dict_pre_hook(_from_plain)
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits."""
        h: Tensor = self.entry(image) if image.dtype == torch.uint8 else image
        kept = {IMAGE: h}
        for stage, part in enumerate(self.parts):
            if str(stage) in self.adapters:
                h = self.adapters[str(stage)](h, kept)
            name = context_field(stage - 1) if stage else IMAGE
            if name in self._kept:
                kept[name] = h
                h = h.clone()  # blocks may write in place
            h = part(h)
        logits: Tensor = self.classifier(h)
        return logits


def build_exported(description: Description, source: str) -> Network:
    """Return the network of a description with initial weights; `source` is named in errors.

    Raises UserError where the stage that it ends with has no classifier that was trained.
    """
    config = parse_resolved(description.config, source)
    blueprint, plans = build_plans(config)
    last = len(plans) - 1 if description.exit is None else description.exit
    stages = [Stage(plan, blueprint, config) for plan in plans[: last + 1]]
    return Network(blueprint, stages, _classifier(stages[-1], config, description.probe))


def has_exit(config: Resolved, index: int) -> bool:
    """Return whether a stage of a resolved configuration has a classifier of its own that is trained."""
    blueprint, plans = build_plans(config)
    return _tried(Stage(plans[index], blueprint, config)) is not None


def _names(blueprint: Blueprint, stages: Sequence[Stage], classifier: nn.Module) -> dict[str, str]:
    """Return the beginnings of names inside a Network, and what they are in the plain network."""
    names = {}
    for stage in stages:
        plan = stage.plan
        for place, index in enumerate(range(plan.first, plan.last + 1)):
            names[f"parts.{plan.stage}.{place}."] = blueprint.blocks[index].prefix
        if stage.adapter is not None:
            names[f"adapters.{plan.stage}."] = f"context.{plan.stage}."
    inner = isinstance(classifier, _Exit)
    names["classifier.network." if inner else "classifier."] = (
        "exit." if inner else blueprint.tail.prefix
    )
    return names


def _to_plain(
    network: Network, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]
) -> None:
    own = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
    for key, value in own.items():
        name = key.removeprefix(prefix)
        inner = next(inner for inner in network._names if name.startswith(inner))
        state[prefix + network._names[inner] + name.removeprefix(inner)] = value


def _from_plain(network: Network, state: dict[str, Any], prefix: str, *_: Any) -> None:
    inside = {
        f"{prefix}{inner}{name}": f"{prefix}{plain}{name}"
        for inner, plain in network._names.items()
        for name in network.get_submodule(inner[:-1]).state_dict()
    }
    found = {inner: state.pop(plain) for inner, plain in inside.items() if plain in state}
    state.update(found)


class _Exit(nn.Module):
    """A stage's own classifier as a module of its own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


class _OwnExit(_Exit):
    """Without the auxiliary networks that only the stage's loss needs."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage.objective)
        for name in _idle(stage):
            setattr(stage.objective, name, None)

    def forward(self, h: Tensor) -> Tensor:
        logits: Tensor = self.network.exit(h)  # type: ignore[operator]
        return logits


class _ProbeExit(_Exit):
    """The linear probe."""

    def __init__(self, probe: Probe) -> None:
        super().__init__(probe.network)
        self._task = probe.task

    def forward(self, h: Tensor) -> Tensor:
        logits: Tensor = self.network(self._task.pool(h.float()))
        return logits


def _classifier(stage: Stage, config: Resolved, by_probe: bool) -> nn.Module:
    objective, plan = stage.objective, stage.plan
    if isinstance(objective, TailLoss):
        return objective.tail
    if by_probe:
        return _ProbeExit(Probe(plan.output_shape, stage.task, config.run.seed, plan.stage))
    if _tried(stage) is None:
        raise UserError(
            f"export: stage {plan.stage} has no exit of its own that was trained; train with run.probe=linear, and its "
            "probe is the exit"
        )
    return _OwnExit(stage)


def _tried(stage: Stage) -> Tensor | None:
    stage.objective.eval()
    with torch.no_grad():
        return stage.objective.exit(torch.zeros(2, *stage.plan.output_shape))


def _idle(stage: Stage) -> list[str]:
    """Return the names of the auxiliary networks that the exit does not call."""
    called: set[str] = set()
    children = dict(stage.objective.named_children())
    hooks = [
        child.register_forward_pre_hook(_noting(called, name)) for name, child in children.items()
    ]
    _tried(stage)
    for hook in hooks:
        hook.remove()
    return [name for name in children if name not in called]


def _noting(called: set[str], name: str) -> Any:
    return lambda *_: called.add(name)

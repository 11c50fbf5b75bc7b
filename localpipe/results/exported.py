"""A trained network as one nn.Module, for use.

The stages' blocks and adapters follow each other, and a classifier comes last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from localpipe import seeds
from localpipe.config.keys import Data
from localpipe.config.load import parse, to_dict
from localpipe.config.resolve import DataFacts, Facts, MachineFacts, resolve
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.methods.feedback import find_own_loss
from localpipe.networks.architecture import build_empty
from localpipe.networks.blueprint import BlockOutput, Blueprint
from localpipe.pipeline.stages.blocks import split_activation
from localpipe.pipeline.stages.probe import Probe
from localpipe.pipeline.stages.stage import Stage, TailLoss
from localpipe.pipeline.stages.stage_plan import build_blueprint, build_plans, context_field
from localpipe.tasks.layout import arrange
from localpipe.tasks.task import read_exit

# The keys of `data` that a network needs.
_DATA_KEYS: tuple[str, ...] = ("name", "classes", "shape", "dtype", "mean", "std", "image_size")
# The keys of `model` that only a training run needs: a file has its own weights.
_TRAINING_KEYS = ("weights", "weights_sha256", "download", "freeze")


@dataclass(frozen=True)
class Description:
    """What a network is built from: sections of a configuration, and the stage that it ends with.

    config: {section: {key: value}} as `describe_network` selects it. exit: None for the last stage.
    probe: whether the stage's linear probe is the classifier.
    """

    config: dict[str, Any]
    exit: int | None = None
    probe: bool = False

    def to_json(self, **facts: Any) -> str:
        """Return it as JSON with keys `schema`, `config`, `exit`, `probe`, and those of `facts`.

        Nothing is built from the facts. Raises TypeError if JSON cannot hold one.
        """
        return json.dumps({"schema": 1, **asdict(self), **facts})

    @staticmethod
    def from_json(text: str) -> Description:
        """Return what `to_json` wrote, without its facts.

        Raises ValueError for text that is not JSON, KeyError for a missing key, TypeError for JSON
        that is no mapping. The sections are not checked.
        """
        values = json.loads(text)
        return Description(values["config"], values["exit"], values["probe"])

    @property
    def is_plain(self) -> bool:
        """Whether the network is the plain one: no adapter, no exit of a stage."""
        return self.exit is None and self.config["method"]["context"]["mode"] == "none"


def describe_network(config: Resolved, exit_stage: int | None) -> Description:
    """Return the description of a run's network, whole or up to a stage.

    exit_stage: None or the last stage for the whole network. Other numbers are not checked. The
    description holds no path, and names no code that the network does not need. `probe` is False.
    """
    if exit_stage == config.stages - 1:
        exit_stage = None
    sections = to_dict(config)
    model = {key: value for key, value in sections["model"].items() if key not in _TRAINING_KEYS}
    pipeline = {key: sections["pipeline"][key] for key in ("stages", "cuts")}
    data_keys = _DATA_KEYS
    if config.only_waits:
        data_keys += ("batch_size",)  # a message has a fixed size, so a sample of it has not
    if config.evaluation_sample is not None:
        data_keys += ("evaluation_size",)
    objective, feedback = {"name": "greedy"}, {}
    if exit_stage is not None:
        objective = sections["method"]["objective"]
        if config.feeds_back:
            feedback = {"feedback": sections["method"]["feedback"]}
    elif config.method.context.mode == "none":
        pipeline = {"stages": 1, "cuts": "equal"}  # cuts leave no trace in the plain network
    described = {
        "model": model,
        "method": {"context": sections["method"]["context"], "objective": objective, **feedback},
        "pipeline": pipeline,
        "data": {key: sections["data"][key] for key in data_keys},
    }
    if config.task.name != "classification":
        described["task"] = sections["task"]
    return Description(described, exit_stage)


class Network(nn.Module):
    """Takes (B, C, H, W) images: uint8 as they are stored, or floats that are normalised.

    Other inputs are taken as they are, (B, *sample).

    stages: consecutive ones from the first. classifier: gets the last stage's output and returns
    logits. classes: the names of their classes, or None. sample: the shape of an input. Modules are
    used as they are, not copied, and set to evaluation mode. Its state_dict has the names of the
    plain network. Adapters are `context.STAGE.`, a stage's own classifier is `exit.`. Where images
    of an evaluation have another size than in training, `sample` has that size.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        stages: Sequence[Stage],
        classifier: nn.Module,
        classes: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        self.classes = classes
        self.sample = blueprint.evaluation_sample or blueprint.sample
        self.entry = stages[0].entry
        self.parts = nn.ModuleList(stage.blocks for stage in stages)
        adapters = {}
        for stage in stages:
            if stage.adapter is not None:
                adapters[str(stage.plan.stage)] = stage.adapter
        self.adapters = nn.ModuleDict(adapters)
        self._inputs = [stage.plan.takes for stage in stages]
        self._first_field = blueprint.inputs.name
        self.classifier = classifier
        self._sources = {name for adapter in adapters.values() for name in adapter.fields}
        self._names = _map_plain_names(blueprint, stages, classifier)
        self._build_original = blueprint.build_original
        self.register_state_dict_post_hook(_rename_to_plain)
        self.register_load_state_dict_pre_hook(_rename_from_plain)
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        """Return the outputs, as (B, classes), of images (B, C, H, W) or other inputs.

        uint8 images are normalised here. Images of every other dtype are taken as normalised.
        """
        h: Tensor = self.entry(image) if image.dtype == torch.uint8 else image
        companions: tuple[Tensor, ...] = ()
        context = {self._first_field: h}
        for stage, part in enumerate(self.parts):
            takes = self._inputs[stage]
            if str(stage) in self.adapters:
                h = takes.from_standard(self.adapters[str(stage)](takes.to_standard(h), context))
            # A later adapter reads this input, which the blocks may write into.
            name = context_field(stage - 1) if stage else self._first_field
            if name in self._sources:
                context[name] = h if takes.is_plain else takes.to_standard(h).contiguous()
                h = h.clone()
            h, companions = split_activation(part(h, *companions))
        outputs: Tensor = self.classifier(h, *companions)
        return outputs

    def read_versions(self) -> dict[str, dict[str, Any]]:
        """Return the metadata of the state_dict of the network's own class, by names of modules.

        Some classes load a state_dict by the version in it. It is empty for a shipped network.
        """
        if self._build_original is None:
            return {}
        original = build_empty("the network", self._build_original)
        metadata: Mapping[str, Any] = original.state_dict()._metadata  # type: ignore[attr-defined]
        return {name: dict(values) for name, values in metadata.items()}


def build_exported(description: Description, source: str) -> Network:
    """Return the network of a description with initial weights, on the CPU, in evaluation mode.

    source: named in errors. Raises UserError where the description is wrong, where a user's code
    cannot be imported, or where the last stage has no trained classifier. It imports code that the
    description names.
    """
    config = _resolve(description, source)
    blueprint, plans = build_plans(config)
    if description.exit is not None:
        if description.exit not in range(len(plans)):
            raise UserError(
                f"load: {source} ends with stage {description.exit}, expected one of "
                f"0..{len(plans) - 1}; export it again"
            )
        plans = plans[: description.exit + 1]
    stages = [Stage(plan, blueprint, config) for plan in plans]
    classifier = _build_classifier(stages[-1], config, description.probe)
    return Network(blueprint, stages, classifier, config.data.classes)


def build_original(description: Description, source: str) -> nn.Module:
    """Return the network of a description as the user's or library's own class, in evaluation mode.

    source: named in errors. It has initial weights. Raises UserError as `build_exported`, for a
    network with adapters or a stage's exit, and for a shipped network, which has no other class.
    """
    if not description.is_plain:
        raise UserError(
            f"load: {source} holds more than the original network, "
            "a context or a stage's exit; expected the plain network; leave original=True out"
        )
    blueprint = build_blueprint(_resolve(description, source))
    if blueprint.build_original is None:
        raise UserError(
            f"load: {blueprint.name} of {source} is localpipe's own network, and has no other "
            "class; leave original=True out"
        )
    return seeds.build_unit(0, "network", blueprint.build_original).eval()


def _resolve(description: Description, source: str) -> Resolved:
    """Return the configuration of a description, which leaves out what a network does not need."""
    config = parse(description.config, source)
    values, classes = config.data, config.model.num_classes
    sample = _find_sample(values)
    if sample is None or values.mean == "auto" or values.std == "auto" or classes == "auto":
        raise UserError(f"load: {source} lacks what its network takes; export it again")
    facts = DataFacts(
        sample,
        classes,
        values.mean,
        values.std,
        augment="none",
        classes=_list_class_names(values.classes),
        dtype=None if values.dtype == "auto" else values.dtype,
        task="classification",  # that of a file that names no other
        evaluation_sample=_find_evaluation_sample(values),
    )
    return resolve(config, Facts(facts, MachineFacts(cores=1)))


def _find_sample(data: Data) -> tuple[int, ...] | None:
    """Return the shape of an input per sample, None where the keys do not say it."""
    if isinstance(data.shape, tuple):
        return data.shape
    size = data.image_size
    if size is None or size == "auto":
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return len(data.mean), height, width


def _find_evaluation_sample(data: Data) -> tuple[int, ...] | None:
    """Return the shape of an image in an evaluation, None where it is that in training."""
    size = data.evaluation_size
    if size is None or size == "auto":
        return None
    return len(data.mean), *size


def _list_class_names(classes: tuple[str, ...] | str | None) -> tuple[str, ...] | None:
    """Return the names of the classes, None for a file of a version that did not write them."""
    if isinstance(classes, str):
        return None
    return classes


def has_exit(config: Resolved, index: int) -> bool:
    """Return whether a stage has a classifier of its own that is trained.

    The last stage has one. A linear probe does not count. It builds the stage. Raises IndexError
    for an `index` beyond the last stage, and UserError if the stage cannot be built.
    """
    blueprint, plans = build_plans(config)
    stage = Stage(plans[index], blueprint, config)
    return isinstance(stage.objective, TailLoss) or _run_exit(stage) is not None


def _map_plain_names(
    blueprint: Blueprint, stages: Sequence[Stage], classifier: nn.Module
) -> dict[str, str]:
    """Return the prefixes of names inside a Network, and what they are in the plain network."""
    names = {}
    for stage in stages:
        plan = stage.plan
        for position, index in enumerate(range(plan.first, plan.last + 1)):
            names[f"parts.{plan.stage}.{position}."] = blueprint.blocks[index].prefix
        if stage.adapter is not None:
            names[f"adapters.{plan.stage}."] = f"context.{plan.stage}."
    if isinstance(classifier, _Exit):
        names["classifier.network."] = "exit."
    else:
        names["classifier."] = blueprint.tail.prefix
    return names


def _rename_to_plain(
    network: Network, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]
) -> None:
    """Rename the entries of a state_dict, in their order, to those of the plain network."""
    for key in [key for key in state if key.startswith(prefix)]:
        value = state.pop(key)
        name = key.removeprefix(prefix)
        inner = next(inner for inner in network._names if name.startswith(inner))
        state[prefix + network._names[inner] + name.removeprefix(inner)] = value


def _rename_from_plain(network: Network, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename the entries of the plain network's state_dict to the names inside a Network."""
    renamed = {}
    for inner, plain in network._names.items():
        for name in network.get_submodule(inner[:-1]).state_dict():
            key = f"{prefix}{plain}{name}"
            if key in state:
                renamed[f"{prefix}{inner}{name}"] = state.pop(key)
    state.update(renamed)


class _Exit(nn.Module):
    """A stage's own classifier as a module of its own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


class _ObjectiveExit(_Exit):
    """The exit of a local loss, without the auxiliary networks that only the loss needs."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage.objective)
        self._gives = stage.plan.gives
        for name in _find_unused_networks(stage):
            setattr(find_own_loss(stage.objective), name, None)

    def forward(self, h: Tensor, *companions: Tensor) -> Tensor:
        logits: Tensor = self.network.exit(self._gives.to_standard(h))  # type: ignore[operator]
        return logits


class _ProbeExit(_Exit):
    """The linear probe."""

    def __init__(self, probe: Probe, gives: BlockOutput) -> None:
        super().__init__(probe.network)
        self._task = probe.task.in_mode(is_training=False)
        self._gives = gives

    def forward(self, h: Tensor, *companions: Tensor) -> Tensor:
        return read_exit(self._task, self.network, self._gives.to_standard(h).float())


def _build_classifier(stage: Stage, config: Resolved, by_probe: bool) -> nn.Module:
    """Return the module that gives the logits after a stage: the head, the exit, or the probe."""
    objective, plan = stage.objective, stage.plan
    if isinstance(objective, TailLoss):
        return objective.tail
    if by_probe:
        shape = plan.gives.standard_shape
        return _ProbeExit(Probe(shape, stage.task, config.run.seed, plan.stage), plan.gives)
    if _run_exit(stage) is None:
        raise UserError(
            f"export: stage {plan.stage} has no exit of its own that was trained; "
            "a new run with run.probe=linear has a probe as its exit"
        )
    return _ObjectiveExit(stage)


def _run_exit(stage: Stage) -> Tensor | None:
    """Return the logits of a local stage's exit on zeros, None where it has no exit."""
    stage.objective.eval()
    gives = stage.plan.gives
    h = gives.to_standard(arrange(torch.zeros(2, *gives.shape), gives.order))
    with torch.no_grad():
        return stage.objective.exit(h)


def _find_unused_networks(stage: Stage) -> list[str]:
    """Return the names of the auxiliary networks that the exit does not call."""
    called: set[str] = set()

    def note(name: str, *_: Any) -> None:
        called.add(name)

    children = dict(find_own_loss(stage.objective).named_children())
    hooks = []
    for name, child in children.items():
        hooks.append(child.register_forward_pre_hook(partial(note, name)))
    _run_exit(stage)
    for hook in hooks:
        hook.remove()
    return [name for name in children if name not in called]

"""Resolves a configuration for a data set on this machine, measured cuts included."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from localpipe import data
from localpipe.config.keys import MEASURED, Config
from localpipe.config.load import update
from localpipe.config.resolve import Facts, resolve, take_weights_facts
from localpipe.config.resolved import Resolved
from localpipe.data.dataset import Dataset, check_labels, limit_classes
from localpipe.data.images import Split
from localpipe.data.transforms.mixtures import one_hot
from localpipe.errors import UserError
from localpipe.fields import Field
from localpipe.networks.weights.pretrained import Pretrained
from localpipe.pipeline.stages.stage_plan import build_blueprint, build_plans
from localpipe.pipeline.workers.device import (
    check_devices,
    check_listed_devices,
    read_machine_facts,
)
from localpipe.plan.balanced_cuts import check_budgets, decide_cuts
from localpipe.plan.memory import fit_replay
from localpipe.plan.profile import Profile
from localpipe.tasks.build_task import build_task

_MAX_CHECKED = 256  # targets, at most


def load_data(
    config: Config,
    pretrained: Pretrained | None,
    check: Collection[str] = (),
    left_out: Sequence[str] | None = None,
) -> tuple[Config, Dataset]:
    """Return the configuration with what its weights decide, and its data set.

    pretrained: the weights of the configuration, None without them. Their statistics and image
    size stand for `auto`, before the data's own. check, left_out: as of `data.load`, whose errors
    are raised.
    """
    statistics = None
    if pretrained is not None:
        config = take_weights_facts(config, pretrained.facts)
        statistics = pretrained.facts.statistics
    return config, data.load(config.data, config.run.seed, check, left_out, statistics)


def resolve_here(
    config: Config, dataset: Dataset, world: int | None = None, profile: Profile | None = None
) -> Resolved:
    """Return the configuration with every `auto` decided and measured cuts made explicit.

    `world` is torchrun's number of workers, None without torchrun. `cuts: time` is decided from the
    profile, which is measured here where none is given. Other cuts ignore it. `config` stays
    unchanged.

    Raises UserError where a label has no output or is none of the task, where the machine lacks
    what is asked for, or measured cuts have too few blocks. Raises RunError if the measuring fails.
    """
    # Check what the data say, and decide every `auto`.
    config = number_cuts(config, dataset, world)
    facts = Facts(dataset.facts, read_machine_facts(world))
    classes = config.model.num_classes
    check_labels(dataset, dataset.num_classes if classes == "auto" else classes)
    resolved = resolve(config, facts)
    _check_targets(dataset, resolved)

    # The workers of another launcher may see other devices than this process.
    local = resolved.pipeline.processes if world is None else None
    check_devices(resolved.run.device, resolved.pipeline.backend, local)
    if resolved.pipeline.devices is not None and world is None:
        check_listed_devices(resolved.pipeline.devices, resolved.pipeline.backend)

    if resolved.pipeline.cuts in MEASURED:
        # The published weights of a local loss go with a cut, so all is decided again for it.
        cuts = decide_cuts(resolved, profile)
        pipeline = config.pipeline.model_copy(update={"cuts": cuts, "stages": resolved.stages})
        resolved = resolve(config.model_copy(update={"pipeline": pipeline}), facts)
    if resolved.recovers and not isinstance(config.pipeline.replay, int):
        resolved = _with_replay(resolved)
    check_budgets(resolved, config.pipeline.cuts == "memory")
    return resolved


def _with_replay(resolved: Resolved) -> Resolved:
    """Return the configuration with `pipeline.replay` by the size of its largest message."""
    _, plans = build_plans(resolved)
    sizes = [plan.sends.nbytes for plan in plans if plan.sends is not None]
    replay = fit_replay(resolved, max(sizes, default=1))
    pipeline = resolved.pipeline.model_copy(update={"replay": replay})
    return resolved.model_copy(update={"pipeline": pipeline})


def number_cuts(config: Config, dataset: Dataset, world: int | None = None) -> Config:
    """Return the configuration with the indices of blocks in place of names in `pipeline.cuts`.

    Without names it is returned as it is. Raises UserError for a name that no block has, and where
    the network cannot be built.
    """
    cuts = config.pipeline.cuts
    if not isinstance(cuts, tuple) or not any(isinstance(cut, str) for cut in cuts):
        return config
    equal = update(config, {"pipeline.cuts": "equal", "pipeline.stages": len(cuts) + 1})
    blueprint = build_blueprint(resolve(equal, Facts(dataset.facts, read_machine_facts(world))))
    indices = blueprint.find_cuts([str(cut) for cut in cuts])
    return update(config, {"pipeline.cuts": list(indices)})


def _check_targets(dataset: Dataset, config: Resolved) -> None:
    """Raise UserError where the first training targets are none of the configuration's task.

    The values of what loader processes read are not looked at here.
    """
    task = build_task(config.task, config.model.num_classes, config.sample)
    inputs = dataset.inputs
    if inputs is not None and inputs.target is not None:
        _check_target_field(config, inputs.target, task.target)
        if inputs.ignored is not None:
            task.check_target(torch.tensor([inputs.ignored]))
        return
    if len(dataset.train) == 0:
        return
    targets = _read_targets(limit_classes(dataset, config.task, config.model.num_classes))
    field = Field("target", targets.shape[1:], str(targets.dtype))
    _check_target_field(config, field, task.target)
    task.check_target(torch.from_numpy(targets))


def _read_targets(dataset: Dataset) -> NDArray[Any]:
    """Return the first targets of training."""
    if isinstance(dataset.train, Split):
        labels = dataset.train.labels[:_MAX_CHECKED]
        if dataset.soft_classes is None:
            return labels
        return one_hot(labels, dataset.soft_classes)
    return dataset.train.read(np.arange(min(len(dataset.train), _MAX_CHECKED)))["target"]


def _check_target_field(config: Resolved, field: Field, expected: Field) -> None:
    """Raise UserError unless targets are what a task takes. Integers of any dtype are alike."""
    are_integers = all("int" in item.dtype for item in (field, expected))
    if field.shape == expected.shape and (field.dtype == expected.dtype or are_integers):
        return
    raise UserError(
        f"data: the targets of {config.data.name} are {field.dtype} of shape {field.shape} a "
        f"sample, but task {config.task.name} takes {expected.dtype} of shape {expected.shape}; "
        "set task.name=auto, task.targets=auto and model.num_classes=auto, or choose another "
        "data.name"
    )

"""Notes on a configuration that its table does not show."""

from __future__ import annotations

import typing
from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from localpipe.config.load import update
from localpipe.config.options import call_objective
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError, describe_names
from localpipe.networks.blueprint import Blueprint
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import StagePlan
from localpipe.pipeline.workers.feedback import lag_without_waits, list_pairs
from localpipe.pipeline.workers.trial import find_untrained
from localpipe.plan.costs import StageCost


def plan_notes(config: Resolved) -> list[str]:
    """Return lines on keys that change nothing, or that do something a user may not expect.

    They are about neighbours of a single stage, about frozen blocks without weights, about a lag
    for which stages may wait, and about an objective that compares samples under
    `optim.accumulate`. The list is empty where there is
    nothing to note.
    """
    notes = []
    unused = _axes_without_neighbour(config)
    if unused:
        verb = "change" if len(unused) > 1 else "changes"
        notes.append(f"note: one stage has no neighbour; {' and '.join(unused)} {verb} nothing")
    model = config.model
    if model.freeze and model.weights is None and config.run.init_from is None:
        notes.append(
            "note: model.freeze keeps blocks as they are initialised; set model.weights or "
            "run.init_from to begin with trained ones"
        )
    notes += _late_notes(config)
    if config.stages > 1 and config.optim.accumulate > 1 and _compares_samples(config):
        batch = config.data.batch_size
        notes.append(
            f"note: {config.method.objective['name']} compares samples with each other, and sees "
            f"the {batch // config.optim.accumulate} of one message, not the {batch} of an update"
        )
    return notes


def recorded_notes(config: Resolved, blueprint: Blueprint) -> list[str]:
    """Return lines on what the recording of a network has found, and on copies of its blocks.

    The list is empty for a network that is not recorded.
    """
    notes = [*blueprint.notes]
    name = config.method.objective["name"]
    if blueprint.recorded_outputs and name == "auglocal" and config.stages > 1:
        notes.append(
            f"note: {name} copies later blocks at their own width, with an adapter where shapes "
            "differ; the published rule rebuilds them, which only shipped networks say how to do"
        )
    return notes


def untrained_notes(stages: Sequence[Stage]) -> list[str]:
    """Return a line for every stage with parameters that no local loss reaches.

    stages: on the meta device. They may run a training step.
    """
    notes = []
    for stage in stages:
        names = find_untrained(stage)
        if names:
            notes.append(
                f"note: no local loss reaches {describe_names(names)} of stage "
                f"{stage.plan.stage}; they stay as they were initialised"
            )
    return notes


def statistics_notes(config: Resolved, stages: Sequence[Stage]) -> list[str]:
    """Return a line on running statistics of batch normalisation under `optim.accumulate`.

    stages: of `config`. The list is empty where no stage has such statistics that move.
    """
    messages = config.optim.accumulate
    if messages == 1 or not any(_has_moving_statistics(stage) for stage in stages):
        return []
    return [
        "note: batch normalisation sees one message, and its running statistics move once a "
        f"message, {messages} times an update"
    ]


def _has_moving_statistics(stage: Stage) -> bool:
    modules: list[nn.Module] = [stage.objective]
    if stage.adapter is not None:
        modules.append(stage.adapter)
    for position, block in enumerate(stage.blocks):
        if position not in stage.frozen:
            modules.append(block)
    layers = [layer for module in modules for layer in module.modules()]
    return any(isinstance(layer, _BatchNorm) and layer.track_running_stats for layer in layers)


def auxiliary_notes(
    config: Resolved,
    blueprint: Blueprint,
    plans: Sequence[StagePlan],
    costs: Sequence[StageCost],
) -> list[str]:
    """Return a line where a stage's auxiliary networks have more parameters than the network.

    It names the next smaller head. The list is empty where there is nothing to note. plans, costs:
    of all stages.
    """
    params = sum(cost.params for cost in costs)
    larger = [index for index, cost in enumerate(costs) if cost.aux_params > params]
    if not larger:
        return []
    index = max(larger, key=lambda index: costs[index].aux_params)
    count = costs[index].aux_params
    text = (
        f"note: the auxiliary network of stage {index} has {count:,} parameters, more than the "
        f"whole network's {params:,}"
    )
    if len(larger) > 1:
        text += f", as at {len(larger) - 1} more stages"
    smaller = _find_smaller_head(config, blueprint, plans[index], count)
    if smaller is not None:
        text += f"; {smaller[0]} has {smaller[1]:,}"
    return [text]


def _find_smaller_head(
    config: Resolved, blueprint: Blueprint, plan: StagePlan, count: int
) -> tuple[str, int] | None:
    """Return the setting with the most parameters below `count`, and their number, or None.

    It is a head of the same objective, else the objective greedy.
    """
    name = config.method.objective["name"]
    heads = []
    for head in _list_heads(config):
        values = {**config.method.objective, "head": head}
        params = _count_auxiliary(update(config, {"method.objective": values}), blueprint, plan)
        if params is not None and params < count:
            heads.append((params, f"method.objective.head={head}"))
    if not heads and name != "greedy":
        greedy = update(config, {"method.objective": {"name": "greedy"}})
        params = _count_auxiliary(greedy, blueprint, plan)
        if params is not None and params < count:
            heads.append((params, "method.objective.name=greedy"))
    if not heads:
        return None
    params, setting = max(heads)
    return setting, params


def _list_heads(config: Resolved) -> tuple[str, ...]:
    """Return the values of the objective's option `head`, none where it has no such choice."""
    _, options = config.objective
    hint = typing.get_type_hints(type(options)).get("head")
    if typing.get_origin(hint) is not typing.Literal:
        return ()
    return typing.get_args(hint)


def _count_auxiliary(config: Resolved, blueprint: Blueprint, plan: StagePlan) -> int | None:
    """Return the parameters of a stage's auxiliary networks, None where they cannot be built."""
    try:
        stage = Stage(plan, blueprint, config, "meta")
    except UserError:
        return None
    return sum(parameter.numel() for parameter in stage.auxiliary())


def _axes_without_neighbour(config: Resolved) -> list[str]:
    """Return the axes, as `method.AXIS MODE`, that a single stage has no use for."""
    if config.stages > 1:
        return []
    axes = {
        "reconcile": config.method.reconcile.distance,
        "context": config.method.context.mode,
        "feedback": config.method.feedback.mode,
    }
    return [f"method.{axis} {mode}" for axis, mode in axes.items() if mode != "none"]


def _late_notes(config: Resolved) -> list[str]:
    """Return a line where a stage may wait for parameters of a later one."""
    if not config.feeds_back:
        return []
    feedback, depth = config.method.feedback, config.pipeline.depth
    pairs = list_pairs(feedback, config.stages)
    distance = max(later - earlier for later, earlier in pairs)
    lag = lag_without_waits(distance, depth, config.optim.accumulate)
    if feedback.lag >= lag:
        return []
    return [
        f"note: with method.feedback.lag {feedback.lag} a stage may wait for the parameters of a "
        f"later one at pipeline.depth {depth}; from a lag of {lag} on none does, and another lag "
        "gives another result"
    ]


def _compares_samples(config: Resolved) -> bool:
    objective, options = config.objective
    name = config.method.objective["name"]
    return bool(call_objective(name, lambda: objective.is_over_pairs(options)))

"""Cuts that are balanced by counted memory or by measured time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from localpipe.config.load import update
from localpipe.config.resolved import Resolved
from localpipe.environment import available_cores
from localpipe.networks.cuts import balance, check_stages
from localpipe.pipeline.stages.stage_plan import build_blueprint, build_plans
from localpipe.pipeline.workers.trial import try_stages
from localpipe.plan.costs import count_saved_bytes
from localpipe.plan.measure import measure_profile
from localpipe.plan.profile import Profile


def decide_cuts(config: Resolved, profile: Profile | None) -> tuple[int, ...]:
    """Return the cut that balances the stages' saved bytes (`memory`) or measured seconds (`time`).

    It is the last block of every stage but the last, empty for one stage. profile: for seconds
    only, measured here if None. Raises UserError for more stages than blocks or a profile of other
    numbers of stages, RunError if measuring fails.
    """
    blueprint = build_blueprint(config)
    check_stages(len(blueprint.blocks), config.stages)
    if config.pipeline.cuts == "memory":
        _try_any_cut(config)
        cost = count_saved_bytes(blueprint, config, config.stages)
        return balance(len(blueprint.blocks), config.stages, cost)
    if profile is None:
        profile = measure_here(config, [config.stages])
    return time_cuts(profile, config.stages)


def _try_any_cut(config: Resolved) -> None:
    """Raise UserError where a user's blocks cannot be cut apart, or equal stages cannot be run."""
    blueprint = build_blueprint(config)
    if blueprint.build_network is None:
        return
    for index in range(len(blueprint.blocks) - 1):
        blueprint.check_cut(index)
    equal = update(config, {"pipeline.cuts": "equal", "pipeline.stages": config.stages})
    try_stages(equal, *build_plans(equal))


def time_cuts(profile: Profile, stages: int) -> tuple[int, ...]:
    """Return the cut whose slowest stage is fastest, as the last block of every stage but the last.

    Raises UserError where the profile was not measured for so many stages, or has fewer blocks.
    """

    def cost(first: int, last: int, stage: int) -> float:
        return profile.stage_s(first, last, stage, stages)

    return balance(len(profile.blocks), stages, cost)


def measure_here(
    config: Resolved, stage_counts: Sequence[int], check: Callable[[], None] = lambda: None
) -> Profile:
    """Measure a configuration with as many processes as will compute at once on this machine.

    They are at most the workers, and at most the cores over a worker's threads. stage_counts: the
    numbers of stages. `check` is called ten times a second, and what it raises ends the measuring.
    Raises RunError if a process fails, and UserError where the network cannot be cut after a block.
    """
    _try_any_cut(config)
    at_once = max(1, available_cores() // config.run.threads)
    workers = min(config.pipeline.processes, at_once)
    return measure_profile(config, stage_counts, workers, check)

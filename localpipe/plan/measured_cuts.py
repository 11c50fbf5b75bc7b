"""Cuts that are decided by a measurement: by counted memory or by measured time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from localpipe.config.resolved import Resolved
from localpipe.environment import available_cores
from localpipe.networks.cuts import balance, check_stages
from localpipe.pipeline.stages.stage_plan import build_blueprint
from localpipe.plan.costs import count_saved_bytes
from localpipe.plan.measure import measure_profile
from localpipe.plan.profile import Profile


def decide_cuts(config: Resolved, profile: Profile | None) -> tuple[int, ...]:
    """Return the cut that balances the stages' saved bytes (`memory`) or measured seconds (`time`)."""
    blueprint = build_blueprint(config)
    check_stages(len(blueprint.blocks), config.stages)
    if config.pipeline.cuts == "memory":
        cost = count_saved_bytes(blueprint, config, config.stages)
        return balance(len(blueprint.blocks), config.stages, cost)
    if profile is None:
        profile = measure_here(config, [config.stages])
    return time_cuts(profile, config.stages)


def time_cuts(profile: Profile, stages: int) -> tuple[int, ...]:
    """Return the cut whose slowest stage is fastest."""
    return balance(
        len(profile.blocks), stages, lambda first, last, k: profile.stage_s(first, last, k, stages)
    )


def measure_here(
    config: Resolved, stage_counts: Sequence[int], look: Callable[[], None] = lambda: None
) -> Profile:
    """Measure a resolved configuration with as many processes as will compute at once on this machine.

    `look` is called now and then, and may raise.
    """
    processes, threads = config.pipeline.processes, config.run.threads
    assert isinstance(processes, int) and isinstance(threads, int)
    return measure_profile(
        config, stage_counts, min(processes, max(1, available_cores() // threads)), look
    )

"""Cuts that are balanced by counted memory or by measured time."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

from localpipe.config.load import update
from localpipe.config.resolved import Resolved
from localpipe.environment import available_cores
from localpipe.errors import UserError
from localpipe.networks.blueprint import Blueprint
from localpipe.networks.cuts import balance, balance_part, balance_workers, check_stages
from localpipe.pipeline.stages.stage_plan import build_blueprint, build_plans
from localpipe.pipeline.workers.mesh import assign_hosts
from localpipe.pipeline.workers.trial import try_stages
from localpipe.plan.costs import ParameterCounts, count_costs, count_saved_bytes
from localpipe.plan.formats import format_bytes
from localpipe.plan.measure import measure_profile
from localpipe.plan.memory import worker_memory
from localpipe.plan.pieces import Pieces
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
        if config.pipeline.memory is not None:
            return _budget_cuts(blueprint, config)
        cost = count_saved_bytes(blueprint, config, config.stages)
        return balance(len(blueprint.blocks), config.stages, cost)
    if profile is None:
        profile = measure_here(config, [config.stages])
    return time_cuts(profile, config.replicas, config.pipeline.processes)


def _budget_cuts(blueprint: Blueprint, config: Resolved) -> tuple[int, ...]:
    """Return the cut whose fullest worker has used the smallest share of its budget.

    A worker's stages are cut so that the largest one's saved bytes are least: these are held one
    stage at a time, and everything else is there whatever the cut.
    """
    budgets = config.pipeline.memory
    assert budgets is not None, "the configuration has budgets"
    pieces = Pieces(blueprint, config)
    saved_bytes = count_saved_bytes(blueprint, config, config.stages)
    params = ParameterCounts(pieces, config.stages)
    workers = _group_ranks(config.replicas, config.pipeline.processes)

    def split(first: int, last: int, worker: int) -> tuple[float, tuple[int, ...]]:
        stages, ranks = workers[worker]
        _, cut = balance_part(first, last, stages, saved_bytes, max)
        firsts, lasts = [first, *(end + 1 for end in cut)], [*cut, last]
        plans, costs = [], []
        for stage, start, end in zip(stages, firsts, lasts, strict=True):
            plans.append(pieces.plan(start, end, stage, config.stages))
            costs.append(params.cost(start, end, stage, int(saved_bytes(start, end, stage))))
        used_bytes = worker_memory(plans, costs, config, config.replicas[stages[0]]).total_bytes
        return max(used_bytes / budgets[rank] for rank in ranks), cut

    counts = [len(stages) for stages, _ in workers]
    return balance_workers(len(blueprint.blocks), counts, split)


def _group_ranks(replicas: tuple[int, ...], processes: int) -> list[tuple[range, list[int]]]:
    """Return the stages that workers host, in order, with the ranks of all replicas of them."""
    ranks: dict[range, list[int]] = {}
    for rank, host in enumerate(assign_hosts(replicas, processes)):
        ranks.setdefault(host.stages, []).append(rank)
    return list(ranks.items())


def check_budgets(config: Resolved, are_best: bool) -> None:
    """Raise UserError where a worker needs more memory than its budget in pipeline.memory.

    config: with explicit cuts, or `equal` or `layerwise`. are_best: the cuts were decided by the
    budgets. Without budgets nothing is counted.
    """
    budgets = config.pipeline.memory
    if budgets is None:
        return
    blueprint, plans = build_plans(config)
    costs = count_costs(blueprint, plans, config)
    for stages, ranks in _group_ranks(config.replicas, config.pipeline.processes):
        hosted = slice(stages[0], stages[-1] + 1)
        memory = worker_memory(plans[hosted], costs[hosted], config, config.replicas[stages[0]])
        for rank in ranks:
            if memory.total_bytes > budgets[rank]:
                advice = "lower data.batch_size or pipeline.depth, or raise optim.accumulate"
                if not are_best:
                    advice = f"set pipeline.cuts=memory, {advice}"
                raise UserError(
                    f"config: worker {rank} needs {format_bytes(memory.total_bytes)} by the plan, "
                    f"but pipeline.memory gives it {format_bytes(budgets[rank])}; {advice}"
                )


def _try_any_cut(config: Resolved) -> None:
    """Raise UserError where a user's blocks cannot be cut apart, or equal stages cannot be run."""
    blueprint = build_blueprint(config)
    if blueprint.build_network is None:
        return
    for index in range(len(blueprint.blocks) - 1):
        blueprint.check_cut(index)
    equal = update(config, {"pipeline.cuts": "equal", "pipeline.stages": config.stages})
    try_stages(equal, *build_plans(equal))


def time_cuts(profile: Profile, replicas: tuple[int, ...], processes: int) -> tuple[int, ...]:
    """Return the cut whose slowest stage is fastest, as the last block of every stage but the last.

    Where workers differ it is the cut whose slowest worker is fastest. replicas: of every stage.
    processes: the number of workers. Raises UserError where the profile was not measured for so
    many stages, or has fewer blocks.
    """
    stages = len(replicas)
    if profile.each is not None:
        return _worker_time_cuts(profile, stages, _group_ranks(replicas, processes))

    def cost(first: int, last: int, stage: int) -> float:
        return profile.stage_s(first, last, stage, stages)

    return balance(len(profile.blocks), stages, cost)


def _worker_time_cuts(
    profile: Profile, stages: int, workers: Sequence[tuple[range, list[int]]]
) -> tuple[int, ...]:
    """Return the cut whose slowest worker is fastest, by each worker's own seconds.

    workers: as of `_group_ranks`. Replicas of a stage wait for the slowest of them.
    """

    def split(first: int, last: int, worker: int) -> tuple[float, tuple[int, ...]]:
        hosted, ranks = workers[worker]
        profiles = [profile.of_worker(rank) for rank in ranks]

        def cost(start: int, end: int, stage: int) -> float:
            return max(
                worker_profile.stage_s(start, end, stage, stages) for worker_profile in profiles
            )

        return balance_part(first, last, hosted, cost, operator.add)

    counts = [len(hosted) for hosted, _ in workers]
    return balance_workers(len(profile.blocks), counts, split)


def measure_here(
    config: Resolved, stage_counts: Sequence[int], check: Callable[[], None] = lambda: None
) -> Profile:
    """Measure a configuration with as many processes as will compute at once on this machine.

    They are at most the workers, and at most the cores over a worker's threads: but all workers
    where these differ, each on its own device. stage_counts: the numbers of stages. `check` is
    called ten times a second, and what it raises ends the measuring. Raises RunError if a process
    fails, and UserError where the network cannot be cut after a block.
    """
    _try_any_cut(config)
    workers = config.pipeline.processes
    if not config.workers_differ:
        workers = min(workers, max(1, available_cores() // config.threads[0]))
    return measure_profile(config, stage_counts, workers, check)

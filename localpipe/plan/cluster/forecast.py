"""What a configuration would do on machines that need not be here, beside its peers, and what to change first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from localpipe.config.keys import Config
from localpipe.config.load import update
from localpipe.config.resolved import Resolved
from localpipe.data.dataset import Dataset
from localpipe.errors import UserError
from localpipe.networks.blueprint import Blueprint
from localpipe.pipeline.stages.stage_plan import StagePlan, build_plans
from localpipe.pipeline.workers.steps import step_schedule
from localpipe.plan.cluster import formulas, simulate
from localpipe.plan.cluster.block_costs import BlockCost, balance_blocks, measure_blocks
from localpipe.plan.cluster.machines import load_cluster
from localpipe.plan.cluster.peers import STEPS, ForecastRow, failure_intervals, forecast_rows
from localpipe.plan.cluster.placement import (
    ForecastCase,
    PlacedWorker,
    case_jitter,
    find_bottleneck,
    pipeline_timing,
    place_workers,
)
from localpipe.plan.costs import StageCost, count_costs
from localpipe.plan.tables import format_bytes

_ACTIVATION_BYTES = 4  # what crosses a boundary is fp32
Plans = tuple[tuple[StagePlan, ...], Sequence[StageCost]]


@dataclass(frozen=True)
class Forecast:
    """A whole comparison."""

    cluster: str
    devices: int
    workers: tuple[PlacedWorker, ...]
    rows: tuple[ForecastRow, ...]
    bottleneck: str
    advice: tuple[str, ...]
    assumptions: tuple[str, ...]


def forecast_on_cluster(
    given: Config,
    resolved: Resolved,
    dataset: Dataset,
    blueprint: Blueprint,
    plans: tuple[StagePlan, ...],
    costs: Sequence[StageCost],
    path: str | Path,
    micro_batches: str | None = None,
    seconds: tuple[tuple[float, float], ...] | None = None,
) -> Forecast:
    """Forecast a planned configuration on the cluster of a file.

    given: as the user said it: `pipeline.processes: auto` takes as many of the cluster's devices as there are stages.
    micro_batches: `4,16`, of the synchronous peers; None for K and 4 K. seconds: a measured (before the send, after it) of
    every stage for one batch, in place of the devices' figures. Raises UserError where the plan needs a link or memory
    that the cluster does not have.
    """
    machines = load_cluster(path)
    case = ForecastCase(
        resolved,
        blueprint,
        plans,
        tuple(costs),
        machines,
        str(path),
        step_schedule(resolved, dataset).steps,
        seconds,
    )

    def again(config: Resolved) -> Plans:
        changed = build_plans(config)
        return changed[1], count_costs(*changed, config)

    asked = given.pipeline.processes
    return forecast(
        case, None if asked == "auto" else asked, _counts(micro_batches, case.batch), again
    )


def forecast(
    case: ForecastCase,
    processes: int | None,
    micro_batches: Sequence[int] | None,
    again: Callable[[Resolved], Plans],
) -> Forecast:
    """Forecast a case; `again` plans the same configuration at another cut, to judge an advice before giving it."""
    workers = place_workers(case, processes)
    if micro_batches is None:
        micro_batches = sorted({min(len(workers) * times, case.batch) for times in (1, 4)})
    blocks = measure_blocks(case.blueprint)
    rows = forecast_rows(case, workers, blocks, micro_batches)
    return Forecast(
        cluster=case.cluster.name,
        devices=len(case.cluster.places),
        workers=workers,
        rows=rows,
        bottleneck=find_bottleneck(workers),
        advice=tuple(_advice(case, workers, rows, blocks, again)),
        assumptions=tuple(_assumptions(case)),
    )


def _counts(text: str | None, batch: int) -> list[int] | None:
    """Return the numbers of micro-batches of a command line's words."""
    if text is None:
        return None
    words = text.split(",")
    if not all(word.strip().isdecimal() and 1 <= int(word) <= batch for word in words):
        raise UserError(
            f"command line: --micro-batches {text}; expected numbers from 1 to the batch's {batch}, as 4,16"
        )
    return [int(word) for word in words]


def _advice(
    case: ForecastCase,
    workers: Sequence[PlacedWorker],
    rows: Sequence[ForecastRow],
    blocks: Sequence[BlockCost],
    again: Callable[[Resolved], Plans],
) -> Iterator[str]:
    """Yield what to change, what brings most first; a cut is only proposed after it was planned and found better."""
    mine = rows[0]
    assert mine.samples_per_s is not None
    rivals = [
        row
        for row in rows[1:]
        if row.samples_per_s is not None and row.samples_per_s > mine.samples_per_s
    ]
    for rival in sorted(rivals, key=lambda row: -(row.samples_per_s or 0.0))[:1]:
        ratio = (rival.samples_per_s or 0.0) / mine.samples_per_s
        which = (
            rival.system
            if rival.micro_batches is None
            else f"{rival.system} at {rival.micro_batches} micro-batches"
        )
        yield f"{which} is {ratio:.2f} times as fast here, with {format_bytes(rival.memory_bytes or 0)} on its fullest device"
    found = _better_cut(case, workers, blocks, again)
    if found is not None:
        cuts, gain = found
        yield f"pipeline.cuts=[{','.join(map(str, cuts))}] is predicted {100 * gain:.0f} % faster: the slowest decides"
    timing = pipeline_timing(workers)
    edges = max(timing.edge_s, default=0.0)
    if edges > max(timing.compute_s):
        yield (
            f"{find_bottleneck(workers)} needs {1e3 * edges:,.2f} ms a step, the slowest worker {1e3 * max(timing.compute_s):,.2f}: "
            "cut where fewer bytes cross, or use a faster link there"
        )
    depth, jitter = case.config.pipeline.depth, case_jitter(case)
    if jitter.spread:
        now, deeper = (
            simulate.simulate_pipeline(timing, STEPS, d, jitter, case.replicas).period_s
            for d in (depth, 2 * depth)
        )
        if deeper < 0.98 * now:
            yield f"pipeline.depth={2 * depth} hides jitter: {100 * (now / deeper - 1):.0f} % faster"
    auxiliary = sum(cost.aux_macs for cost in case.costs) / max(
        sum(cost.macs for cost in case.costs), 1
    )
    if auxiliary > 0.25:
        yield f"the auxiliary networks add {100 * auxiliary:.0f} % to the MACs of a forward pass: try smaller ones"
    idle = len(case.cluster.places) - mine.devices
    if idle:
        key = "processes" if len(workers) < len(case.plans) else "stages"
        yield f"{idle} of {len(case.cluster.places)} devices are idle: raise pipeline.{key}"


def _better_cut(
    case: ForecastCase,
    workers: Sequence[PlacedWorker],
    blocks: Sequence[BlockCost],
    again: Callable[[Resolved], Plans],
) -> tuple[tuple[int, ...], float] | None:
    """Return a cut by the blocks' MACs and its gain, if it is at least 3 % faster once it is really planned."""
    stages = len(case.plans)
    if case.seconds is not None or stages == 1 or len(workers) != stages:
        return None
    seats = [worker.places[0] for worker in workers]
    speed = min(case.macs_per_s(place) for place in seats)
    pace = min(
        case.cluster.wires[worker.wire].bytes_per_s for worker in workers if worker.wire is not None
    )
    share = case.batch / case.replicas
    seconds = [share * block.train_macs / speed for block in blocks]
    cuts = balance_blocks(
        seconds, [share * _ACTIVATION_BYTES * block.outputs / pace for block in blocks], stages
    )
    if list(cuts) == [plan.last for plan in case.plans[:-1]]:
        return None
    config = update(case.config, {"pipeline.cuts": list(cuts)})
    try:
        plans, costs = again(config)
        other = place_workers(
            replace(case, config=config, plans=plans, costs=tuple(costs)),
            len(workers) * case.replicas,
        )
    except UserError:
        return None
    gain = (
        formulas.period_s(pipeline_timing(workers)) / formulas.period_s(pipeline_timing(other)) - 1
    )
    return (cuts, gain) if gain >= 0.03 else None


def _assumptions(case: ForecastCase) -> Iterator[str]:
    precision = case.config.run.precision
    if case.seconds is None:
        for name in dict.fromkeys(place.device for place in case.cluster.places):
            device = case.cluster.devices[name]
            if precision in device.flop_per_s:
                yield (
                    f"{name}: {100 * device.achievable:g} % of {device.flop_per_s[precision] / 1e12:g} TFLOP/s ({precision}) "
                    "in every layer, at any batch or micro-batch; normalisation, activations and the update cost nothing"
                )
    else:
        yield "stages take the measured seconds on every device of the cluster; peers are counted in MACs"
    yield "transfers overlap with computing; a device sends and receives at once; each direction of a wire has its bandwidth"
    yield "localpipe's edge waits for the receiver's word: bytes / bandwidth + 2 latencies between two messages"
    yield f"batch {case.batch}, fp32 messages, depth {case.config.pipeline.depth}; the loader is never the slowest"
    yield "peers train end to end without auxiliary networks, each at the cut that balances its own MACs and links"
    yield "peers' edges take bytes / bandwidth + one latency each way, bf16 messages where run.precision is bf16"
    yield "memory: weights, gradients, optimizer, saved activations, messages; all fp32; no workspace, no fragmentation"
    spread = case_jitter(case).spread
    if spread:
        yield f"simulation: a step takes a stage its mean time x (1 +- {spread:g}), evenly; formulas know no jitter"
    known = [mtbf for mtbf in failure_intervals(case) if mtbf != float("inf")]
    if known:
        yield (
            f"whole run: {case.steps:,} steps, a device fails every {min(known) / 3600:,.0f} h, the run begins again after "
            f"{case.cluster.restart_s:g} s from a checkpoint at most {case.config.run.checkpoint_every_s:g} s old"
        )

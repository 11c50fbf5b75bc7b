"""Forecast of a configuration on a described cluster, next to rival systems, with advice.

Nothing is measured: speed and memory follow from counts and from the figures in the cluster's file.
"""

from __future__ import annotations

import math
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
from localpipe.pipeline.workers.steps import build_step_schedule
from localpipe.plan.cluster import formulas, simulate
from localpipe.plan.cluster.block_costs import BlockCost, balance_blocks, measure_blocks
from localpipe.plan.cluster.machines import load_cluster
from localpipe.plan.cluster.peers import STEPS, ForecastRow, forecast_rows, list_failure_intervals
from localpipe.plan.cluster.placement import (
    ForecastCase,
    PlacedWorker,
    StageSeconds,
    assign_workers,
    build_timing,
    find_bottleneck,
    find_jitter,
    find_slowest_bandwidth,
)
from localpipe.plan.costs import StageCost, count_costs
from localpipe.plan.formats import format_bytes

# By pipeline.wire_dtype. The last two have a scale of 4 bytes for 64 numbers.
_ACTIVATION_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1 + 4 / 64, "int4": 0.5 + 4 / 64}
_MIN_GAIN = 0.03  # of a cut that is worth an advice
_MIN_DEPTH_GAIN = 0.02  # of a deeper queue
_MUCH_AUXILIARY = 0.25  # of the MACs of a forward pass
Plans = tuple[tuple[StagePlan, ...], Sequence[StageCost]]
Replan = Callable[[Resolved], Plans]  # plans a configuration again, for an advice on its cut


@dataclass(frozen=True)
class Forecast:
    """A whole comparison: the workers, a row for each system, advice and assumptions.

    cluster: its name. devices: their number. rows: localpipe's first. advice: lines, the most
    useful first, or none. assumptions: lines. messages: localpipe's of a batch.
    """

    cluster: str
    devices: int
    workers: tuple[PlacedWorker, ...]
    rows: tuple[ForecastRow, ...]
    bottleneck: str
    advice: tuple[str, ...]
    assumptions: tuple[str, ...]
    messages: int = 1


def forecast_on_cluster(
    config: Config,
    resolved: Resolved,
    dataset: Dataset,
    blueprint: Blueprint,
    plans: tuple[StagePlan, ...],
    costs: Sequence[StageCost],
    path: str | Path,
    micro_batches: str | None = None,
    seconds: StageSeconds | None = None,
) -> Forecast:
    """Return the forecast of a planned configuration on the cluster of a file.

    config: the user's, where `pipeline.processes: auto` takes as many of the cluster's devices as
    there are stages. resolved: for this machine. path: a file, or a name that ships.
    micro_batches: `4,16`, of the synchronous systems. None stands for K and 4 K. seconds: measured
    seconds of every stage for one batch, before the send and after it, in place of the devices'
    figures.

    Raises UserError for a wrong file or `micro_batches` outside 1 to the batch, and where stages
    differ in replicas. Raises it too where the plan needs a device, link, speed or memory that the
    cluster does not have.
    """
    case = ForecastCase(
        config=resolved,
        blueprint=blueprint,
        plans=plans,
        costs=tuple(costs),
        cluster=load_cluster(path),
        source=str(path),
        steps=build_step_schedule(resolved, dataset).steps,
        seconds=seconds,
    )
    # The resolved `processes` fit this machine. `auto` means the cluster's devices here.
    processes: int | None = None
    if config.pipeline.processes != "auto":
        processes = config.pipeline.processes
    counts = _parse_micro_batches(micro_batches, case.batch)
    return forecast(case, processes, counts, _plan_again)


def _plan_again(config: Resolved) -> Plans:
    blueprint, plans = build_plans(config)
    return plans, count_costs(blueprint, plans, config)


def forecast(
    case: ForecastCase,
    processes: int | None,
    micro_batches: Sequence[int] | None,
    replan: Replan,
) -> Forecast:
    """Return the forecast of a case.

    replan: returns the plans and costs of the same configuration at another cut, so that an advice
    is checked before it is given. A UserError of it drops the advice. micro_batches: None stands
    for K and 4 K of K workers. The other arguments and the errors are those of `assign_workers` and
    `forecast_rows`.
    """
    # By default a synchronous pipeline has K and 4 K micro-batches, of one image at least.
    workers = assign_workers(case, processes)
    if micro_batches is None:
        few = min(len(workers), case.batch)
        many = min(4 * len(workers), case.batch)
        micro_batches = sorted({few, many})
    blocks = measure_blocks(case.blueprint)
    rows = forecast_rows(case, workers, blocks, micro_batches)
    return Forecast(
        cluster=case.cluster.name,
        devices=len(case.cluster.all_devices),
        workers=workers,
        rows=rows,
        bottleneck=find_bottleneck(workers),
        advice=tuple(_list_advice(case, workers, rows, blocks, replan)),
        assumptions=tuple(_list_assumptions(case)),
        messages=case.messages,
    )


def _parse_micro_batches(text: str | None, batch: int) -> list[int] | None:
    """Return the counts in a text like `4,16`; raises UserError for others than 1 to the batch."""
    if text is None:
        return None
    counts = []
    for word in text.split(","):
        if not word.strip().isdecimal() or not 1 <= int(word) <= batch:
            raise UserError(
                f"command line: --micro-batches {text}; expected numbers from 1 to the batch's "
                f"{batch}, as 4,16"
            )
        counts.append(int(word))
    return counts


# -- advice ----------------------------------------------------------------------------------------


def _list_advice(
    case: ForecastCase,
    workers: Sequence[PlacedWorker],
    rows: Sequence[ForecastRow],
    blocks: Sequence[BlockCost],
    replan: Replan,
) -> list[str]:
    """Return what to change, the most useful first."""
    advice = [_advise_system(rows), _advise_cut(case, workers, blocks, replan)]
    advice += [_advise_edge(workers), _advise_depth(case, workers)]
    advice += [_advise_heads(case), _advise_devices(case, workers)]
    return [line for line in advice if line is not None]


def _advise_system(rows: Sequence[ForecastRow]) -> str | None:
    """Return a line on the fastest rival system, None where none is faster than localpipe."""
    localpipe_samples_per_s = rows[0].samples_per_s
    assert localpipe_samples_per_s is not None
    fastest = None
    samples_per_s = localpipe_samples_per_s
    for row in rows[1:]:
        if row.samples_per_s is not None and row.samples_per_s > samples_per_s:
            fastest = row
            samples_per_s = row.samples_per_s
    if fastest is None:
        return None

    # The name has the number of micro-batches where the system has one.
    name = fastest.system
    if fastest.micro_batches is not None:
        name = f"{name} at {fastest.micro_batches} micro-batches"
    ratio = samples_per_s / localpipe_samples_per_s
    memory = format_bytes(fastest.memory_bytes or 0)
    return f"{name} is {ratio:.2f} times as fast here, with {memory} on its fullest device"


def _advise_cut(
    case: ForecastCase,
    workers: Sequence[PlacedWorker],
    blocks: Sequence[BlockCost],
    replan: Replan,
) -> str | None:
    """Return a line on a faster cut. It is proposed only after it was planned and is faster."""
    cut = _balance_cut(case, workers, blocks)
    if cut is None or cut == case.cut:
        return None
    config = update(case.config, {"pipeline.cuts": cut})
    try:
        plans, costs = replan(config)
        other_case = replace(case, config=config, plans=plans, costs=tuple(costs))
        processes = len(workers) * case.replicas
        other_workers = assign_workers(other_case, processes)
    except UserError:
        return None
    period_s = formulas.period_s(build_timing(workers))
    other_period_s = formulas.period_s(build_timing(other_workers))
    gain = period_s / other_period_s - 1
    if gain < _MIN_GAIN:
        return None
    words = ",".join(map(str, cut))
    return f"pipeline.cuts=[{words}] is predicted {100 * gain:.0f} % faster: the slowest decides"


def _balance_cut(
    case: ForecastCase, workers: Sequence[PlacedWorker], blocks: Sequence[BlockCost]
) -> list[int] | None:
    """Return the cut that balances the blocks' MACs, None without two stages of a worker each.

    Measured seconds hold for the present cut only, so there is none for them either.
    """
    stages = len(case.plans)
    if case.seconds is not None or stages == 1 or len(workers) != stages:
        return None
    # The slowest device and link of the first replica set the speed for all.
    speed = case.find_slowest_macs_per_s([worker.devices[0] for worker in workers])
    links = [case.cluster.wires[worker.wire] for worker in workers if worker.wire is not None]
    bytes_per_s = find_slowest_bandwidth(links)
    compute_s = []
    edge_s = []
    item_bytes = _ACTIVATION_BYTES[case.config.pipeline.wire_dtype]
    for block in blocks:
        compute_s.append(case.samples * block.train_macs / speed)
        message_bytes = case.samples * item_bytes * block.outputs
        edge_s.append(message_bytes / bytes_per_s)
    return list(balance_blocks(compute_s, edge_s, stages))


def _advise_edge(workers: Sequence[PlacedWorker]) -> str | None:
    """Return a line on an edge that is slower than every worker."""
    timing = build_timing(workers)
    edge_s = max(timing.edge_s, default=0.0)
    compute_s = max(timing.compute_s)
    if edge_s <= compute_s:
        return None
    edge = find_bottleneck(workers)
    return (
        f"{edge} needs {1e3 * edge_s:,.2f} ms a message, the slowest worker "
        f"{1e3 * compute_s:,.2f}: cut where fewer bytes cross, or use a faster link there"
    )


def _advise_depth(case: ForecastCase, workers: Sequence[PlacedWorker]) -> str | None:
    """Return a line on a queue of twice the depth, where it hides jitter."""
    jitter = find_jitter(case)
    if not jitter.spread:
        return None
    timing = build_timing(workers)
    depth = case.config.pipeline.depth
    run = simulate.simulate_pipeline(timing, STEPS, depth, jitter, case.replicas)
    deeper = simulate.simulate_pipeline(timing, STEPS, 2 * depth, jitter, case.replicas)
    if deeper.period_s >= (1 - _MIN_DEPTH_GAIN) * run.period_s:
        return None
    gain = run.period_s / deeper.period_s - 1
    return f"pipeline.depth={2 * depth} hides jitter: {100 * gain:.0f} % faster"


def _advise_heads(case: ForecastCase) -> str | None:
    """Return a line on auxiliary networks that cost much."""
    macs = auxiliary_macs = 0
    for cost in case.costs:
        macs += cost.macs
        auxiliary_macs += cost.aux_macs
    auxiliary = auxiliary_macs / max(macs, 1)
    if auxiliary <= _MUCH_AUXILIARY:
        return None
    return (
        f"the auxiliary networks add {100 * auxiliary:.0f} % to the MACs of a forward pass: "
        "try smaller ones"
    )


def _advise_devices(case: ForecastCase, workers: Sequence[PlacedWorker]) -> str | None:
    """Return a line on devices that have no worker."""
    devices = len(case.cluster.all_devices)
    idle = devices - len(workers) * case.replicas
    if idle == 0:
        return None
    key = "processes" if len(workers) < len(case.plans) else "stages"
    return f"{idle} of {devices} devices are idle: raise pipeline.{key}"


# -- assumptions -----------------------------------------------------------------------------------


def _list_assumptions(case: ForecastCase) -> Iterator[str]:
    """Yield what the forecast takes for granted, a line each."""
    yield from _list_compute_assumptions(case)

    # Links and messages.
    yield (
        "transfers overlap with computing; a device sends and receives at once; each direction of "
        "a wire has its bandwidth"
    )
    yield (
        "localpipe's edge waits for the receiver's word: bytes / bandwidth + 2 latencies between "
        "two messages"
    )
    depth = case.config.pipeline.depth
    batch = f"batch {case.batch}"
    if case.messages > 1:
        batch += f" in {case.messages} messages"
    dtype = case.config.pipeline.wire_dtype
    codec = ""
    if dtype in ("int8", "int4"):
        codec = " (the seconds of encoding and decoding are not counted)"
    yield f"{batch}, {dtype} messages{codec}, depth {depth}; the loader is never the slowest"

    # Rival systems.
    yield (
        "peers train end to end without auxiliary networks, each at the cut that balances its own "
        "MACs and links"
    )
    yield (
        "peers' edges take bytes / bandwidth + one latency each way, bf16 messages where "
        "run.precision is bf16"
    )

    numbers = "messages; all fp32"
    if dtype != "fp32":
        numbers = f"all fp32, and {dtype} messages"
    yield (
        f"memory: weights, gradients, optimizer, saved activations, {numbers}; no workspace, no "
        "fragmentation"
    )
    yield from _list_random_assumptions(case)


def _list_random_assumptions(case: ForecastCase) -> Iterator[str]:
    """Yield a line on jitter and one on failures, where the cluster has them."""
    spread = find_jitter(case).spread
    if spread:
        yield (
            f"simulation: a step takes a stage its mean time x (1 +- {spread:g}), evenly; formulas "
            "know no jitter"
        )
    mtbf_s = min(list_failure_intervals(case))
    if math.isfinite(mtbf_s):
        restart_s = case.cluster.restart_s
        checkpoint_s = case.config.run.checkpoint_every_s
        yield (
            f"whole run: {case.steps:,} steps, a device fails every {mtbf_s / 3600:,.0f} h, the "
            f"run begins again after {restart_s:g} s from a checkpoint at most {checkpoint_s:g} s "
            "old"
        )


def _list_compute_assumptions(case: ForecastCase) -> Iterator[str]:
    """Yield a line for every kind of device with a speed, or one for measured seconds."""
    if case.seconds is not None:
        yield (
            "stages take the measured seconds on every device of the cluster; peers are counted in "
            "MACs"
        )
        return
    precision = case.config.run.precision
    kinds = dict.fromkeys(device.kind for device in case.cluster.all_devices)
    for kind in kinds:
        spec = case.cluster.devices[kind]
        if precision in spec.flop_per_s:
            teraflops = spec.flop_per_s[precision] / 1e12
            percent = 100 * spec.achievable
            yield (
                f"{kind}: {percent:g} % of {teraflops:g} TFLOP/s ({precision}) in every layer, at "
                "any batch or micro-batch; normalisation, activations and the update cost nothing"
            )

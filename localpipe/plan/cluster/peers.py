"""The rows of a forecast: localpipe and rival systems on a cluster's devices.

Every row has samples per second by formula and by simulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from localpipe.plan.cluster import formulas, simulate
from localpipe.plan.cluster.block_costs import BlockCost, balance_blocks, sum_blocks
from localpipe.plan.cluster.formulas import MicroTiming
from localpipe.plan.cluster.machines import ClusterDevice, ClusterLink
from localpipe.plan.cluster.placement import (
    ClusterError,
    ForecastCase,
    PlacedWorker,
    build_timing,
    estimate_all_reduce,
    find_bottleneck,
    find_jitter,
    find_slowest_bandwidth,
    require_link,
)
from localpipe.plan.cluster.simulate import Failures
from localpipe.plan.formats import format_bytes
from localpipe.plan.memory import parameter_memory

STEPS = 2000  # of the simulated pipeline
PEER_STEPS = 20  # of the simulated synchronous schedules, each of many micro-batches
PATHS = 20  # of random failures
_STEADY_STEPS = 4  # enough for a synchronous schedule without jitter
_BUCKET_BYTES = 25 * 2**20  # torch's default for DistributedDataParallel
_ITEM_BYTES = {"fp32": 4, "bf16": 2}  # of what rival systems send
_FORMULAS = {
    "gpipe": formulas.gpipe_s,
    "1f1b": formulas.one_f_one_b_s,
    "zb-h1": formulas.zero_bubble_s,
}


@dataclass(frozen=True)
class ForecastRow:
    """The figures of one system. They are None where it cannot run, and `why_not` says why.

    micro_batches: of a synchronous pipeline, or localpipe's messages of one update, None for one.
    cut: the last block of every stage but the last, None without stages. memory_bytes: of the
    fullest device, also where that does not fit. `formula_run_s` and `run_s` are of the whole run
    with failures. They are None where it would never end, and `run_s` alone where hardly ever.
    """

    system: str
    devices: int
    micro_batches: int | None
    cut: list[int] | None
    formula_samples_per_s: float | None = None
    samples_per_s: float | None = None  # simulated
    bound_samples_per_s: float | None = None
    efficiency: float | None = None
    memory_bytes: int | None = None
    bottleneck: str | None = None
    why_not: str | None = None
    formula_run_s: float | None = None
    run_s: float | None = None


def forecast_rows(
    case: ForecastCase,
    workers: Sequence[PlacedWorker],
    blocks: Sequence[BlockCost],
    micro_batches: Sequence[int],
) -> tuple[ForecastRow, ...]:
    """Return localpipe's row, then one of every rival system on the same devices.

    blocks: the network's blocks, for systems that train end to end. micro_batches: the counts at
    which synchronous pipelines are forecast, a row each. For every count come zb-h1, 1f1b and
    gpipe, then ddp and e2e.

    Pipelines are left out with several replicas, one worker, or fewer blocks than workers. ddp is
    left out on one device. A rival that lacks a link, memory or a speed raises nothing: its row has
    `why_not`.
    """
    rows = [_forecast_localpipe(case, workers)]
    rows += _forecast_peers(case, workers, blocks, micro_batches)
    return tuple(_add_run_seconds(case, row) for row in rows)


def _forecast_localpipe(case: ForecastCase, workers: Sequence[PlacedWorker]) -> ForecastRow:
    timing = build_timing(workers)
    depth = case.config.pipeline.depth
    jitter = find_jitter(case)
    run = simulate.simulate_pipeline(timing, STEPS, depth, jitter, case.replicas)
    # The bound is the slowest worker's compute. Edges and the all-reduce between replicas are free.
    images = case.batch / case.messages
    bound = images / max(worker.compute_s for worker in workers)
    formula = images / formulas.period_s(timing)
    samples_per_s = images / run.period_s
    micro_batches = None
    if case.messages > 1:
        micro_batches = case.messages
    memory_bytes = max(worker.memory.total_bytes for worker in workers)
    return ForecastRow(
        system="localpipe",
        devices=len(workers) * case.replicas,
        micro_batches=micro_batches,
        cut=case.cut,
        formula_samples_per_s=formula,
        samples_per_s=samples_per_s,
        bound_samples_per_s=bound,
        efficiency=samples_per_s / bound,
        memory_bytes=memory_bytes,
        bottleneck=find_bottleneck(workers),
    )


def _forecast_peers(
    case: ForecastCase,
    workers: Sequence[PlacedWorker],
    blocks: Sequence[BlockCost],
    micro_batches: Sequence[int],
) -> Iterator[ForecastRow]:
    """Yield a row of every rival system, trained end to end at the cut that balances it."""
    devices: list[ClusterDevice] = []
    for worker in workers:
        devices += worker.devices
    count = len(devices)

    # A synchronous pipeline needs several stages, and a block or more for each.
    if case.replicas == 1 and 1 < len(workers) <= len(blocks):
        for m in micro_batches:
            for schedule in ("zb-h1", "1f1b", "gpipe"):
                forecast = partial(_forecast_synchronous, case, devices, blocks, schedule, m)
                yield _try_forecast(forecast, ForecastRow(schedule, count, m, None))

    # Data parallelism needs several devices, end-to-end training needs one.
    if count > 1:
        forecast = partial(_forecast_data_parallel, case, devices, blocks, "ddp")
        yield _try_forecast(forecast, ForecastRow("ddp", count, None, None))
    forecast = partial(_forecast_data_parallel, case, devices[:1], blocks, "e2e")
    yield _try_forecast(forecast, ForecastRow("e2e", 1, None, None))


def _try_forecast(forecast: Callable[[], ForecastRow], empty_row: ForecastRow) -> ForecastRow:
    """Return a rival system's row, or the empty row with the cause why it cannot run."""
    try:
        return forecast()
    except ClusterError as error:
        return replace(empty_row, why_not=error.cause)


def _forecast_synchronous(
    case: ForecastCase,
    devices: Sequence[ClusterDevice],
    blocks: Sequence[BlockCost],
    schedule: str,
    micro_batches: int,
) -> ForecastRow:
    """Return the row of a synchronous pipeline, one stage a device."""
    links = []
    for sender, receiver in zip(devices, devices[1:], strict=False):
        links.append(require_link(case, sender, receiver, f"{schedule} sends"))
    samples = case.batch / micro_batches
    cut, stages = _cut_blocks(case, devices, blocks, samples, find_slowest_bandwidth(links))

    # Memory comes first: a schedule that does not fit has no speed.
    needs = []
    for k, stage in enumerate(stages):
        in_flight = _count_in_flight(schedule, k, len(stages), micro_batches)
        needs.append(_count_bytes(case, stage, in_flight * samples))
    row = ForecastRow(schedule, len(devices), micro_batches, cut, memory_bytes=max(needs))
    for need, device in zip(needs, devices, strict=True):
        if need > case.cluster.find_spec(device).memory_bytes:
            return replace(row, why_not=f"{format_bytes(need)} do not fit {device.kind}")

    # The bound is the slowest stage's work on all micro-batches, without a bubble or an edge.
    timing = _build_micro_timing(case, devices, stages, links, samples)
    jitter = find_jitter(case)
    steps = PEER_STEPS if jitter.spread else _STEADY_STEPS
    step_s = simulate.simulate_synchronous(schedule, timing, micro_batches, steps, jitter)
    formula_s = _FORMULAS[schedule](timing, micro_batches)
    samples_per_s = case.batch / step_s
    bound = case.batch / (micro_batches * max(timing.compute_s))
    return replace(
        row,
        formula_samples_per_s=case.batch / formula_s,
        samples_per_s=samples_per_s,
        bound_samples_per_s=bound,
        efficiency=samples_per_s / bound,
        bottleneck=_find_limit(schedule, timing, micro_batches),
    )


def _find_limit(schedule: str, timing: MicroTiming, micro_batches: int) -> str:
    """Return what keeps a synchronous pipeline from its bound: the bubble, or time on its links."""
    formula = _FORMULAS[schedule]
    free_edges = (0.0,) * (timing.stages - 1)
    without_links = replace(timing, transfer_s=free_edges, latency_s=free_edges)
    without_links_s = formula(without_links, micro_batches)
    bubble_s = without_links_s - micro_batches * max(timing.compute_s)
    links_s = formula(timing, micro_batches) - without_links_s
    if links_s > bubble_s:
        return "its links"
    return "the bubble"


def _cut_blocks(
    case: ForecastCase,
    devices: Sequence[ClusterDevice],
    blocks: Sequence[BlockCost],
    samples: float,
    bytes_per_s: float,
) -> tuple[list[int], list[BlockCost]]:
    """Return the cut that balances the blocks' own work and messages, and every stage's cost.

    samples: images of a micro-batch. bytes_per_s: bandwidth of the slowest link.
    """
    speed = case.find_slowest_macs_per_s(devices)
    item_bytes = _ITEM_BYTES[case.config.run.precision]
    compute_s = []
    edge_s = []
    for block in blocks:
        compute_s.append(samples * block.train_macs / speed)
        message_bytes = samples * block.outputs * item_bytes
        edge_s.append(message_bytes / bytes_per_s)
    cut = balance_blocks(compute_s, edge_s, len(devices))

    # A stage's cost is the sum of its blocks.
    stages = []
    start = 0
    for last in [*cut, len(blocks) - 1]:
        stages.append(sum_blocks(blocks[start : last + 1]))
        start = last + 1
    return list(cut), stages


def _build_micro_timing(
    case: ForecastCase,
    devices: Sequence[ClusterDevice],
    stages: Sequence[BlockCost],
    links: Sequence[ClusterLink],
    samples: float,
) -> MicroTiming:
    """Return the seconds of one micro-batch of `samples` images."""
    forward_s = []
    input_s = []
    weight_s = []
    for device, stage in zip(devices, stages, strict=True):
        # Every product has a forward pass and two gradients of the same size.
        macs_per_s = case.find_macs_per_s(device) / samples
        backward_macs = stage.train_macs - stage.macs
        forward_s.append(stage.macs / macs_per_s)
        weight_s.append(min(stage.macs, backward_macs) / macs_per_s)
        input_s.append(max(backward_macs - stage.macs, 0) / macs_per_s)

    # The last stage sends nothing forward.
    sample_bytes = samples * _ITEM_BYTES[case.config.run.precision]
    transfer_s = []
    latency_s = []
    for stage, link in zip(stages[:-1], links, strict=True):
        transfer_s.append(sample_bytes * stage.outputs / link.bytes_per_s)
        latency_s.append(link.latency_s)
    return MicroTiming(
        forward_s=tuple(forward_s),
        input_s=tuple(input_s),
        weight_s=tuple(weight_s),
        update_s=(0.0,) * len(devices),
        transfer_s=tuple(transfer_s),
        latency_s=tuple(latency_s),
    )


def _count_in_flight(schedule: str, stage: int, stages: int, micro_batches: int) -> int:
    """Return the most micro-batches whose activations a stage holds at once."""
    counts = {"gpipe": micro_batches, "1f1b": stages - stage, "zb-h1": stages}
    return min(counts[schedule], micro_batches)


def _count_bytes(case: ForecastCase, blocks: BlockCost, samples: float) -> int:
    """Return the bytes of blocks with their optimizer, and of activations of `samples` images."""
    parameters = parameter_memory(blocks.params, case.config)
    return parameters.total_bytes + int(samples * blocks.saved_bytes)


def _forecast_data_parallel(
    case: ForecastCase, devices: Sequence[ClusterDevice], blocks: Sequence[BlockCost], system: str
) -> ForecastRow:
    """Return the row of the whole network on every device, gradients reduced in buckets."""
    count = len(devices)
    samples = case.batch / count
    network = sum_blocks(blocks)

    # Memory comes first: a network that does not fit has no speed.
    need = _count_bytes(case, network, samples)
    row = ForecastRow(system, count, None, None, memory_bytes=need)
    smallest = min(devices, key=lambda device: case.cluster.find_spec(device).memory_bytes)
    if need > case.cluster.find_spec(smallest).memory_bytes:
        return replace(row, why_not=f"{format_bytes(need)} do not fit {smallest.kind}")

    # The bound is the compute alone, without the all-reduce.
    speed = case.find_slowest_macs_per_s(devices)
    forward_s = samples * network.macs / speed
    backward_s = samples * (network.train_macs - network.macs) / speed
    compute_s = forward_s + backward_s
    reduce_s = _estimate_buckets(case, devices, network)
    jitter = find_jitter(case)
    formula_s = formulas.ddp_s(forward_s, backward_s, 0.0, reduce_s)
    step_s = simulate.simulate_ddp(forward_s, backward_s, 0.0, reduce_s, count, STEPS, jitter)
    bottleneck = "compute"
    if sum(reduce_s) > backward_s:
        bottleneck = "the all-reduce"
    return replace(
        row,
        formula_samples_per_s=case.batch / formula_s,
        samples_per_s=case.batch / step_s,
        bound_samples_per_s=case.batch / compute_s,
        efficiency=compute_s / step_s,
        bottleneck=bottleneck,
    )


def _estimate_buckets(
    case: ForecastCase, devices: Sequence[ClusterDevice], network: BlockCost
) -> list[float]:
    """Return the seconds of every gradient bucket's all-reduce; none on a single device."""
    if len(devices) == 1:
        return []
    gradients_bytes = parameter_memory(network.params, case.config).gradients_bytes
    buckets = max(1, -(-gradients_bytes // _BUCKET_BYTES))  # rounded up
    purpose = "its devices add up gradients"
    return [estimate_all_reduce(case, devices, gradients_bytes // buckets, purpose)] * buckets


def _add_run_seconds(case: ForecastCase, row: ForecastRow) -> ForecastRow:
    """Return a row with the seconds of the whole run with failures, by formula and simulation."""
    if row.samples_per_s is None or row.formula_samples_per_s is None:
        return row
    # The devices fail independently, so their rates add up.
    intervals_s = list_failure_intervals(case)[: row.devices]
    rate = sum(1 / interval_s for interval_s in intervals_s)
    mtbf_s = 1 / rate if rate else math.inf
    restart_s = case.cluster.restart_s
    checkpoint_s = max(case.config.run.checkpoint_every_s, 1.0)
    useful_s = case.steps * case.batch / row.formula_samples_per_s
    formula_run_s = formulas.expected_s(useful_s, checkpoint_s, restart_s, mtbf_s)
    if math.isinf(formula_run_s):
        return row
    if checkpoint_s > 5 * mtbf_s:
        # Nearly every attempt fails before its first checkpoint, so a simulation would not end.
        return replace(row, formula_run_s=formula_run_s)

    # All random failures come from one process with the rate of all devices together.
    step_s = case.batch / row.samples_per_s
    finished_s = np.arange(1, case.steps + 1) * step_s
    runs_s = []
    for seed in range(PATHS):
        failures = Failures(1, mtbf_s, restart_s, checkpoint_s, seed)
        runs_s.append(simulate.add_failures(finished_s, failures))
    return replace(row, formula_run_s=formula_run_s, run_s=sum(runs_s) / PATHS)


def list_failure_intervals(case: ForecastCase) -> list[float]:
    """Return the mean seconds between failures of every device, in the order of the cluster.

    They are infinite where the file has none.
    """
    return [spec.mtbf_s or math.inf for spec in case.cluster.all_specs]

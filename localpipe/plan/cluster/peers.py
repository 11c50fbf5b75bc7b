"""localpipe and its peers on the devices of a cluster: samples per second by formula and by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from localpipe.errors import UserError
from localpipe.plan.cluster import formulas, simulate
from localpipe.plan.cluster.block_costs import BlockCost, balance_blocks
from localpipe.plan.cluster.formulas import MicroTiming
from localpipe.plan.cluster.machines import ClusterDevice, ClusterLink
from localpipe.plan.cluster.placement import (
    ForecastCase,
    PlacedWorker,
    case_jitter,
    find_bottleneck,
    pipeline_timing,
    require_link,
    ring_seconds,
)
from localpipe.plan.cluster.simulate import Failures
from localpipe.plan.memory import parameter_memory
from localpipe.plan.tables import format_bytes

STEPS = 2000  # of the simulated pipeline
PEER_STEPS = 20  # of the simulated synchronous schedules, each of many micro-batches
PATHS = 20  # of random failures
_BUCKET_BYTES = 25 * 2**20  # torch's default for DistributedDataParallel
_ITEM_BYTES = {"fp32": 4, "bf16": 2}  # of what the peers send
_FORMULAS = {
    "gpipe": formulas.gpipe_s,
    "1f1b": formulas.one_f_one_b_s,
    "zb-h1": formulas.zero_bubble_s,
}


@dataclass(frozen=True)
class ForecastRow:
    """One system on the cluster. Figures are None where it cannot run, and `why_not` says why."""

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
    """Return localpipe's row and one for every peer on the same devices, synchronous ones at each count of micro-batches."""
    rows = [_localpipe(case, workers), *_peers(case, workers, blocks, micro_batches)]
    return tuple(_whole_run(case, row) for row in rows)


def _localpipe(case: ForecastCase, workers: Sequence[PlacedWorker]) -> ForecastRow:
    timing = pipeline_timing(workers)
    run = simulate.simulate_pipeline(
        timing, STEPS, case.config.pipeline.depth, case_jitter(case), case.replicas
    )
    bound = case.batch / max(worker.compute_s for worker in workers)
    return ForecastRow(
        system="localpipe",
        devices=len(workers) * case.replicas,
        micro_batches=None,
        cut=[plan.last for plan in case.plans[:-1]],
        formula_samples_per_s=case.batch / formulas.period_s(timing),
        samples_per_s=case.batch / run.period_s,
        bound_samples_per_s=bound,
        efficiency=case.batch / run.period_s / bound,
        memory_bytes=max(worker.memory.total_bytes for worker in workers),
        bottleneck=find_bottleneck(workers),
    )


def _peers(
    case: ForecastCase,
    workers: Sequence[PlacedWorker],
    blocks: Sequence[BlockCost],
    micro_batches: Sequence[int],
) -> Iterator[ForecastRow]:
    """Yield a row for every peer on the same devices, each trained end to end at the cut that suits it."""
    seats = [place for worker in workers for place in worker.places]
    if len(workers) > 1 and case.replicas == 1 and len(workers) <= len(blocks):
        for count in micro_batches:
            for schedule in ("zb-h1", "1f1b", "gpipe"):
                yield _attempt(
                    schedule,
                    len(seats),
                    count,
                    partial(_synchronous, case, seats, blocks, schedule, count),
                )
    if len(seats) > 1:
        yield _attempt("ddp", len(seats), None, partial(_data_parallel, case, seats, blocks, "ddp"))
    yield _attempt("e2e", 1, None, partial(_data_parallel, case, seats[:1], blocks, "e2e"))


def _attempt(
    system: str, devices: int, micro_batches: int | None, forecast: Callable[[], ForecastRow]
) -> ForecastRow:
    """Return a peer's row, or why there is none; a link that it lacks is its own misfortune."""
    try:
        return forecast()
    except UserError as error:
        return ForecastRow(
            system,
            devices,
            micro_batches,
            None,
            why_not=str(error).split("; ")[0].removeprefix("cluster: "),
        )


def _synchronous(
    case: ForecastCase,
    seats: Sequence[ClusterDevice],
    blocks: Sequence[BlockCost],
    schedule: str,
    count: int,
) -> ForecastRow:
    """Return the row of a synchronous pipeline of `count` micro-batches."""
    wires = [
        require_link(case, a, b, f"{schedule} sends")
        for a, b in zip(seats, seats[1:], strict=False)
    ]
    samples = case.batch / count
    cut, groups = _groups(case, seats, blocks, samples, min(wire.bytes_per_s for wire in wires))
    held = [_in_flight(schedule, stage, len(seats), count) * samples for stage in range(len(seats))]
    needs = [
        _static(case, group) + _held(group, kept) for group, kept in zip(groups, held, strict=True)
    ]
    row = ForecastRow(schedule, len(seats), count, cut, memory_bytes=max(needs))
    for need, seat in zip(needs, seats, strict=True):
        if need > case.cluster.device(seat).memory_bytes:
            return replace(row, why_not=f"{format_bytes(need)} do not fit {seat.device}")
    timing = _micro_timing(case, seats, groups, wires, samples)
    jitter = case_jitter(case)
    step = simulate.simulate_synchronous(
        schedule, timing, count, PEER_STEPS if jitter.spread else 4, jitter
    )
    bound = case.batch / (count * max(timing.compute_s))
    return replace(
        row,
        formula_samples_per_s=case.batch / _FORMULAS[schedule](timing, count),
        samples_per_s=case.batch / step,
        bound_samples_per_s=bound,
        efficiency=case.batch / step / bound,
        bottleneck=_limit(schedule, timing, count),
    )


def _limit(schedule: str, timing: MicroTiming, count: int) -> str:
    """Say what keeps a synchronous pipeline from its bound: its order of work, or the time on its edges."""
    none = (0.0,) * (timing.stages - 1)
    unlinked = _FORMULAS[schedule](replace(timing, transfer_s=none, latency_s=none), count)
    idle = unlinked - count * max(timing.compute_s)
    return "its links" if _FORMULAS[schedule](timing, count) - unlinked > idle else "the bubble"


def _groups(
    case: ForecastCase,
    seats: Sequence[ClusterDevice],
    blocks: Sequence[BlockCost],
    samples: float,
    bytes_per_s: float,
) -> tuple[list[int], list[Sequence[BlockCost]]]:
    """Return the cut that balances the blocks' own work and messages, and the blocks of each stage."""
    speed, size = (
        min(case.macs_per_s(seat) for seat in seats),
        _ITEM_BYTES[case.config.run.precision],
    )
    compute = [samples * block.train_macs / speed for block in blocks]
    cut = balance_blocks(
        compute, [samples * block.outputs * size / bytes_per_s for block in blocks], len(seats)
    )
    starts = [0, *(last + 1 for last in cut)]
    return list(cut), [
        blocks[start:end] for start, end in zip(starts, [*starts[1:], len(blocks)], strict=True)
    ]


def _micro_timing(
    case: ForecastCase,
    seats: Sequence[ClusterDevice],
    groups: Sequence[Sequence[BlockCost]],
    wires: Sequence[ClusterLink],
    samples: float,
) -> MicroTiming:
    """Return the seconds of one micro-batch: every product has a forward and two gradients of the same size."""
    forward, inputs, weights = [], [], []
    for seat, group in zip(seats, groups, strict=True):
        second = case.macs_per_s(seat) / samples
        macs, train = sum(block.macs for block in group), sum(block.train_macs for block in group)
        forward.append(macs / second)
        weights.append(min(macs, train - macs) / second)
        inputs.append(max(train - 2 * macs, 0) / second)
    size = samples * _ITEM_BYTES[case.config.run.precision]
    return MicroTiming(
        forward_s=tuple(forward),
        input_s=tuple(inputs),
        weight_s=tuple(weights),
        update_s=(0.0,) * len(seats),
        transfer_s=tuple(
            size * g[-1].outputs / w.bytes_per_s for g, w in zip(groups, wires, strict=False)
        ),
        latency_s=tuple(wire.latency_s for wire in wires),
    )


def _in_flight(schedule: str, stage: int, stages: int, micro_batches: int) -> int:
    """Return the micro-batches whose activations a stage holds at once."""
    most = {"gpipe": micro_batches, "1f1b": stages - stage, "zb-h1": stages}[schedule]
    return min(most, micro_batches)


def _static(case: ForecastCase, group: Sequence[BlockCost]) -> int:
    return parameter_memory(sum(block.params for block in group), case.config).total_bytes


def _held(group: Sequence[BlockCost], samples: float) -> int:
    return int(samples * sum(block.held_bytes for block in group))


def _data_parallel(
    case: ForecastCase, seats: Sequence[ClusterDevice], blocks: Sequence[BlockCost], system: str
) -> ForecastRow:
    """Return the row of the whole network on every device, gradients added up in buckets while the backward goes on."""
    samples = case.batch / len(seats)
    need = _static(case, blocks) + _held(blocks, samples)
    row = ForecastRow(system, len(seats), None, None, memory_bytes=need)
    tightest = min(seats, key=lambda seat: case.cluster.device(seat).memory_bytes)
    if need > case.cluster.device(tightest).memory_bytes:
        return replace(row, why_not=f"{format_bytes(need)} do not fit {tightest.device}")
    speed = min(case.macs_per_s(place) for place in seats)
    forward = samples * sum(block.macs for block in blocks) / speed
    backward = samples * sum(block.train_macs - block.macs for block in blocks) / speed
    gradients = parameter_memory(sum(block.params for block in blocks), case.config).gradients_bytes
    buckets = max(1, -(-gradients // _BUCKET_BYTES)) if len(seats) > 1 else 0
    reduce = (
        [ring_seconds(case, seats, gradients // buckets, "its devices")] * buckets
        if buckets
        else []
    )
    jitter = case_jitter(case)
    step = simulate.simulate_ddp(forward, backward, 0.0, reduce, len(seats), STEPS, jitter)
    return replace(
        row,
        formula_samples_per_s=case.batch / formulas.ddp_s(forward, backward, 0.0, reduce),
        samples_per_s=case.batch / step,
        bound_samples_per_s=case.batch / (forward + backward),
        efficiency=(forward + backward) / step,
        bottleneck="the all-reduce" if sum(reduce) > backward else "compute",
    )


def _whole_run(case: ForecastCase, row: ForecastRow) -> ForecastRow:
    """Return a row with the seconds of the whole run, failures included, by formula and by simulation."""
    if row.samples_per_s is None or row.formula_samples_per_s is None:
        return row
    rate = sum(1 / mtbf for mtbf in failure_intervals(case)[: row.devices])
    every, restart = max(case.config.run.checkpoint_every_s, 1.0), case.cluster.restart_s
    mtbf = 1 / rate if rate else math.inf
    formula = formulas.expected_s(
        case.steps * case.batch / row.formula_samples_per_s, every, restart, mtbf
    )
    if every > 5 * mtbf:  # it fails again and again before its first checkpoint
        return replace(row, formula_run_s=formula if math.isfinite(formula) else None)
    finished = np.arange(1, case.steps + 1) * (case.batch / row.samples_per_s)
    paths = [
        simulate.add_failures(finished, Failures(1, mtbf, restart, every, seed))
        for seed in range(PATHS)
    ]
    return replace(row, formula_run_s=formula, run_s=sum(paths) / PATHS)


def failure_intervals(case: ForecastCase) -> list[float]:
    """Return every device's mean seconds between failures, in the order of the cluster."""
    return [case.cluster.device(place).mtbf_s or math.inf for place in case.cluster.places]

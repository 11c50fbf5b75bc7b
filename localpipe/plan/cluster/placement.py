"""Where a pipeline's workers run on a cluster, and what that makes of their seconds and their memory.

A worker's step time is its multiply-accumulates over what its device achieves, unless seconds were measured. Workers take
the cluster's devices in order, so neighbours in the pipeline are neighbours on a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.networks.blueprint import Blueprint
from localpipe.pipeline.stages.stage_plan import StagePlan
from localpipe.pipeline.workers.mesh import assign_hosts
from localpipe.plan.cluster import formulas, simulate
from localpipe.plan.cluster.formulas import Timing
from localpipe.plan.cluster.machines import Cluster, ClusterDevice, ClusterLink
from localpipe.plan.cluster.simulate import Jitter
from localpipe.plan.costs import StageCost
from localpipe.plan.memory import MemoryUse, worker_memory


@dataclass(frozen=True)
class ForecastCase:
    """What is forecast: a resolved configuration, its plan and costs, the cluster, and the run's number of steps.

    `seconds` are a measured (before the send, after it) of every stage for one batch; None takes the devices' figures.
    """

    config: Resolved
    blueprint: Blueprint
    plans: tuple[StagePlan, ...]
    costs: tuple[StageCost, ...]
    cluster: Cluster
    source: str
    steps: int
    seconds: tuple[tuple[float, float], ...] | None = None

    @property
    def batch(self) -> int:
        """Images in a batch, over all replicas."""
        return self.config.data.batch_size

    @property
    def replicas(self) -> int:
        """Copies of every stage."""
        counts = set(self.config.replicas)
        if len(counts) > 1:
            raise UserError(
                "cluster: pipeline.replicas lists different numbers, which a forecast does not know; give one for all"
            )
        return counts.pop()

    def macs_per_s(self, place: ClusterDevice) -> float:
        """Return the multiply-accumulates per second that a device is taken to achieve."""
        device = self.cluster.device(place)
        if self.config.run.precision not in device.flop_per_s:
            known = ", ".join(device.flop_per_s)
            raise UserError(
                f"cluster: {place.device} has no flop_per_s.{self.config.run.precision} ({self.source}); it has {known}; "
                "add it, or set run.precision"
            )
        return device.flop_per_s[self.config.run.precision] * device.achievable / 2


@dataclass(frozen=True)
class PlacedWorker:
    """One position of the pipeline: its stages, where its replicas run, its seconds for a batch, and its message."""

    stages: range
    places: tuple[ClusterDevice, ...]
    before_s: float
    after_s: float
    reduce_s: float
    memory: MemoryUse
    message_bytes: int
    wire: str | None
    transfer_s: float
    latency_s: float

    @property
    def compute_s(self) -> float:
        """Seconds of work for one batch, without waiting for replicas."""
        return self.before_s + self.after_s


def place_workers(case: ForecastCase, processes: int | None) -> tuple[PlacedWorker, ...]:
    """Return every position of the pipeline on the cluster; raises UserError where a link or memory is missing."""
    places, replicas = case.cluster.places, case.replicas
    wanted = (
        processes
        if processes is not None
        else min(len(case.plans) * replicas, len(places) // replicas * replicas)
    )
    if wanted > len(places) or wanted < replicas:
        raise UserError(
            f"cluster: {case.source} has {len(places)} devices, and the plan needs {max(wanted, replicas)}; lower "
            "pipeline.processes or pipeline.replicas, or add devices"
        )
    hosts = assign_hosts((replicas,) * len(case.plans), wanted)
    hosted = [host.stages for host in hosts if host.replica == 0]
    seats = [
        places[i : wanted : len(hosted)] for i in range(len(hosted))
    ]  # one whole pipeline after the other
    workers = [_worker(case, stages, seat) for stages, seat in zip(hosted, seats, strict=True)]
    for i, worker in enumerate(workers):
        _check_memory(case, worker)
        if i + 1 < len(workers):
            workers[i] = _joined(case, i, worker, workers[i + 1])
    return tuple(workers)


def _worker(case: ForecastCase, stages: range, seat: tuple[ClusterDevice, ...]) -> PlacedWorker:
    costs, plans = case.costs[stages.start : stages.stop], case.plans[stages.start : stages.stop]
    parts = [_stage_seconds(case, stage, seat) for stage in stages]
    before = sum(early + late for early, late in parts[:-1]) + parts[-1][0]
    held = worker_memory(plans, costs, case.config, case.replicas)
    ring = ring_seconds(case, seat, held.gradients_bytes, f"the replicas of stage {stages[-1]}")
    sends = plans[-1].sends
    nbytes = 0 if sends is None else sends.nbytes
    return PlacedWorker(stages, seat, before, parts[-1][1], ring, held, nbytes, None, 0.0, 0.0)


def _stage_seconds(
    case: ForecastCase, stage: int, seat: tuple[ClusterDevice, ...]
) -> tuple[float, float]:
    """Return the seconds of a stage before and after its send, on the slowest of its replicas' devices."""
    if case.seconds is not None:
        before, after = case.seconds[stage]
        return before / case.replicas, after / case.replicas
    cost, config = case.costs[stage], case.config
    early = cost.macs + cost.context_macs
    if config.reconciles and stage < len(case.plans) - 1:
        early += (
            3 * cost.aux_macs
        )  # the head's forward pass and its two gradients come before the send
    early = min(early, cost.train_macs)
    speed = min(case.macs_per_s(place) for place in seat)
    samples = case.batch / case.replicas
    return samples * early / speed, samples * (cost.train_macs - early) / speed


def _check_memory(case: ForecastCase, worker: PlacedWorker) -> None:
    there = min(case.cluster.device(place).memory_bytes for place in worker.places)
    if worker.memory.total_bytes > there:
        kinds = asdict(worker.memory)
        largest = max(kinds, key=lambda kind: kinds[kind])
        raise UserError(
            f"cluster: stage {worker.stages[-1]} needs {worker.memory.total_bytes:,} bytes, most of them "
            f"{largest.removesuffix('_bytes')}, and {worker.places[0].device} of {worker.places[0].node} has {there:,.0f} "
            f"({case.source}); lower data.batch_size, or cut the network into more stages"
        )


def _joined(
    case: ForecastCase, position: int, worker: PlacedWorker, following: PlacedWorker
) -> PlacedWorker:
    """Return a worker with the edge behind it: replicas send their rows side by side, nodes share one wire."""
    pairs = list(zip(worker.places, following.places, strict=True))
    slowest, latency, name = 0.0, 0.0, None
    for one, other in pairs:
        wire = require_link(case, one, other, f"worker {position} sends to worker {position + 1}")
        between = (one.node, other.node)
        sharing = (
            sum(pair == between for pair in ((a.node, b.node) for a, b in pairs))
            if one.node != other.node
            else 1
        )
        seconds = worker.message_bytes / len(pairs) * sharing / wire.bytes_per_s
        if name is None or seconds + wire.latency_s > slowest + latency:
            slowest, latency, name = seconds, wire.latency_s, case.cluster.wire_name(one, other)
    return replace(worker, wire=name, transfer_s=slowest, latency_s=latency)


def require_link(
    case: ForecastCase, one: ClusterDevice, other: ClusterDevice, what: str
) -> ClusterLink:
    wire = case.cluster.wire(one, other)
    if wire is not None:
        return wire
    if one.node == other.node:
        raise UserError(
            f"cluster: no link joins the devices of {one.node} ({case.source}), and {what} there; add nodes.{one.name}.wire"
        )
    raise UserError(
        f"cluster: no link joins {one.node} and {other.node} ({case.source}), and {what} over it; "
        f"add {{between: [{one.name}, {other.name}], wire: ...}} to links"
    )


def ring_seconds(
    case: ForecastCase, seat: Sequence[ClusterDevice], nbytes: int, what: str
) -> float:
    """Return the seconds of an all-reduce in a ring over these devices, at the pace of its slowest wire."""
    if len(seat) == 1:
        return 0.0
    ring = [
        require_link(case, a, b, f"{what} add up gradients")
        for a, b in zip(seat, [*seat[1:], seat[0]], strict=True)
    ]
    pace, latency = min(wire.bytes_per_s for wire in ring), max(wire.latency_s for wire in ring)
    return formulas.ring_all_reduce_s(nbytes, len(seat), pace, latency)


def pipeline_timing(workers: Sequence[PlacedWorker]) -> Timing:
    """Return the seconds that formulas and simulation take."""
    edges = workers[:-1]
    return Timing(
        tuple(worker.before_s for worker in workers),
        tuple(worker.after_s + worker.reduce_s for worker in workers),
        tuple(worker.transfer_s for worker in edges),
        tuple(worker.latency_s for worker in edges),
    )


def case_jitter(case: ForecastCase) -> Jitter:
    spread = max(case.cluster.device(place).jitter for place in case.cluster.places)
    return Jitter("uniform", spread) if spread else simulate.STEADY


def find_bottleneck(workers: Sequence[PlacedWorker]) -> str:
    """Name the slowest stage or edge."""
    timing = pipeline_timing(workers)
    slowest = max(range(len(workers)), key=lambda i: timing.compute_s[i])
    if timing.edge_s and max(timing.edge_s) > timing.compute_s[slowest]:
        edge = max(range(len(timing.edge_s)), key=lambda i: timing.edge_s[i])
        return f"edge {edge} -> {edge + 1} ({workers[edge].wire})"
    stages = workers[slowest].stages
    name = f"stage {stages[0]}" if len(stages) == 1 else f"stages {stages[0]}..{stages[-1]}"
    return f"{name} ({workers[slowest].places[0].device})"

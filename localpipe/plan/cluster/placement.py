"""Placement of a pipeline's workers on a cluster, with each worker's seconds and memory.

The time of a worker's step is its multiply-accumulates over the rate that its device achieves,
unless seconds were measured. Workers take the cluster's devices in order, so neighbours in the
pipeline are neighbours on a node.
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

# Measured seconds of every stage for one batch: before the send, and after it.
StageSeconds = tuple[tuple[float, float], ...]


class ClusterError(UserError):
    """A plan that a cluster cannot run. `cause` is the reason alone, short enough for a table.

    As text it is one line with cause and advice.
    """

    def __init__(self, cause: str, advice: str) -> None:
        super().__init__(f"cluster: {cause}; {advice}")
        self.cause = cause


@dataclass(frozen=True)
class ForecastCase:
    """The input of a forecast: a resolved configuration, its plan and costs, cluster and steps.

    steps: of the whole run. `source` is the cluster's file, for errors. `seconds` is None where the
    speed of the cluster's devices decides.
    """

    config: Resolved
    blueprint: Blueprint
    plans: tuple[StagePlan, ...]
    costs: tuple[StageCost, ...]
    cluster: Cluster
    source: str
    steps: int
    seconds: StageSeconds | None = None

    @property
    def batch(self) -> int:
        """Images in a batch, over all replicas."""
        return self.config.data.batch_size

    @property
    def messages(self) -> int:
        """The messages of a batch, whose gradients add up to one update."""
        return self.config.optim.accumulate

    @property
    def replicas(self) -> int:
        """The number of replicas of every stage. Raises UserError where stages differ."""
        counts = set(self.config.replicas)
        if len(counts) > 1:
            raise UserError(
                "cluster: pipeline.replicas lists different numbers, which a forecast does not "
                "know; give one for all"
            )
        return counts.pop()

    @property
    def samples(self) -> float:
        """Images of a message that one replica trains on. Raises UserError as `replicas`."""
        return self.batch / self.messages / self.replicas

    @property
    def cut(self) -> list[int]:
        """The last block of every stage but the last."""
        return [plan.last for plan in self.plans[:-1]]

    def find_macs_per_s(self, device: ClusterDevice) -> float:
        """Return the multiply-accumulates per second that a device achieves.

        Raises ClusterError where the file has no speed for the configuration's precision.
        """
        spec = self.cluster.find_spec(device)
        precision = self.config.run.precision
        if precision not in spec.flop_per_s:
            cause = f"{device.kind} has no flop_per_s.{precision} ({self.source})"
            precisions = ", ".join(spec.flop_per_s)
            raise ClusterError(cause, f"it has {precisions}; add it, or set run.precision")
        return spec.flop_per_s[precision] * spec.achievable / 2

    def find_slowest_macs_per_s(self, devices: Sequence[ClusterDevice]) -> float:
        """Return the multiply-accumulates per second of the slowest of several devices.

        devices: at least one. Raises ClusterError as `find_macs_per_s`.
        """
        return min(self.find_macs_per_s(device) for device in devices)


@dataclass(frozen=True)
class PlacedWorker:
    """One position of the pipeline: its stages, their replicas' devices, its seconds and memory.

    Seconds are for one message, or a replica's part of it. A message is a batch, or one of those
    that make one (`optim.accumulate`). `reduce_s` is a message's share of the all-reduce, which
    comes once a batch. devices: one for each replica.
    `message_bytes`, `wire` (a name among the cluster's wires), `transfer_s` and `latency_s`
    describe the edge to the next worker. For the last worker they are 0, and `wire` is None.
    """

    stages: range
    devices: tuple[ClusterDevice, ...]
    before_s: float
    after_s: float
    reduce_s: float
    memory: MemoryUse
    message_bytes: int
    wire: str | None = None
    transfer_s: float = 0.0
    latency_s: float = 0.0

    @property
    def compute_s(self) -> float:
        """Seconds of work for one message, without the all-reduce between replicas."""
        return self.before_s + self.after_s


def assign_workers(case: ForecastCase, processes: int | None) -> tuple[PlacedWorker, ...]:
    """Return a worker for every position of the pipeline on the cluster, first stage first.

    processes: workers of all replicas together, at most one for each stage of each. None takes as
    many as stages and devices allow. Raises UserError where memory or a device is missing, or
    replicas differ. Raises ClusterError, which is one, where a link or a device's speed is missing.
    """
    devices = case.cluster.all_devices
    replicas = case.replicas
    if processes is None:
        usable = len(devices) // replicas * replicas
        processes = min(len(case.plans) * replicas, usable)
    if processes > len(devices) or processes < replicas:
        needed = max(processes, replicas)
        raise UserError(
            f"cluster: {case.source} has {len(devices)} devices, and the plan needs {needed}; "
            "lower pipeline.processes or pipeline.replicas, or add devices"
        )

    # Whole pipelines follow each other on the devices, so replicas lie a pipeline's length apart.
    hosts = assign_hosts((replicas,) * len(case.plans), processes)
    stages_of_workers = [host.stages for host in hosts if host.replica == 0]
    length = len(stages_of_workers)
    workers = []
    for position, stages in enumerate(stages_of_workers):
        replica_devices = devices[position:processes:length]
        workers.append(_assign_worker(case, stages, replica_devices))

    # A worker's edge is known only after its neighbour has devices.
    for position, worker in enumerate(workers):
        _check_memory(case, worker)
        if position + 1 < length:
            neighbour = workers[position + 1]
            workers[position] = _add_edge(case, position, worker, neighbour)
    return tuple(workers)


def _assign_worker(
    case: ForecastCase, stages: range, devices: tuple[ClusterDevice, ...]
) -> PlacedWorker:
    """Return a worker without its edge. It sends after the early part of its last stage."""
    costs = case.costs[stages.start : stages.stop]
    plans = case.plans[stages.start : stages.stop]
    seconds = [_estimate_stage(case, stage, devices) for stage in stages]
    whole_stages_s = [sum(parts) for parts in seconds[:-1]]
    before_s, after_s = seconds[-1]
    memory = worker_memory(plans, costs, case.config, case.replicas)
    purpose = f"the replicas of stage {stages[-1]} add up gradients"
    reduce_s = estimate_all_reduce(case, devices, memory.gradients_bytes, purpose)
    message_bytes = 0
    if plans[-1].sends is not None:
        message_bytes = plans[-1].sends.nbytes
    return PlacedWorker(
        stages=stages,
        devices=devices,
        before_s=sum(whole_stages_s) + before_s,
        after_s=after_s,
        reduce_s=reduce_s / case.messages,
        memory=memory,
        message_bytes=message_bytes,
    )


def _estimate_stage(
    case: ForecastCase, stage: int, devices: Sequence[ClusterDevice]
) -> tuple[float, float]:
    """Return the seconds of a stage before and after its send, on the slowest of its devices."""
    if case.seconds is not None:
        before_s, after_s = case.seconds[stage]
        parts = case.replicas * case.messages
        return before_s / parts, after_s / parts
    cost = case.costs[stage]
    early_macs = cost.macs + cost.context_macs
    if case.config.reconciles and stage < len(case.plans) - 1:
        # The head's forward pass and its two gradients come before the send.
        early_macs += 3 * cost.aux_macs
    early_macs = min(early_macs, cost.train_macs)
    late_macs = cost.train_macs - early_macs
    speed = case.find_slowest_macs_per_s(devices)
    before_s = case.samples * early_macs / speed
    after_s = case.samples * late_macs / speed
    return before_s, after_s


def _check_memory(case: ForecastCase, worker: PlacedWorker) -> None:
    """Raise UserError where a worker does not fit the smallest of its devices."""
    specs = [case.cluster.find_spec(device) for device in worker.devices]
    capacity = min(spec.memory_bytes for spec in specs)
    total_bytes = worker.memory.total_bytes
    if total_bytes <= capacity:
        return
    stage = worker.stages[-1]
    device = worker.devices[0]
    uses = asdict(worker.memory)
    largest = max(uses, key=lambda name: uses[name]).removesuffix("_bytes")
    raise UserError(
        f"cluster: stage {stage} needs {total_bytes:,} bytes, most of them {largest}, and "
        f"{device.kind} of {device.machine} has {capacity:,.0f} ({case.source}); "
        "lower data.batch_size, or cut the network into more stages"
    )


def _add_edge(
    case: ForecastCase, position: int, worker: PlacedWorker, neighbour: PlacedWorker
) -> PlacedWorker:
    """Return a worker with the slowest link to its neighbour.

    Every replica sends its rows at the same time. Replicas on the same two machines share a link.
    """
    pairs = list(zip(worker.devices, neighbour.devices, strict=True))
    routes = [(sender.machine, receiver.machine) for sender, receiver in pairs]
    purpose = f"worker {position} sends to worker {position + 1}"
    name = None
    transfer_s = 0.0
    latency_s = 0.0
    for sender, receiver in pairs:
        link = require_link(case, sender, receiver, purpose)
        route = (sender.machine, receiver.machine)
        # Devices of one machine have a link each, two machines have one.
        senders = 1
        if sender.machine != receiver.machine:
            senders = routes.count(route)
        replica_bytes = worker.message_bytes / len(pairs)
        link_s = replica_bytes * senders / link.bytes_per_s
        edge_s = link_s + link.latency_s
        if name is None or edge_s > transfer_s + latency_s:
            name = case.cluster.find_link_name(sender, receiver)
            transfer_s = link_s
            latency_s = link.latency_s
    return replace(worker, wire=name, transfer_s=transfer_s, latency_s=latency_s)


def require_link(
    case: ForecastCase, first: ClusterDevice, second: ClusterDevice, purpose: str
) -> ClusterLink:
    """Return the link between two devices. Raises ClusterError, with the purpose, without one.

    purpose: a clause, such as `worker 0 sends to worker 1`.
    """
    link = case.cluster.find_link(first, second)
    if link is not None:
        return link
    if first.machine == second.machine:
        between = f"the devices of {first.machine}"
        cause = f"no link joins {between} ({case.source}), and {purpose} there"
        raise ClusterError(cause, f"add nodes.{first.node}.wire")
    between = f"{first.machine} and {second.machine}"
    cause = f"no link joins {between} ({case.source}), and {purpose} over it"
    pair = f"[{first.node}, {second.node}]"
    raise ClusterError(cause, f"add {{between: {pair}, wire: ...}} to links")


def estimate_all_reduce(
    case: ForecastCase, devices: Sequence[ClusterDevice], nbytes: int, purpose: str
) -> float:
    """Return the seconds of a ring all-reduce over these devices, at its slowest link's speed.

    devices: in the ring's order, at least one. A single one takes 0 s. nbytes: of what each holds.
    purpose: a clause for the ClusterError that is raised where a link is missing.
    """
    if len(devices) == 1:
        return 0.0
    links = []
    receivers = [*devices[1:], devices[0]]
    for sender, receiver in zip(devices, receivers, strict=True):
        links.append(require_link(case, sender, receiver, purpose))
    bytes_per_s = find_slowest_bandwidth(links)
    latency_s = max(link.latency_s for link in links)
    return formulas.ring_all_reduce_s(nbytes, len(devices), bytes_per_s, latency_s)


def find_slowest_bandwidth(links: Sequence[ClusterLink]) -> float:
    """Return the bytes per second of the slowest link. ValueError for no link."""
    return min(link.bytes_per_s for link in links)


def build_timing(workers: Sequence[PlacedWorker]) -> Timing:
    """Return the seconds of a placed pipeline, for the formulas and the simulation.

    Each worker counts as one stage. The all-reduce counts after the send.
    """
    before_s = []
    after_s = []
    for worker in workers:
        before_s.append(worker.before_s)
        after_s.append(worker.after_s + worker.reduce_s)
    transfer_s = []
    latency_s = []
    for worker in workers[:-1]:
        transfer_s.append(worker.transfer_s)
        latency_s.append(worker.latency_s)
    return Timing(tuple(before_s), tuple(after_s), tuple(transfer_s), tuple(latency_s))


def find_jitter(case: ForecastCase) -> Jitter:
    """Return the jitter of the cluster's least steady device, for all devices.

    It is uniform with seed 0, or `STEADY` where no device has any.
    """
    spread = max(spec.jitter for spec in case.cluster.all_specs)
    if spread == 0:
        return simulate.STEADY
    return Jitter("uniform", spread)


def find_bottleneck(workers: Sequence[PlacedWorker]) -> str:
    """Return the name of the slowest stage or edge, as `stage 1 (h100)` or `edge 0 -> 1 (lan)`.

    Edges have the numbers of workers. An edge counts only where it is slower than every worker.
    """
    timing = build_timing(workers)
    compute_s = timing.compute_s
    edge_s = timing.edge_s
    slowest = compute_s.index(max(compute_s))
    if edge_s and max(edge_s) > compute_s[slowest]:
        edge = edge_s.index(max(edge_s))
        wire = workers[edge].wire
        return f"edge {edge} -> {edge + 1} ({wire})"
    worker = workers[slowest]
    return f"{name_stages(worker)} ({worker.devices[0].kind})"


def name_stages(worker: PlacedWorker) -> str:
    """Return `stage 1`, or `stages 1..2` for a worker that hosts several."""
    first = worker.stages[0]
    last = worker.stages[-1]
    if first == last:
        return f"stage {first}"
    return f"stages {first}..{last}"

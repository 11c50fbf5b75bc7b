"""The memory of a worker by kind, from counts alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from localpipe.config.resolved import Resolved, least_replay
from localpipe.pipeline.channels.channel import RECEIVE_SLOTS
from localpipe.pipeline.channels.persistent_ring import ring_bytes
from localpipe.pipeline.stages.optimizer import find_optimizer
from localpipe.pipeline.stages.stage_plan import StagePlan
from localpipe.pipeline.workers.feedback import back_depth, list_pairs
from localpipe.pipeline.workers.mesh import assign_hosts
from localpipe.pipeline.workers.persistent_edges import back_slots, list_edges
from localpipe.plan.costs import StageCost

_REPLAY_BYTES, _MOST_REPLAY = 256 * 2**20, 64  # of an edge, where pipeline.replay is auto
_FLOAT = 4  # bytes: weights, gradients and optimizer state are fp32


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one worker by kind.

    `activations_bytes` are what autograd holds for a message. `buffers_bytes` are the messages in
    flight: `depth` sent, two received. With `method.feedback` the snapshots that the worker keeps
    and sends back are among them.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    buffers_bytes: int

    @property
    def total_bytes(self) -> int:
        """The bytes of all kinds together."""
        return sum(asdict(self).values())


def parameter_memory(params: int, config: Resolved, frozen: int = 0) -> MemoryUse:
    """Return the memory of `params` fp32 parameters, with their gradients and optimizer state.

    A moving average of the parameters counts as optimizer state. frozen: those of them that are not
    trained, and have weights alone. Activations and buffers are 0.
    """
    states = find_optimizer(config.optim).states_per_parameter(config.optim)
    states += int(config.optim.ema is not None)
    trained_bytes = (params - frozen) * _FLOAT
    return MemoryUse(params * _FLOAT, trained_bytes, states * trained_bytes, 0, 0)


def worker_memory(
    plans: Sequence[StagePlan], costs: Sequence[StageCost], config: Resolved, replicas: int = 1
) -> MemoryUse:
    """Return the memory of a worker that hosts consecutive stages of one replica.

    plans, costs: of these stages alone, at least one. Its boundaries to neighbours are edges. Its
    stages run in turn, so that only the largest one's activations are held at a time. A message is
    a batch, or one of the `optim.accumulate` that make one. replicas: each has its part of the
    message, rounded up, and of the buffers.
    """
    params = sum(cost.params + cost.aux_params + cost.context_params for cost in costs)
    untrained = sum(cost.frozen_params + cost.copied_params for cost in costs)
    fixed = parameter_memory(params, config, untrained)
    samples = _ceil_div(config.data.batch_size // config.optim.accumulate, replicas)
    activations = max(cost.activation_bytes_per_sample for cost in costs) * samples

    # Messages: two slots to receive, `depth` to send, and rings between the worker's own stages.
    depth = config.pipeline.depth
    buffers = 0
    if not plans[0].is_first:
        buffers += RECEIVE_SLOTS * plans[0].receives.nbytes
    if plans[-1].sends is not None:
        buffers += depth * plans[-1].sends.nbytes
    for plan in plans[:-1]:
        if plan.sends is not None:
            buffers += (depth + 1) * plan.sends.nbytes
    return MemoryUse(
        fixed.weights_bytes,
        fixed.gradients_bytes,
        fixed.optimizer_bytes,
        activations,
        _ceil_div(buffers, replicas) + snapshot_memory(plans, costs, config),
    )


def snapshot_memory(
    plans: Sequence[StagePlan], costs: Sequence[StageCost], config: Resolved
) -> int:
    """Return the bytes of the parameters that a worker keeps for earlier stages and sends back.

    plans, costs: as of `worker_memory`. It is 0 without `method.feedback`.
    """
    if not config.feeds_back:
        return 0
    feedback = config.method.feedback
    snapshots = feedback.lag // feedback.every + 1
    shared = {plan.stage: cost.shared_bytes for plan, cost in zip(plans, costs, strict=True)}
    nbytes = snapshots * sum(shared.values())
    # An edge back to another worker has a ring in host memory.
    ring = back_depth(feedback) + RECEIVE_SLOTS
    for later, earlier in list_pairs(feedback, plans[0].stages):
        if later in shared and earlier not in shared:
            nbytes += ring * shared[later]
    return nbytes


def fit_replay(config: Resolved, message_bytes: int) -> int:
    """Return the messages that an edge keeps under run.recover=stage, where it is `auto`.

    They are as many as fit 256 MiB, at most 64, and never fewer than a recovery needs.
    message_bytes: of the largest message.
    """
    return max(least_replay(config), min(_MOST_REPLAY, _REPLAY_BYTES // message_bytes))


def recovery_snapshot_bytes(costs: Sequence[StageCost], config: Resolved) -> int:
    """Return the bytes of the snapshots of all workers under run.recover=stage.

    costs: of all stages. A snapshot has the weights, the optimizer's state and the average.
    """
    memory = 0
    for cost in costs:
        params = cost.params + cost.aux_params + cost.context_params
        use = parameter_memory(params, config, cost.frozen_params + cost.copied_params)
        memory += use.weights_bytes + use.optimizer_bytes
    return memory


@dataclass(frozen=True)
class RecoveryMemory:
    """What run.recover=stage takes of shared memory, in all.

    messages: that every ring keeps. snapshots_bytes: of one snapshot of every worker.
    """

    messages: int
    rings_bytes: int
    snapshots_bytes: int


def _back_rings_bytes(costs: Sequence[StageCost], config: Resolved) -> int:
    """Return the bytes of the parameters in the rings of all edges back between two workers."""
    hosts = assign_hosts(config.replicas, config.pipeline.processes)
    nbytes = 0
    for later, earlier in list_pairs(config.method.feedback, config.stages):
        if not any(later in host.stages and earlier in host.stages for host in hosts):
            nbytes += back_slots(config) * costs[later].shared_bytes
    return nbytes


def recovery_memory(
    plans: Sequence[StagePlan], costs: Sequence[StageCost], config: Resolved
) -> RecoveryMemory | None:
    """Return what a run that recovers takes of shared memory, None for another run.

    plans, costs: of all stages.
    """
    replay = config.pipeline.replay
    if not config.recovers or replay is None:
        return None
    rings = sum(ring_bytes(schema, replay) for _, schema in list_edges(config, plans))
    if config.feeds_back:
        rings += _back_rings_bytes(costs, config)
    return RecoveryMemory(replay, rings, recovery_snapshot_bytes(costs, config))


@dataclass(frozen=True)
class Back:
    """What comes back from a stage to an earlier one.

    nbytes: of one snapshot. forward_bytes: those that go from the earlier stage to the next one in
    a step. every, lag: as in `method.feedback`.
    """

    later: int
    earlier: int
    parameters: int
    nbytes: int
    every: int
    lag: int
    forward_bytes: int

    @property
    def bytes_per_step(self) -> float:
        """The bytes that come back in a step, on average."""
        return self.nbytes / self.every


def list_back(
    plans: Sequence[StagePlan], costs: Sequence[StageCost], config: Resolved
) -> list[Back]:
    """Return what comes back, from every stage to every earlier one that copies it.

    plans, costs: of all stages. The list is empty without `method.feedback`.
    """
    if not config.feeds_back:
        return []
    feedback = config.method.feedback
    backs = []
    for later, earlier in list_pairs(feedback, len(plans)):
        sends = plans[earlier].sends
        assert sends is not None, "a later stage follows"
        backs.append(
            Back(
                later,
                earlier,
                costs[earlier].copied_params,
                costs[later].shared_bytes,
                feedback.every,
                feedback.lag,
                sends.nbytes * config.optim.accumulate,
            )
        )
    return backs


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)

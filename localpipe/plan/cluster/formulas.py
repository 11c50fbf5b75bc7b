"""Closed forms of a pipeline's speed, as pure functions of seconds. A simulation has to match them.

`K` is the number of stages and `m` the number of micro-batches. Every form says where it is exact
and where it is an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Seconds = tuple[float, ...]  # of every stage, or of every edge


@dataclass(frozen=True)
class Timing:
    """The seconds of a forward-only pipeline for one message: K stages and K - 1 edges.

    `before_s` lasts from a message's arrival to the send of its output. `after_s` lasts from there
    to the end of the update, an all-reduce between replicas included. `transfer_s` is message bytes
    / bandwidth. `latency_s` is one way. The lengths are not checked.
    """

    before_s: Seconds
    after_s: Seconds
    transfer_s: Seconds
    latency_s: Seconds

    @staticmethod
    def uniform(
        stages: int,
        before_s: float,
        after_s: float,
        transfer_s: float = 0.0,
        latency_s: float = 0.0,
    ) -> Timing:
        """Return the timing of equal stages, at least one, and equal edges."""
        edges = stages - 1
        return Timing(
            before_s=(before_s,) * stages,
            after_s=(after_s,) * stages,
            transfer_s=(transfer_s,) * edges,
            latency_s=(latency_s,) * edges,
        )

    @property
    def stages(self) -> int:
        """The number of stages."""
        return len(self.before_s)

    @property
    def compute_s(self) -> Seconds:
        """Every stage's seconds of work for one batch."""
        return _add_pairs(self.before_s, self.after_s)

    @property
    def edge_s(self) -> Seconds:
        """Every edge's seconds between two messages, K - 1 of them.

        They are the transfer, the arrival, and the receiver's `ready` on its way back.
        """
        round_trip_s = [2 * latency for latency in self.latency_s]
        return _add_pairs(self.transfer_s, round_trip_s)

    @property
    def hops_s(self) -> float:
        """Seconds that one message spends on all edges together, 0 for one stage."""
        return sum(self.transfer_s) + sum(self.latency_s)


@dataclass(frozen=True)
class MicroTiming:
    """The seconds of a synchronous pipeline for one micro-batch. Every edge works both ways.

    `input_s` is the backward pass for the input's gradient, `weight_s` the one for the weights'.
    `update_s` is spent once a step. The first four have K numbers, the last two K - 1.
    """

    forward_s: Seconds
    input_s: Seconds
    weight_s: Seconds
    update_s: Seconds
    transfer_s: Seconds
    latency_s: Seconds

    @staticmethod
    def uniform(
        stages: int,
        forward_s: float,
        input_s: float,
        weight_s: float,
        update_s: float = 0.0,
        transfer_s: float = 0.0,
        latency_s: float = 0.0,
    ) -> MicroTiming:
        """Return the timing of equal stages, at least one, and equal edges."""
        edges = stages - 1
        return MicroTiming(
            forward_s=(forward_s,) * stages,
            input_s=(input_s,) * stages,
            weight_s=(weight_s,) * stages,
            update_s=(update_s,) * stages,
            transfer_s=(transfer_s,) * edges,
            latency_s=(latency_s,) * edges,
        )

    @property
    def stages(self) -> int:
        """The number of stages."""
        return len(self.forward_s)

    @property
    def backward_s(self) -> Seconds:
        """Every stage's seconds of both backward passes."""
        return _add_pairs(self.input_s, self.weight_s)

    @property
    def compute_s(self) -> Seconds:
        """Every stage's seconds of work for one micro-batch, without the update."""
        return _add_pairs(self.forward_s, self.backward_s)

    @property
    def hops_s(self) -> float:
        """Seconds that one message spends on all edges together, in one direction."""
        return sum(self.transfer_s) + sum(self.latency_s)


def _add_pairs(first: Sequence[float], second: Sequence[float]) -> Seconds:
    return tuple(a + b for a, b in zip(first, second, strict=True))


# -- localpipe -------------------------------------------------------------------------------------


def period_s(timing: Timing) -> float:
    """Return the seconds of a steady step: those of the slowest stage or edge.

    Exact without jitter, at any depth.
    """
    return max(*timing.compute_s, *timing.edge_s, 0.0)


def fill_s(timing: Timing) -> float:
    """Return the seconds until the last stage begins: once a run, not once a step. Exact."""
    return sum(timing.before_s[:-1]) + timing.hops_s


def drain_s(timing: Timing) -> float:
    """Return the seconds from the first stage's last update to the last stage's.

    Exact where no stage is slower than the first.
    """
    compute_s = timing.compute_s
    return fill_s(timing) + compute_s[-1] - compute_s[0]


def run_s(timing: Timing, steps: int) -> float:
    """Return the seconds of a whole run of one step or more, fill and drain included.

    Exact without jitter, at any depth. The time is the longest path through the run's dependencies.
    Every path moves down the pipeline once, and goes round a cycle for every other step. The
    heaviest cycle is the step of one stage or the turn of one edge.
    """
    steady_s = (steps - 1) * period_s(timing)
    return fill_s(timing) + steady_s + timing.compute_s[-1]


# -- rival systems ---------------------------------------------------------------------------------


def bubble_ratio(micro_batches: int, stages: int) -> float:
    """Return (m + K - 1) / m, the seconds of a step of GPipe or 1F1B over the seconds of its work.

    m is at least 1. Exact on equal stages. Huang et al. 2019 (GPipe), Narayanan et al. 2019
    (PipeDream).
    """
    return (micro_batches + stages - 1) / micro_batches


def gpipe_s(timing: MicroTiming, micro_batches: int) -> float:
    """Return the seconds of a GPipe step, all forwards and then all backwards: two flow shops.

    Exact for any stages and edges, as long as the update is not the slowest part. The first stage's
    update counts.
    """
    forwards = _flow_shop_s(timing, timing.forward_s, micro_batches)
    backwards = _flow_shop_s(timing, timing.backward_s, micro_batches)
    return forwards + backwards + timing.update_s[0]


def _flow_shop_s(timing: MicroTiming, stage_s: Sequence[float], micro_batches: int) -> float:
    """Return the seconds in which m micro-batches pass every stage once, in one direction."""
    slowest_s = max(*stage_s, *timing.transfer_s, 0.0)
    first_s = sum(stage_s) + timing.hops_s
    return first_s + (micro_batches - 1) * slowest_s


def one_f_one_b_s(timing: MicroTiming, micro_batches: int) -> float:
    """Return the seconds of a step of 1F1B.

    Exact on equal stages without links, else an estimate. At most K - k micro-batches are in flight
    after stage k, so each of their rounds pays the way there and back. The first stage's update
    counts.
    """
    first_s = sum(timing.compute_s) + 2 * timing.hops_s
    turns_s = (micro_batches - 1) * _turn_s(timing)
    return first_s + turns_s + timing.update_s[0]


def _turn_s(timing: MicroTiming) -> float:
    """Return the seconds between two micro-batches of 1F1B.

    They are a stage's own work, or its round trip over the micro-batches in flight.
    """
    compute = timing.compute_s
    hops = _add_pairs(timing.transfer_s, timing.latency_s)
    turns = list(compute)
    for k in range(timing.stages):
        work = sum(compute[k:])
        links = 2 * sum(hops[k:])
        in_flight = timing.stages - k
        turns.append((work + links) / in_flight)
    return max(turns)


def zero_bubble_s(timing: MicroTiming, micro_batches: int) -> float:
    """Return the seconds of a step of ZB-H1: m (F + B + W) + (K - 1) (F + B - W).

    Qi et al. 2024 (arXiv 2401.10241). The paper takes W to be no longer than F: where it is longer,
    it can hide no more than F. Exact on equal stages without links for m >= K, else an estimate.
    """
    compute = timing.compute_s
    slowest = compute.index(max(compute))
    exposed = []
    for k in range(timing.stages):
        if k != slowest:
            forward_s = timing.forward_s[k] - timing.weight_s[k]
            exposed.append(timing.input_s[k] + max(forward_s, 0.0))
    turns_s = micro_batches * _turn_s(timing)
    step_s = turns_s + sum(exposed) + 2 * timing.hops_s
    return step_s + timing.update_s[0]


def ring_all_reduce_s(nbytes: float, members: int, bytes_per_s: float, latency_s: float) -> float:
    """Return the seconds of a ring all-reduce: 2 (n - 1) hops of bytes / n each.

    It is 0 for one member. nbytes: of what each member holds. Patarasuk and Yuan 2009.
    """
    if members == 1:
        return 0.0
    hop_s = nbytes / members / bytes_per_s + latency_s
    return 2 * (members - 1) * hop_s


def ddp_s(forward_s: float, backward_s: float, update_s: float, reduce_s: Sequence[float]) -> float:
    """Return the seconds of a data-parallel step that reduces gradients in buckets.

    reduce_s: seconds of every bucket, in order. It is empty where nothing is reduced. Bucket i of n
    is ready when i / n of the backward pass is done, and buckets are reduced one after the other.
    Exact for this model.
    """
    buckets = len(reduce_s)
    end_s = 0.0 if buckets else backward_s
    for i in range(buckets):
        ready_s = backward_s * (i + 1) / buckets
        end_s = max(end_s, ready_s + sum(reduce_s[i:]))
    return forward_s + end_s + update_s


# -- failures --------------------------------------------------------------------------------------


def expected_s(useful_s: float, checkpoint_s: float, restart_s: float, mtbf_s: float) -> float:
    """Return the expected seconds of a run that fails at random and restarts from its checkpoint.

    Each stretch of `checkpoint_s` costs (M + R) (exp(stretch / M) - 1). M is the mean time between
    failures of the whole cluster, R a restart that does not fail itself (Daly 2006, with free
    checkpoints). An infinite M gives `useful_s`. Infinity is returned where a stretch is longer
    than 100 M.
    """
    if math.isinf(mtbf_s):
        return useful_s
    if checkpoint_s > 100 * mtbf_s:
        return math.inf
    stretches = useful_s / checkpoint_s
    return stretches * (mtbf_s + restart_s) * math.expm1(checkpoint_s / mtbf_s)

"""Closed forms of what a pipeline can do, as pure functions of seconds: the figures a simulation has to reproduce.

`K` is the number of stages, `m` of micro-batches. Where a form is exact and where it is an estimate stands with each one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """A forward-only pipeline's seconds for one batch: K stages and the K - 1 edges between them.

    `before_s` lasts from a message's arrival to its successor's send, `after_s` from there to the end of the update (an
    all-reduce between replicas included); `transfer_s` is message bytes / bandwidth, `latency_s` one way.
    """

    before_s: tuple[float, ...]
    after_s: tuple[float, ...]
    transfer_s: tuple[float, ...]
    latency_s: tuple[float, ...]

    @staticmethod
    def uniform(
        stages: int,
        before_s: float,
        after_s: float,
        transfer_s: float = 0.0,
        latency_s: float = 0.0,
    ) -> Timing:
        """Return a pipeline of equal stages and equal edges."""
        edges = stages - 1
        return Timing(
            (before_s,) * stages, (after_s,) * stages, (transfer_s,) * edges, (latency_s,) * edges
        )

    @property
    def stages(self) -> int:
        """The number of stages."""
        return len(self.before_s)

    @property
    def compute_s(self) -> tuple[float, ...]:
        """Every stage's seconds of work for one batch."""
        return tuple(
            before + after for before, after in zip(self.before_s, self.after_s, strict=True)
        )

    @property
    def edge_s(self) -> tuple[float, ...]:
        """Every edge's seconds between two messages: the bytes, the receiver's `ready` going back, the arrival."""
        return tuple(
            move + 2 * wait for move, wait in zip(self.transfer_s, self.latency_s, strict=True)
        )

    @property
    def hops_s(self) -> float:
        """Seconds that one message spends on all edges together."""
        return sum(self.transfer_s) + sum(self.latency_s)


@dataclass(frozen=True)
class MicroTiming:
    """A synchronous pipeline's seconds for one micro-batch; every edge carries one message each way.

    `input_s` is the backward pass for the input's gradient, `weight_s` the one for the weights'; `update_s` is once a step.
    """

    forward_s: tuple[float, ...]
    input_s: tuple[float, ...]
    weight_s: tuple[float, ...]
    update_s: tuple[float, ...]
    transfer_s: tuple[float, ...]
    latency_s: tuple[float, ...]

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
        """Return a pipeline of equal stages and equal edges."""
        stage, edge = (1,) * stages, (1,) * (stages - 1)
        return MicroTiming(
            tuple(forward_s for _ in stage),
            tuple(input_s for _ in stage),
            tuple(weight_s for _ in stage),
            tuple(update_s for _ in stage),
            tuple(transfer_s for _ in edge),
            tuple(latency_s for _ in edge),
        )

    @property
    def stages(self) -> int:
        """The number of stages."""
        return len(self.forward_s)

    @property
    def backward_s(self) -> tuple[float, ...]:
        """Every stage's whole backward pass."""
        return tuple(one + other for one, other in zip(self.input_s, self.weight_s, strict=True))

    @property
    def compute_s(self) -> tuple[float, ...]:
        """Every stage's seconds of work for one micro-batch."""
        return tuple(
            one + other for one, other in zip(self.forward_s, self.backward_s, strict=True)
        )

    @property
    def hops_s(self) -> float:
        """Seconds that one message spends on all edges together, in one direction."""
        return sum(self.transfer_s) + sum(self.latency_s)


# -- localpipe ------------------------------------------------------------------------------------------------------


def period_s(timing: Timing) -> float:
    """Return the steady seconds of a step: the slowest stage or edge. Exact without jitter, at any depth."""
    return max(*timing.compute_s, *timing.edge_s, 0.0)


def fill_s(timing: Timing) -> float:
    """Return the seconds until the last stage begins: once a run, not once a step. Exact."""
    return sum(timing.before_s[:-1]) + timing.hops_s


def drain_s(timing: Timing) -> float:
    """Return the seconds from the first stage's last update to the last stage's; exact where no stage is slower than
    the first.
    """
    return fill_s(timing) + timing.compute_s[-1] - timing.compute_s[0]


def run_s(timing: Timing, steps: int) -> float:
    """Return the seconds of a whole run, fill and drain included. Exact without jitter, at any depth.

    Time is the longest path through the run's dependencies. Whatever way it takes, it moves down the pipeline once and goes
    round a cycle for every other step; the heaviest cycle is one stage's own step or one edge's own turn.
    """
    return fill_s(timing) + (steps - 1) * period_s(timing) + timing.compute_s[-1]


# -- its peers ------------------------------------------------------------------------------------------------------


def bubble_ratio(micro_batches: int, stages: int) -> float:
    """Return (m + K - 1) / m, how much longer than its work a step of GPipe or 1F1B takes on equal stages.

    Huang et al. 2019 (GPipe); Narayanan et al. 2019 (PipeDream).
    """
    return (micro_batches + stages - 1) / micro_batches


def gpipe_s(timing: MicroTiming, micro_batches: int) -> float:
    """Return the seconds of a step that runs all forwards, then all backwards: two flow shops, one after the other.

    Exact for any stages and edges, as long as the update is not the slowest part.
    """
    edge = max(timing.transfer_s, default=0.0)
    ways = [timing.forward_s, timing.backward_s]
    return (
        sum(sum(way) + timing.hops_s + (micro_batches - 1) * max(*way, edge) for way in ways)
        + timing.update_s[0]
    )


def one_f_one_b_s(timing: MicroTiming, micro_batches: int) -> float:
    """Return the seconds of a step of 1F1B. Exact on equal stages without links, else an estimate.

    At most K - k micro-batches are in flight behind stage k, so each of these rounds pays the way there and back.
    """
    return (
        sum(timing.compute_s)
        + 2 * timing.hops_s
        + (micro_batches - 1) * _turn(timing)
        + timing.update_s[0]
    )


def _turn(timing: MicroTiming) -> float:
    """Return the seconds between two micro-batches of 1F1B: a stage's own work, or its round trip over those in flight."""
    turns = list(timing.compute_s)
    hops = [move + wait for move, wait in zip(timing.transfer_s, timing.latency_s, strict=True)]
    for k in range(timing.stages):
        turns.append((sum(timing.compute_s[k:]) + 2 * sum(hops[k:])) / (timing.stages - k))
    return max(turns)


def zero_bubble_s(timing: MicroTiming, micro_batches: int) -> float:
    """Return the seconds of a step of ZB-H1: m (F + B + W) + (K - 1) (F + B - W), Qi et al. 2024 (arXiv 2401.10241).

    The paper takes W to be no longer than F; where it is longer it can hide no more than F. Exact on equal stages without
    links for m >= K, else an estimate.
    """
    slowest = max(range(timing.stages), key=lambda k: timing.compute_s[k])
    others = [k for k in range(timing.stages) if k != slowest]
    exposed = sum(
        timing.input_s[k] + max(timing.forward_s[k] - timing.weight_s[k], 0.0) for k in others
    )
    return micro_batches * _turn(timing) + exposed + 2 * timing.hops_s + timing.update_s[0]


def ring_all_reduce_s(nbytes: float, members: int, bytes_per_s: float, latency_s: float) -> float:
    """Return the seconds of a ring all-reduce: 2 (n - 1) hops of bytes / n each (Patarasuk and Yuan 2009)."""
    if members == 1:
        return 0.0
    return 2 * (members - 1) * (nbytes / members / bytes_per_s + latency_s)


def ddp_s(forward_s: float, backward_s: float, update_s: float, reduce_s: Sequence[float]) -> float:
    """Return the seconds of a data-parallel step whose gradients are reduced in buckets while the backward goes on.

    Bucket i of n is ready when i / n of the backward is done, and buckets are reduced in turn. Exact for this model.
    """
    buckets = len(reduce_s)
    ends = [backward_s * (i + 1) / buckets + sum(reduce_s[i:]) for i in range(buckets)]
    return forward_s + max(ends, default=backward_s) + update_s


# -- failures -------------------------------------------------------------------------------------------------------


def expected_s(useful_s: float, checkpoint_s: float, restart_s: float, mtbf_s: float) -> float:
    """Return the expected seconds of a run whose machines fail at random, restarted from the last checkpoint.

    Each stretch of `checkpoint_s` costs (M + R) (exp(stretch / M) - 1) for a mean time between failures M of the whole
    cluster and a restart R that does not fail itself (Daly 2006, with free checkpoints).
    """
    if math.isinf(mtbf_s):
        return useful_s
    if checkpoint_s > 100 * mtbf_s:
        return math.inf  # it never gets that far
    stretches = useful_s / checkpoint_s
    return stretches * (mtbf_s + restart_s) * math.expm1(checkpoint_s / mtbf_s)

"""A pipeline's clock without the pipeline: when each stage would begin, send and end each step.

One stage's step t needs its own step t - 1, the previous stage's step t, and room in the queue behind it. An edge here is
what localpipe/channel.py builds, event by event:

    send(t)    returns when message t - depth has left its slot of the sender's ring
    move(t)    begins when send(t) was called and the receiver's `ready` for t is here (one latency after it was posted,
               so that message t - 1 is off the wire); it takes bytes / bandwidth and arrives one latency later
    receive(t) is posted when step t - 1 begins: one message is being read, one receive is posted ahead

On an infinitely fast link that is a plain bounded queue: a stage may send message t as soon as its successor has begun
step t - depth - 1, so depth + 1 messages wait at most (`depth` in the ring, one received ahead).

Steps of all stages are swept along the anti-diagonals k + t = n of the (stage, step) plane. Everything that a cell needs
lies on an earlier diagonal, or on its own one stage further (depth 1), so a diagonal is a handful of numpy operations and
ten million stage-steps take seconds.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from localpipe.plan.cluster.formulas import MicroTiming, Timing

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Jitter:
    """How a step's compute time varies around its mean: a factor within 1 +- spread, or lognormal with that sigma."""

    kind: Literal["none", "uniform", "lognormal"] = "none"
    spread: float = 0.0
    seed: int = 0

    def factors(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        """Return factors of mean 1."""
        if self.kind == "uniform":
            return 1 + self.spread * (2 * rng.random(shape) - 1)
        if self.kind == "lognormal":
            return np.exp(self.spread * rng.standard_normal(shape) - self.spread**2 / 2)
        return np.ones(shape)


STEADY = Jitter()


@dataclass(frozen=True)
class Simulated:
    """What a simulated run of a forward-only pipeline did. Shares are of the whole run, one a stage."""

    wall_s: float
    fill_s: float  # until the last stage began
    drain_s: float  # from the first stage's end to the last one's
    period_s: float  # a step's seconds, over the second half of the run
    finished_s: Array = field(repr=False)  # (steps,) when the last stage ended each step
    busy: tuple[float, ...]
    receive_wait: tuple[float, ...]
    send_wait: tuple[float, ...]


def simulate_pipeline(
    timing: Timing,
    steps: int,
    depth: int | Sequence[int] = 2,
    jitter: Jitter = STEADY,
    replicas: int | Sequence[int] = 1,
) -> Simulated:
    """Run a forward-only pipeline for `steps` batches.

    depth: messages in flight, of all edges or of each. replicas: copies of all stages or of each; `timing` already has their
    share of the batch and their all-reduce, here each draws its own jitter and the slowest one decides.
    """
    stages = timing.stages
    before, after = np.asarray(timing.before_s, float), np.asarray(timing.after_s, float)
    transfer, latency = (
        np.asarray((0.0, *part), float) for part in (timing.transfer_s, timing.latency_s)
    )
    depths = np.broadcast_to(np.asarray(depth, int), (stages - 1,))
    assert steps >= 1 and (depths >= 1).all(), "a run has steps, a queue has room"
    draw = _Draws(jitter, np.broadcast_to(np.asarray(replicas, int), (stages,)))
    rows = int(depths.max(initial=1))
    moved = np.zeros(
        (rows, stages)
    )  # when a message left its slot, by diagonal; an edge is written in its reader's column
    began, sent, ended = np.full(stages, -math.inf), np.zeros(stages), np.zeros(stages)
    busy, receive_wait, send_wait = np.zeros(stages), np.zeros(stages), np.zeros(stages)
    finished, fill = np.empty(steps), 0.0
    for diagonal in range(steps + stages - 1):
        low, high = max(0, diagonal - steps + 1), min(stages, diagonal + 1)
        here, behind = slice(low, high), slice(max(low, 1), high)
        start = ended[here].copy()
        if behind.stop > behind.start:
            sender = slice(behind.start - 1, behind.stop - 1)
            left = np.maximum(sent[sender], began[behind] + latency[behind])
            left += transfer[behind]
            moved[diagonal % rows, behind] = left
            arrived = start[behind.start - low :]
            np.maximum(arrived, left + latency[behind], out=arrived)
        receive_wait[here] += start - ended[here]
        began[here] = start
        factor = draw(here)
        work = before[here] * factor
        go = start + work
        senders = slice(low, min(high, stages - 1))
        if senders.stop > senders.start:
            room = moved[
                (diagonal + 1 - depths[senders]) % rows,
                np.arange(senders.start + 1, senders.stop + 1),
            ]
            waiting = go[: senders.stop - low]
            blocked = np.maximum(room - waiting, 0.0)
            send_wait[senders] += blocked
            np.maximum(waiting, room, out=waiting)
        sent[here] = go
        rest = after[here] * factor
        ended[here] = go + rest
        busy[here] += work + rest
        if high == stages:
            step = diagonal - stages + 1
            finished[step] = ended[-1]
            fill = start[-1] if step == 0 else fill
    wall = float(finished[-1])
    half = steps // 2
    period = (wall - finished[half]) / (steps - 1 - half) if steps - 1 > half else wall - fill
    return Simulated(
        wall_s=wall,
        fill_s=float(fill),
        drain_s=wall - float(ended[0]),
        period_s=float(period),
        finished_s=finished,
        busy=_shares(busy, wall),
        receive_wait=_shares(receive_wait, wall),
        send_wait=_shares(send_wait, wall),
    )


class _Draws:
    """The factors of one diagonal; of a stage's replicas the slowest one decides. They do not depend on the depth."""

    def __init__(self, jitter: Jitter, replicas: npt.NDArray[np.int64]) -> None:
        self._jitter, self._rng = jitter, np.random.default_rng(jitter.seed)
        self._absent = np.arange(int(replicas.max()))[:, None] >= replicas[None, :]
        self._any_absent = bool(self._absent.any())

    def __call__(self, stages: slice) -> Array | float:
        if self._jitter.kind == "none":
            return 1.0
        factors = self._jitter.factors(self._rng, (len(self._absent), stages.stop - stages.start))
        if self._any_absent:
            factors[self._absent[:, stages]] = 0.0
        slowest: Array = factors.max(axis=0)
        return slowest


def _shares(seconds: Array, wall: float) -> tuple[float, ...]:
    return tuple((seconds / wall).tolist()) if wall > 0 else (0.0,) * len(seconds)


# -- failures -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failures:
    """Devices that fail at random; the run ends, begins again after `restart_s`, and replays from its last checkpoint."""

    devices: int
    mtbf_s: float  # mean seconds between failures of one device
    restart_s: float
    checkpoint_s: float
    seed: int = 0


def add_failures(finished_s: npt.NDArray[np.floating[Any]], failures: Failures) -> float:
    """Return the seconds that a run takes with failures, from the moments at which it ends its steps without any.

    After a restart the pipeline fills again, and the steps behind the last checkpoint are made again.
    """
    if math.isinf(failures.mtbf_s):
        return float(finished_s[-1])
    rng = np.random.default_rng(failures.seed)
    clock, made, steps = 0.0, 0, len(finished_s)
    while True:
        until = float(rng.exponential(failures.mtbf_s / failures.devices))
        if finished_s[steps - made - 1] <= until:
            return clock + float(finished_s[steps - made - 1])
        saved = until - until % failures.checkpoint_s
        made += bisect.bisect_right(finished_s, saved)
        clock += until + failures.restart_s


# -- the peers ------------------------------------------------------------------------------------------------------

F, B, W = "forward", "input", "weight"
Order = list[tuple[str, int]]


def gpipe(stage: int, stages: int, micro_batches: int) -> Order:
    """All forwards, then all backwards (Huang et al. 2019)."""
    backward = [(kind, i) for i in range(micro_batches) for kind in (B, W)]
    return [*((F, i) for i in range(micro_batches)), *backward]


def one_f_one_b(stage: int, stages: int, micro_batches: int) -> Order:
    """Forwards until K - k micro-batches are in flight, then backward and forward in turn (Narayanan et al. 2019)."""
    warm = min(stages - stage, micro_batches)
    order = [(F, i) for i in range(warm)]
    for i in range(micro_batches):
        order += [(B, i), (W, i)]
        if warm + i < micro_batches:
            order.append((F, warm + i))
    return order


def zero_bubble(stage: int, stages: int, micro_batches: int) -> Order:
    """1F1B whose stage k puts its weights' gradients off by k micro-batches: at most K in flight (ZB-H1, Qi et al. 2024)."""
    warm = min(stages - stage, micro_batches)
    order = [(F, i) for i in range(warm)]
    for i in range(micro_batches):
        order.append((B, i))
        if i >= stage:
            order.append((W, i - stage))
        if warm + i < micro_batches:
            order.append((F, warm + i))
    return order + [(W, i) for i in range(max(micro_batches - stage, 0), micro_batches)]


SCHEDULES: dict[str, Callable[[int, int, int], Order]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "zb-h1": zero_bubble,
}


def simulate_synchronous(
    schedule: str, timing: MicroTiming, micro_batches: int, steps: int = 4, jitter: Jitter = STEADY
) -> float:
    """Return the seconds of a steady step of GPipe, 1F1B or ZB-H1.

    Stages run their own order as its inputs arrive. Sends are asynchronous and each direction of an edge carries one message
    at a time; 1F1B and GPipe send the input's gradient after the whole backward, as autograd gives it, ZB-H1 before W. A
    stage updates on its own after its last gradient, and goes on with the next step.
    """
    assert steps >= 2, "a step is measured between two"
    stages = timing.stages
    orders = [SCHEDULES[schedule](stage, stages, micro_batches) for stage in range(stages)]
    run = _Schedule(orders, timing, micro_batches, steps, jitter, early=schedule == "zb-h1")
    run.play()
    return (run.updated[0][-1] - run.updated[0][0]) / (steps - 1)


class _Schedule:
    """Plays every stage's order of several steps; a stage goes on until what it needs has not been sent yet."""

    def __init__(
        self,
        orders: Sequence[Order],
        timing: MicroTiming,
        micro_batches: int,
        steps: int,
        jitter: Jitter,
        early: bool,
    ) -> None:
        self.orders, self.timing, self.micro_batches, self.steps = (
            orders,
            timing,
            micro_batches,
            steps,
        )
        self.last, self.early = timing.stages - 1, early
        self.updated: list[list[float]] = [[] for _ in orders]
        self._seconds = {F: timing.forward_s, B: timing.input_s, W: timing.weight_s}
        rng = np.random.default_rng(jitter.seed)
        self._factors = [jitter.factors(rng, (steps,)).tolist() for _ in orders]
        self._at: list[dict[tuple[str, int, int], float]] = [{} for _ in orders]
        self._clock = [0.0 for _ in orders]
        self._free: dict[tuple[int, int], float] = {}  # when an edge's direction is next free
        self._place = [(0, 0) for _ in orders]

    def play(self) -> None:
        """Let every stage run as far as it can, and again whoever a message woke."""
        awake = list(range(len(self.orders)))
        while awake:
            awake += self._advance(awake.pop())
        assert all(len(ends) == self.steps for ends in self.updated), (
            "an order that waits for itself"
        )

    def _advance(self, stage: int) -> list[int]:
        """Run one stage until it has to wait; return the neighbours it sent to."""
        step, place = self._place[stage]
        order, woken = self.orders[stage], set()
        while step < self.steps:
            kind, i = order[place]
            ready = self._ready(stage, kind, step, i)
            if ready is None:
                break
            end = (
                max(self._clock[stage], ready)
                + self._seconds[kind][stage] * self._factors[stage][step]
            )
            self._clock[stage] = end
            to = self._sends(stage, kind)
            if to is not None:
                self._send(stage, to, kind, step, i, end)
                woken.add(to)
            place += 1
            if place == len(order):
                self._clock[stage] += self.timing.update_s[stage]
                self.updated[stage].append(self._clock[stage])
                step, place = step + 1, 0
        self._place[stage] = (step, place)
        return list(woken)

    def _ready(self, stage: int, kind: str, step: int, i: int) -> float | None:
        """Return when an operation's input is there, None while it is not; the stage's own results are there in order."""
        if kind == W or (kind == F and stage == 0) or (kind == B and stage == self.last):
            return 0.0
        return self._at[stage].pop((kind, step, i), None)

    def _sends(self, stage: int, kind: str) -> int | None:
        if kind == F:
            return stage + 1 if stage < self.last else None
        return stage - 1 if stage > 0 and kind == (B if self.early else W) else None

    def _send(self, stage: int, to: int, kind: str, step: int, i: int, now: float) -> None:
        edge = min(stage, to)
        gone = max(now, self._free.get((stage, to), 0.0)) + self.timing.transfer_s[edge]
        self._free[stage, to] = gone
        self._at[to][F if kind == F else B, step, i] = gone + self.timing.latency_s[edge]


def simulate_ddp(
    forward_s: float,
    backward_s: float,
    update_s: float,
    reduce_s: Sequence[float],
    devices: int = 1,
    steps: int = 4,
    jitter: Jitter = STEADY,
) -> float:
    """Return the mean seconds of a data-parallel step; every bucket waits for the slowest device and for the one before."""
    slowest = jitter.factors(np.random.default_rng(jitter.seed), (steps, devices)).max(axis=1)
    computed = (forward_s + backward_s) * slowest
    reduced = np.zeros(steps)
    for i, seconds in enumerate(reduce_s):
        ready = (forward_s + backward_s * (i + 1) / len(reduce_s)) * slowest
        reduced = np.maximum(reduced, ready) + seconds
    return float((np.maximum(computed, reduced) + update_s).mean())

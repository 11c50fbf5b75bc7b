"""Simulated clocks of pipelines: when every step of every stage begins, sends and ends.

Nothing is trained or measured: the input is a stage's seconds, the output a run's.

Step t of a stage needs three things: its own step t - 1, step t of the previous stage, and room in
the queue after it. An edge is that of `localpipe/pipeline/channels/channel.py`, event by event:

    send(t)    returns when message t - depth has left its slot of the sender's ring
    move(t)    begins after send(t) was called and after the receiver's `ready` for t arrived, one
               latency after it was posted, so that message t - 1 is off the link. It takes
               bytes / bandwidth and arrives one latency later
    receive(t) is posted when step t - 1 begins: one message is being read, one receive is posted
               ahead

On an infinitely fast link that is a plain bounded queue. A stage may send message t as soon as the
next stage has begun step t - depth - 1, so at most depth + 1 messages wait: `depth` in the ring and
one received ahead.

The steps of all stages are swept along the anti-diagonals k + t = n of the (stage, step) plane.
Everything that a cell needs lies on an earlier diagonal, or on its own one stage further (depth 1).
So a diagonal is a handful of numpy operations, and ten million stage-steps take seconds.
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
    """How the compute time of a step varies around its mean.

    `none` ignores `spread`. `uniform` draws a factor within 1 +- spread, `lognormal` one with
    `spread` as sigma. Equal seeds draw equal factors.
    """

    kind: Literal["none", "uniform", "lognormal"] = "none"
    spread: float = 0.0
    seed: int = 0

    def draw_factors(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
        """Return float64 factors of mean 1, of a shape. `none` gives ones and draws nothing.

        rng: the caller's. `seed` is not read here.
        """
        if self.kind == "uniform":
            offsets = 2 * rng.random(shape) - 1
            return 1 + self.spread * offsets
        if self.kind == "lognormal":
            exponents = self.spread * rng.standard_normal(shape)
            return np.exp(exponents - self.spread**2 / 2)
        return np.ones(shape)


STEADY = Jitter()


@dataclass(frozen=True)
class SimulatedRun:
    """Times of a simulated forward-only run, in seconds from its start.

    `busy`, `receive_wait` and `send_wait` are shares of the whole run, one a stage.
    """

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
) -> SimulatedRun:
    """Return the times of a forward-only pipeline that trains on `steps` batches.

    depth: messages in flight, of all edges or of each. replicas: copies of all stages or of each.
    `timing` already has the replicas' part of the batch and their all-reduce. Every replica draws
    its own jitter here, and the slowest one decides. The same arguments give the same times.

    Raises AssertionError below one step or a depth of 1, and ValueError for a wrong number of
    depths or replicas.
    """
    stages = timing.stages
    depths = np.broadcast_to(np.asarray(depth, int), (stages - 1,))
    assert steps >= 1 and (depths >= 1).all(), "a run has steps, a queue has room"
    counts = np.broadcast_to(np.asarray(replicas, int), (stages,))
    factors = _StageFactors(jitter, counts)
    sweep = _Sweep(timing, depths)

    finished = np.empty(steps)
    fill = 0.0
    for diagonal in range(steps + stages - 1):
        # Stages low..high - 1 have a step on this diagonal.
        low = max(0, diagonal - steps + 1)
        high = min(stages, diagonal + 1)
        start = sweep.receive(diagonal, low, high)
        factor = factors.draw(low, high)
        sweep.compute_and_send(diagonal, low, high, start, factor)
        if high == stages:
            finished[diagonal - stages + 1] = sweep.ended[-1]
        if diagonal == stages - 1:
            fill = float(start[-1])
    return _summarize(sweep, finished, fill)


def _summarize(sweep: _Sweep, finished: Array, fill: float) -> SimulatedRun:
    wall = float(finished[-1])
    # The second half of the run is steady. A run of one or two steps has none.
    last = len(finished) - 1
    half = len(finished) // 2
    period = wall - fill
    if last > half:
        period = (wall - float(finished[half])) / (last - half)
    drain = wall - float(sweep.ended[0])
    return SimulatedRun(
        wall_s=wall,
        fill_s=fill,
        drain_s=drain,
        period_s=period,
        finished_s=finished,
        busy=_compute_shares(sweep.busy, wall),
        receive_wait=_compute_shares(sweep.receive_wait, wall),
        send_wait=_compute_shares(sweep.send_wait, wall),
    )


def _compute_shares(seconds: Array, wall: float) -> tuple[float, ...]:
    if wall <= 0:
        return (0.0,) * len(seconds)
    return tuple((seconds / wall).tolist())


class _Sweep:
    """The latest event times of every stage, moved forward by one diagonal at a time.

    Arrays have one entry a stage. An edge is written in the column of the stage that reads it.
    """

    def __init__(self, timing: Timing, depths: npt.NDArray[np.int64]) -> None:
        stages = timing.stages
        self._before = np.asarray(timing.before_s, float)
        self._after = np.asarray(timing.after_s, float)
        self._transfer = np.asarray((0.0, *timing.transfer_s), float)
        self._latency = np.asarray((0.0, *timing.latency_s), float)
        self._depths = depths
        self._readers = np.arange(1, stages)
        # Row d % rows: when the messages of diagonal d left their slot of the sender's ring.
        self._rows = int(depths.max(initial=1))
        self._left_slot = np.zeros((self._rows, stages))
        self._began = np.full(stages, -math.inf)
        self._sent = np.zeros(stages)
        self.ended = np.zeros(stages)
        self.busy = np.zeros(stages)
        self.receive_wait = np.zeros(stages)
        self.send_wait = np.zeros(stages)

    def receive(self, diagonal: int, low: int, high: int) -> Array:
        """Receive the messages of stages low..high - 1; return when their steps begin."""
        stages = slice(low, high)
        start = self.ended[stages].copy()
        first = max(low, 1)
        if first < high:
            readers = slice(first, high)
            senders = slice(first - 1, high - 1)
            latency = self._latency[readers]
            # A message moves when it is sent and the reader's `ready` is back.
            ready = self._began[readers] + latency
            left = np.maximum(self._sent[senders], ready)
            left += self._transfer[readers]
            self._left_slot[diagonal % self._rows, readers] = left
            begin = start[first - low :]
            np.maximum(begin, left + latency, out=begin)
        self.receive_wait[stages] += start - self.ended[stages]
        self._began[stages] = start
        return start

    def compute_and_send(
        self, diagonal: int, low: int, high: int, start: Array, factor: Array | float
    ) -> None:
        """Run the step of stages low..high - 1 from its start to its end, the send included."""
        stages = slice(low, high)
        before = self._before[stages] * factor
        send = start + before
        end = min(high, len(self.ended) - 1)
        if low < end:
            # A send returns when the message `depth` steps earlier has left its slot.
            senders = slice(low, end)
            left_on = diagonal + 1 - self._depths[senders]
            rows = left_on % self._rows
            room = self._left_slot[rows, self._readers[senders]]
            sending = send[: end - low]
            self.send_wait[senders] += np.maximum(room - sending, 0.0)
            np.maximum(sending, room, out=sending)
        self._sent[stages] = send
        after = self._after[stages] * factor
        self.ended[stages] = send + after
        self.busy[stages] += before + after


class _StageFactors:
    """The jitter of every stage on one diagonal. It is the same at any depth.

    Of a stage's replicas the slowest one decides.
    """

    def __init__(self, jitter: Jitter, replicas: npt.NDArray[np.int64]) -> None:
        self._jitter = jitter
        self._rng = np.random.default_rng(jitter.seed)
        # A row for every replica, a column for every stage: True where a stage has fewer.
        indexes = np.arange(int(replicas.max()))
        self._missing = indexes[:, None] >= replicas[None, :]
        self._any_missing = bool(self._missing.any())

    def draw(self, low: int, high: int) -> Array | float:
        """Return the factors of stages low..high - 1."""
        if self._jitter.kind == "none":
            return 1.0
        shape = (len(self._missing), high - low)
        factors = self._jitter.draw_factors(self._rng, shape)
        if self._any_missing:
            factors[self._missing[:, low:high]] = 0.0
        slowest: Array = factors.max(axis=0)
        return slowest


# -- failures --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failures:
    """Random failures of devices, which arrive independently at equal rates.

    A failure ends the run. It begins again after `restart_s`, from its last checkpoint. One is
    written every `checkpoint_s`, which is above 0, at no cost. mtbf_s: infinite for no failures.
    """

    devices: int
    mtbf_s: float  # mean seconds between failures of one device
    restart_s: float
    checkpoint_s: float
    seed: int = 0


def add_failures(finished_s: npt.NDArray[np.floating[Any]], failures: Failures) -> float:
    """Return the seconds of a run with failures. Equal seeds give equal runs.

    finished_s: (steps,) when the same run without failures ends its steps, ascending, at least one.
    After a restart the pipeline fills again, and repeats the steps after the last checkpoint.
    Failures far more frequent than checkpoints make a call that hardly ever returns.
    """
    if math.isinf(failures.mtbf_s):
        return float(finished_s[-1])
    rng = np.random.default_rng(failures.seed)
    clock = 0.0
    steps_saved = 0
    steps = len(finished_s)
    while True:
        failure_s = float(rng.exponential(failures.mtbf_s / failures.devices))
        remaining_s = float(finished_s[steps - steps_saved - 1])
        if remaining_s <= failure_s:
            return clock + remaining_s
        checkpoint_s = failure_s - failure_s % failures.checkpoint_s
        steps_saved += bisect.bisect_right(finished_s, checkpoint_s)
        clock += failure_s + failures.restart_s


# -- rival systems ---------------------------------------------------------------------------------

F = "forward"
B = "input"
W = "weight"
# The operations of one stage in one step: (F, B or W, micro-batch).
Order = list[tuple[str, int]]
Arrivals = dict[tuple[str, int, int], float]  # by operation, step and micro-batch


def order_gpipe(stage: int, stages: int, micro_batches: int) -> Order:
    """Return the order of GPipe: all forwards, then all backwards (Huang et al. 2019).

    It is the same for all stages: stage and stages are not used. Backwards are in ascending order,
    B before W.
    """
    order = [(F, i) for i in range(micro_batches)]
    for i in range(micro_batches):
        order += [(B, i), (W, i)]
    return order


def order_one_f_one_b(stage: int, stages: int, micro_batches: int) -> Order:
    """Return the order of 1F1B (Narayanan et al. 2019) of stage `stage` of `stages`, from 0.

    Stage k begins with forwards until K - k micro-batches are in flight. Then it runs a backward
    pass, B and W, and a forward pass in turn.
    """
    warmup = min(stages - stage, micro_batches)
    order = [(F, i) for i in range(warmup)]
    for i in range(micro_batches):
        order += [(B, i), (W, i)]
        if warmup + i < micro_batches:
            order.append((F, warmup + i))
    return order


def order_zero_bubble(stage: int, stages: int, micro_batches: int) -> Order:
    """Return the order of ZB-H1 (Qi et al. 2024) of stage `stage` of `stages`, from 0.

    It is 1F1B whose stage k delays the gradients of its weights by k micro-batches, so that at most
    K micro-batches are in flight.
    """
    warmup = min(stages - stage, micro_batches)
    order = [(F, i) for i in range(warmup)]
    for i in range(micro_batches):
        order.append((B, i))
        if i >= stage:
            order.append((W, i - stage))
        if warmup + i < micro_batches:
            order.append((F, warmup + i))
    for i in range(max(micro_batches - stage, 0), micro_batches):
        order.append((W, i))
    return order


SCHEDULES: dict[str, Callable[[int, int, int], Order]] = {
    "gpipe": order_gpipe,
    "1f1b": order_one_f_one_b,
    "zb-h1": order_zero_bubble,
}


def simulate_synchronous(
    schedule: str, timing: MicroTiming, micro_batches: int, steps: int = 4, jitter: Jitter = STEADY
) -> float:
    """Return the seconds of a steady step of GPipe, 1F1B or ZB-H1.

    schedule: a key of `SCHEDULES`, else KeyError. Every stage runs its order as its inputs arrive.
    Sends are asynchronous, and each direction of an edge carries one message at a time. 1F1B and
    GPipe send the input's gradient after both backward passes, as autograd gives it. ZB-H1 sends it
    before W. A stage updates after its last gradient, and goes on with the next step.

    steps: at least 2, else AssertionError. The result is the mean from the first stage's first
    update to its last. jitter: a factor for each stage and step.
    """
    assert steps >= 2, "a step is measured between two"
    stages = timing.stages
    orders = [SCHEDULES[schedule](stage, stages, micro_batches) for stage in range(stages)]
    sends_after = B if schedule == "zb-h1" else W
    simulation = _SynchronousRun(orders, timing, steps, jitter, sends_after)
    simulation.run()
    updates = simulation.updated_s[0]
    return (updates[-1] - updates[0]) / (steps - 1)


class _SynchronousRun:
    """Runs the orders of all stages for several steps. A stage stops where its input is missing.

    sends_after: the backward pass, B or W, after which a stage sends its input's gradient.
    """

    def __init__(
        self,
        orders: Sequence[Order],
        timing: MicroTiming,
        steps: int,
        jitter: Jitter,
        sends_after: str,
    ) -> None:
        self._orders = orders
        self._timing = timing
        self._steps = steps
        self._sends_after = sends_after
        self._last = timing.stages - 1
        self._seconds = {F: timing.forward_s, B: timing.input_s, W: timing.weight_s}
        rng = np.random.default_rng(jitter.seed)
        self._factors = [jitter.draw_factors(rng, (steps,)).tolist() for _ in orders]
        # When the update of every step ended, by stage.
        self.updated_s: list[list[float]] = [[] for _ in orders]
        # The progress of every stage: its time, and (step, index in its order).
        self._clock = [0.0] * len(orders)
        self._position = [(0, 0)] * len(orders)
        # When the inputs of every stage arrive.
        self._arrivals: list[Arrivals] = [{} for _ in orders]
        # When the direction (sender, receiver) of an edge is free.
        self._free: dict[tuple[int, int], float] = {}

    def run(self) -> None:
        """Run every stage as far as it gets, and again after a message for it."""
        runnable = list(range(len(self._orders)))
        while runnable:
            runnable += self._run_stage(runnable.pop())
        for updates in self.updated_s:
            assert len(updates) == self._steps, "an order that waits for itself"

    def _run_stage(self, stage: int) -> list[int]:
        """Run a stage until an input is missing; return the neighbours that it sent to."""
        order = self._orders[stage]
        receivers = set()
        step, index = self._position[stage]
        while step < self._steps:
            # The operation begins when the stage is free and its input has arrived.
            kind, i = order[index]
            arrival = self._find_arrival(stage, kind, step, i)
            if arrival is None:
                break
            begin = max(self._clock[stage], arrival)
            work = self._seconds[kind][stage] * self._factors[stage][step]
            end = begin + work
            self._clock[stage] = end
            receiver = self._find_receiver(stage, kind)
            if receiver is not None:
                self._send(stage, receiver, kind, step, i)
                receivers.add(receiver)

            # After the last operation comes the update, then the next step.
            index += 1
            if index == len(order):
                self._clock[stage] += self._timing.update_s[stage]
                self.updated_s[stage].append(self._clock[stage])
                step, index = step + 1, 0
        self._position[stage] = (step, index)
        return list(receivers)

    def _find_arrival(self, stage: int, kind: str, step: int, i: int) -> float | None:
        """Return when an operation's input arrives, None where it is not sent yet.

        A stage's own results need no message, because its order has them in sequence.
        """
        is_first = kind == F and stage == 0
        is_last = kind == B and stage == self._last
        if kind == W or is_first or is_last:
            return 0.0
        return self._arrivals[stage].pop((kind, step, i), None)

    def _find_receiver(self, stage: int, kind: str) -> int | None:
        """Return the stage that an operation sends to, None where it sends nothing."""
        if kind == F and stage < self._last:
            return stage + 1
        if kind == self._sends_after and stage > 0:
            return stage - 1
        return None

    def _send(self, stage: int, receiver: int, kind: str, step: int, i: int) -> None:
        """Send one message; it waits for the message before it to leave the link."""
        edge = min(stage, receiver)
        free = self._free.get((stage, receiver), 0.0)
        begin = max(self._clock[stage], free)
        end = begin + self._timing.transfer_s[edge]
        self._free[stage, receiver] = end
        # A gradient, sent after B or after W, is the input of a backward pass.
        read_by = F if kind == F else B
        arrival = end + self._timing.latency_s[edge]
        self._arrivals[receiver][read_by, step, i] = arrival


def simulate_ddp(
    forward_s: float,
    backward_s: float,
    update_s: float,
    reduce_s: Sequence[float],
    devices: int = 1,
    steps: int = 4,
    jitter: Jitter = STEADY,
) -> float:
    """Return the mean seconds of a data-parallel step.

    forward_s, backward_s, update_s: of one device. reduce_s: seconds of every gradient bucket's
    all-reduce, empty for none. A bucket waits for the slowest device and for the bucket before it.
    jitter: a factor for each device and step, which the update has not.
    """
    rng = np.random.default_rng(jitter.seed)
    slowest = jitter.draw_factors(rng, (steps, devices)).max(axis=1)
    computed = (forward_s + backward_s) * slowest
    reduced = np.zeros(steps)
    for i, seconds in enumerate(reduce_s):
        part = backward_s * (i + 1) / len(reduce_s)
        ready = (forward_s + part) * slowest
        reduced = np.maximum(reduced, ready) + seconds
    steps_s = np.maximum(computed, reduced) + update_s
    return float(steps_s.mean())

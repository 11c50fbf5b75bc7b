"""A worker of the benchmark: windows of the pipeline alternate with windows of bare computing, in the same processes.

In a bound window every worker computes at once (forward, local loss, backward, update of all stages it hosts) on a message
that it already holds, channels off. Batch size over the slowest worker's time per batch is the bound; the pipeline's rate
over the bound, pair by pair, is the efficiency. Queues keep their messages between windows, so that no window pays for
filling them. A chain with jitter has windows of the same pipeline without it beside those with it, and its bound has none.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

from localpipe import data, process
from localpipe.channel import Inbox
from localpipe.config import Config
from localpipe.job import Job, image_of, plans_of
from localpipe.loader import Course, Loader
from localpipe.mesh import Mesh
from localpipe.message import Message
from localpipe.models.chain import Wait
from localpipe.optim import Schedule
from localpipe.pulse import Pulse
from localpipe.stage import Stage
from localpipe.worker import Seat, Tools

WARM_UP = 8
ASKED = "bench"  # the store's key for what the launcher asks
_ENDLESS = 10**6  # epochs


@dataclass
class _Tap:
    """An inbox that remembers its last message."""

    inbox: Inbox
    last: Message | None = None

    def receive(self) -> Message:
        self.last = self.inbox.receive()
        return self.last

    def hold(self) -> Message:
        """Return a copy of the last message."""
        assert self.last is not None
        return Message(self.last.header, {name: tensor.clone() for name, tensor in self.last.fields.items()})


def main() -> int:
    """Measure, and leave this worker's times in the store."""
    return process.run_worker(_measure)


def _measure(place: Mesh, decided: Job) -> None:
    config = decided.parsed()
    process.prepare_threads(config)
    seats = _seats(place, config)
    taps = [_Tap(seat.inbox) for seat in seats]
    for seat, tap in zip(seats, taps, strict=True):
        seat.inbox = tap

    def turn() -> None:
        for seat in seats:
            seat.turn()

    # Every worker runs one message ahead of the next one, so that each edge holds a message when a window begins.
    for _ in range(WARM_UP + place.world - 1 - place.rank):
        turn()
    held = [tap.hold() for tap in taps]

    def compute() -> None:
        for seat, message in zip(seats, held, strict=True):
            _step(seat.stage, message, seat.tools.schedule)

    asked = json.loads(place.store.get(ASKED))
    steps = _window_steps(place, compute, asked["window_s"])
    jittering = [
        wait for seat in seats for wait in seat.stage.blocks.modules() if isinstance(wait, Wait) and wait.jitter
    ]
    works = {"pipeline": turn, **({"steady": turn} if jittering else {}), "bound": compute}
    times: dict[str, list[float]] = {name: [] for name in works}
    for window in range(asked["windows"]):
        for name, work in works.items():
            for wait in jittering:
                wait.jittering = name == "pipeline"
            place.barrier(f"{name}/{window}")
            times[name].append(_timed(work, steps))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    place.store.set(f"times/{place.rank}", json.dumps({**times, "steps": steps, "peak_memory_bytes": memory}))
    place.barrier("end")


def _step(stage: Stage, message: Message, schedule: Schedule) -> None:
    h = stage.forward(message)
    loss = stage.local_loss(message, h)
    if stage.sends_gradient:
        stage.boundary_gradient(loss, h)
    stage.update(stage.reconciled(loss, message), schedule.rate(message.header.step))


def _timed(work: Callable[[], None], steps: int) -> float:
    begin = time.perf_counter()
    for _ in range(steps):
        work()
    return time.perf_counter() - begin


def _window_steps(place: Mesh, compute: Callable[[], None], window_s: float) -> int:
    """Return the steps of a window, the same for all: enough for the slowest worker to fill it."""
    place.barrier("calibrate")
    place.store.set(f"step_s/{place.rank}", str(_timed(compute, 3) / 3))
    slowest = max(float(place.store.get(f"step_s/{rank}")) for rank in range(place.world))
    return max(5, math.ceil(window_s / slowest))


def _seats(place: Mesh, config: Config) -> list[Seat]:
    blueprint, plans = plans_of(config, image_of(config))
    stages = [Stage(plans[index], blueprint, config) for index in place.hosted(len(plans))]
    dataset = data.load(config.data, config.run.seed)
    course = Course(len(dataset.train.labels), 0, config.data.batch_size, _ENDLESS, drop_last=True)
    tools = Tools(Schedule(config.optim, course.steps_per_epoch), Pulse(), None, None)
    loader = Loader(dataset, course.headers(0), config.run.seed, float("inf")) if stages[0].plan.is_first else None
    return process.join_seats(place, config, stages, loader, tools)

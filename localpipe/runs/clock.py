"""The monotonic clocks of several hosts, compared by pings through the store.

On one host every process reads the same monotonic clock. Across hosts a worker asks rank 0 for the time and takes the answer
to have been made half way (Cristian 1989, probabilistic clock synchronization): the shortest of several round trips decides,
and half of it is the most that the result can be wrong.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from localpipe.pipeline.workers.mesh import Mesh

PINGS = 16


@dataclass(frozen=True)
class ClockOffset:
    """What to add to this host's monotonic clock to have that of rank 0's host, and how wrong that can be."""

    offset_s: float = 0.0
    error_s: float = 0.0


def compare_clocks(place: Mesh, now: Callable[[], float] = time.monotonic) -> ClockOffset:
    """Compare this worker's clock with rank 0's; every worker calls it once, and rank 0 answers them in turn."""
    if place.local:
        return ClockOffset()
    if place.rank == 0:
        _answer(place, now)
        return ClockOffset()
    return min(
        (_ping(place, number, now) for number in range(PINGS)), key=lambda clock: clock.error_s
    )


def _answer(place: Mesh, now: Callable[[], float]) -> None:
    for rank in range(1, place.world):
        for number in range(PINGS):
            place.store.get(f"clock/{rank}/{number}/asked")
            place.store.set(f"clock/{rank}/{number}/told", repr(now()))


def _ping(place: Mesh, number: int, now: Callable[[], float]) -> ClockOffset:
    begin = now()
    place.store.set(f"clock/{place.rank}/{number}/asked", "1")
    told = float(place.store.get(f"clock/{place.rank}/{number}/told"))
    end = now()
    return ClockOffset(told - (begin + end) / 2, (end - begin) / 2)

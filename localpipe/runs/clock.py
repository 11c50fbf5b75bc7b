"""The monotonic clocks of several hosts, compared by pings through the store.

On one host every process reads the same monotonic clock. Across hosts a worker requests the time
of rank 0. It takes the reply to have been made half way (Cristian 1989, probabilistic clock
synchronization). The shortest of several round trips decides, and half of it is the largest error.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from localpipe.pipeline.workers.mesh import Mesh

PINGS = 16


@dataclass(frozen=True)
class ClockOffset:
    """What to add to this host's monotonic clock for that of rank 0's host, and its largest error.

    Both are in seconds, and 0 on rank 0's host.
    """

    offset_s: float = 0.0
    error_s: float = 0.0


def compare_clocks(mesh: Mesh, now: Callable[[], float] = time.monotonic) -> ClockOffset:
    """Return the offset of this worker's clock to rank 0's.

    Every worker calls it once for a store, with the same kind of clock. Rank 0 replies to the
    others in turn, and returns 0 after the last. With all workers on one machine it returns 0 at
    once. now: returns seconds. It waits without limit for a rank that does not call.
    """
    if mesh.local:
        return ClockOffset()
    if mesh.rank == 0:
        _reply_to_pings(mesh, now)
        return ClockOffset()
    offsets = [_ping(mesh, number, now) for number in range(PINGS)]
    return min(offsets, key=lambda offset: offset.error_s)


def _reply_to_pings(mesh: Mesh, now: Callable[[], float]) -> None:
    for rank in range(1, mesh.world):
        for number in range(PINGS):
            mesh.store.get(f"clock/{rank}/{number}/asked")
            mesh.store.set(f"clock/{rank}/{number}/told", repr(now()))


def _ping(mesh: Mesh, number: int, now: Callable[[], float]) -> ClockOffset:
    start = now()
    mesh.store.set(f"clock/{mesh.rank}/{number}/asked", "1")
    remote = float(mesh.store.get(f"clock/{mesh.rank}/{number}/told"))
    end = now()
    return ClockOffset(remote - (start + end) / 2, (end - start) / 2)

"""One attempt of a run under torchrun: a prefix for its keys, on which all its workers agree.

torchrun's store lives as long as torchrun. With `--max-restarts` it still holds the keys of the
workers before, when new ones start. No variable of torchrun names an attempt: each node counts its
own restarts (TORCHELASTIC_RESTART_COUNT), and a node that starts again because another one did
counts none. So rank 0 gives the attempt a name that never was, and the others learn it like this:

    rank r   ticket/r = T                      a new T in every process
    rank 0   answer/T = the attempt's name     for the newest ticket of every rank
    rank r   accepted/NAME/T                   and again, if another rank 0 answers meanwhile
    rank 0   complete/NAME                     when the newest ticket of every rank has accepted

A key that another attempt has left is never read, because the tickets and the names differ.

A worker may be killed after its run has ended. Where torchrun then starts its node again, the other
nodes may be gone. So each rank leaves the identity of its torchrun with the attempt, and rank 0
marks the attempt when the run has ended: a worker of the same torchrun has nothing left to do.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable

import psutil
import torch.distributed as dist

from localpipe.errors import RunError, first_line

JOIN_S = 300.0  # from a worker's start to the last one's: imports, however slow the disk
_TICK_S = 0.05
_LATEST = "latest"
_FINISHED = "finished"

EndAttempt = Callable[[dist.Store], None]


class JobFinishedError(Exception):
    """The run had ended before torchrun started this worker again. It is no failure."""


def mark_finished(attempt: dist.Store) -> None:
    """Write into an attempt's store that its run has ended, with a summary."""
    attempt.set(_FINISHED, "1")


def join_attempt(
    store: dist.Store, rank: int, world: int, end_attempt: EndAttempt, join_s: float = JOIN_S
) -> dist.Store:
    """Return the part of the store that belongs to this attempt, after all ranks have joined it.

    store: of the run, the same for all ranks and attempts. Each process calls this once.
    end_attempt: called with the store of the attempt before, if there was one. A process that joins
    proves that it is over, but workers of it may still run on other nodes: with a static rendezvous
    their torchrun does not learn of a restart here. join_s: how long to wait, in seconds.
    Raises RunError if not all ranks have come in that time, or if the store is lost, and
    JobFinishedError if the run has ended under the same torchrun.
    """
    attempts = _Attempts(store, end_attempt, join_s)
    try:
        attempts.check_unfinished()
        if rank == 0:
            name = attempts.gather(world)
        else:
            name = attempts.follow(rank)
        attempts.leave_identity(name)
    except RuntimeError as error:
        raise RunError(f"mesh: lost the launcher: {first_line(error)}") from None
    return attempts.open(name)


class _Attempts:
    """The attempts of one run, seen from a process that joins the next one."""

    def __init__(self, store: dist.Store, end_attempt: EndAttempt, join_s: float) -> None:
        self._store = store
        self._end_attempt = end_attempt
        self._join_s = join_s
        self._deadline = time.monotonic() + join_s
        self._ended: str | None = None

    def check_unfinished(self) -> None:
        """Raise JobFinishedError if the latest attempt was of this torchrun, and its run ended."""
        latest = self._read(_LATEST)
        if latest is None or not self.open(latest).check([_FINISHED]):
            return
        # A store may outlive torchrun, and hold what an earlier job of the same name has left.
        if self._store.check([_identity_key(latest)]):
            raise JobFinishedError

    def leave_identity(self, name: str) -> None:
        """Write into the store that this worker's torchrun takes part in an attempt."""
        self._store.set(_identity_key(name), "1")

    def open(self, name: str) -> dist.Store:
        """Return the part of the store that belongs to one attempt."""
        return dist.PrefixStore(f"attempt/{name}", self._store)

    def gather(self, world: int) -> str:
        """Name the attempt as rank 0, and return its name when all other ranks have accepted it."""
        self._end_latest(None)
        name = uuid.uuid4().hex
        while (missing := self._answer(name, world)) is not None:
            self._wait(
                f"rank {missing} has not started within {self._join_s:g} s; "
                "look at what its node printed"
            )
        self._store.set(_LATEST, name)
        self._store.set(f"complete/{name}", "1")
        return name

    def _answer(self, name: str, world: int) -> int | None:
        """Answer the newest ticket of every rank; return a rank that has not accepted, or None.

        A rank whose process dies meanwhile comes again with another ticket.
        """
        missing = None
        for rank in range(1, world):
            ticket = self._read(f"ticket/{rank}")
            if ticket is not None and self._read(f"answer/{ticket}") != name:
                self._store.set(f"answer/{ticket}", name)
            if ticket is None or not self._store.check([f"accepted/{name}/{ticket}"]):
                missing = rank
        return missing

    def follow(self, rank: int) -> str:
        """Return the name that rank 0 has given to the attempt, when it is complete."""
        ticket = uuid.uuid4().hex
        self._store.set(f"ticket/{rank}", ticket)
        accepted: str | None = None
        while True:
            name = self._read(f"answer/{ticket}")
            if name is not None and name != accepted:
                accepted = name
                self._store.set(f"accepted/{name}/{ticket}", "1")
            if accepted is not None and self._store.check([f"complete/{accepted}"]):
                return accepted
            # Again and again, because one may have been completed with this rank's old ticket.
            self._end_latest(accepted)
            self._wait(
                f"rank {rank} waited {self._join_s:g} s until every rank had started; "
                "look at what the other nodes printed"
            )

    def _end_latest(self, accepted: str | None) -> None:
        """End the latest complete attempt, once, unless it is the one that this process joins."""
        latest = self._read(_LATEST)
        if latest is not None and latest not in (accepted, self._ended):
            self._end_attempt(self.open(latest))
            self._ended = latest

    def _wait(self, complaint: str) -> None:
        if time.monotonic() > self._deadline:
            raise RunError(f"mesh: {complaint}")
        time.sleep(_TICK_S)

    def _read(self, key: str) -> str | None:
        """Return a key's text, or None if nobody has written it, without waiting for it."""
        # `Store.get` waits for a key that is missing.
        if not self._store.check([key]):
            return None
        return self._store.get(key).decode()


def _identity_key(name: str) -> str:
    """Return the key of this process's torchrun, which is its parent, in an attempt."""
    parent = psutil.Process(os.getppid())
    return f"torchrun/{name}/{socket.gethostname()}/{parent.pid}/{parent.create_time()}"

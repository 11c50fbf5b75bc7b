"""Every order of events of rings whose ends die: nothing is lost, read torn, or waited for forever.

A worker's program for message n: look for it, or sleep until it is woken; take it and wake the
sender; look for a free slot, or sleep; write the slot in two moves; publish and wake the receiver;
write a snapshot when it is due, then say so in the ring and wake the sender. A worker may die
between any two moves, and both may. Its replacement begins with the newest snapshot, and wakes both
neighbours. The program is explored in every order in which the workers may move and die.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

TORN = -1


@dataclass(frozen=True)
class Edge:
    """A ring: its counts, what every slot holds, and whether a wake-up waits in either pipe."""

    slots: tuple[int, ...]
    published: int = 0
    taken: int = 0
    saved: int = 0
    to_sender: bool = False
    to_receiver: bool = False


@dataclass(frozen=True)
class Process:
    """A worker: its next move, the number of its message, and what its snapshot covers."""

    move: str = "open"
    number: int = 0
    snapshot: int = 0


State = tuple[tuple[Process, ...], tuple[Edge, ...], int]  # the last: how many may still die


@dataclass(frozen=True)
class Rings:
    """A pipeline of workers, as a model of which of them may do what next."""

    workers: int
    depth: int
    slots: int
    messages: int
    deaths: int
    broken: str = ""
    interval: int | None = None  # messages from snapshot to snapshot, None for the product's

    def start(self) -> State:
        edge = Edge((TORN,) * self.slots)
        return (Process(),) * self.workers, (edge,) * (self.workers - 1), self.deaths

    def is_done(self, state: State) -> bool:
        return all(process.move == "ended" for process in state[0])

    def moves(self, state: State) -> Iterator[State]:
        """Yield the states after any worker has moved, or died."""
        processes, edges, deaths = state
        for rank, process in enumerate(processes):
            if process.move == "dead":
                again = Process("open", process.snapshot, process.snapshot)
                yield _put(processes, rank, again), edges, deaths
                continue
            if process.move != "ended":
                after = self._move(processes, edges, rank)
                if after is not None:
                    yield *after, deaths
            if deaths:
                dead = _put(processes, rank, replace(process, move="dead"))
                yield dead, self._forget_wakes(dead, edges), deaths - 1

    def _forget_wakes(
        self, processes: tuple[Process, ...], edges: tuple[Edge, ...]
    ) -> tuple[Edge, ...]:
        """Empty the pipes that no living process has open."""
        left = []
        for number, edge in enumerate(edges):
            if processes[number].move == processes[number + 1].move == "dead":
                edge = replace(edge, to_sender=False, to_receiver=False)
            left.append(edge)
        return tuple(left)

    def _move(
        self, processes: tuple[Process, ...], edges: tuple[Edge, ...], rank: int
    ) -> tuple[tuple[Process, ...], tuple[Edge, ...]] | None:
        """Return processes and edges after a worker's next move, None where it sleeps."""
        process = processes[rank]
        inbox = edges[rank - 1] if rank > 0 else None
        outbox = edges[rank] if rank < self.workers - 1 else None
        found = getattr(self, f"_{process.move}")(process, inbox, outbox)
        if found is None:
            return None
        process, inbox, outbox = found
        if inbox is not None:
            edges = _put(edges, rank - 1, inbox)
        if outbox is not None:
            edges = _put(edges, rank, outbox)
        return _put(processes, rank, process), edges

    # -- the program, one method a move: (process, inbox, outbox) after it, or None ----------------

    def _open(self, me: Process, inbox: Edge | None, outbox: Edge | None) -> object:
        if inbox is not None:
            assert inbox.saved <= me.snapshot
            inbox = replace(inbox, saved=me.snapshot)
        return replace(me, move="greet_sender"), inbox, outbox

    def _greet_sender(self, me: Process, inbox: Edge | None, outbox: Edge | None) -> object:
        if inbox is not None and self.broken != "wakes nobody":
            inbox = replace(inbox, to_sender=True)
        return replace(me, move="greet_receiver"), inbox, outbox

    def _greet_receiver(self, me: Process, inbox: Edge | None, outbox: Edge | None) -> object:
        if outbox is not None and self.broken != "wakes nobody":
            outbox = replace(outbox, to_receiver=True)
        return replace(me, move="receive"), inbox, outbox

    def _receive(self, me: Process, inbox: Edge | None, outbox: Edge | None) -> object:
        if me.number == self.messages:
            return replace(me, move="ended"), inbox, outbox
        if inbox is None:
            return replace(me, move="send"), inbox, outbox
        if inbox.published <= me.number:
            return replace(me, move="sleep_to_receive"), inbox, outbox
        found = inbox.slots[me.number % self.slots]
        assert found == me.number, f"message {me.number} is {found}"
        return replace(me, move="take"), inbox, outbox

    def _sleep_to_receive(self, me: Process, inbox: Edge, outbox: Edge | None) -> object:
        if not inbox.to_receiver:
            return None
        return replace(me, move="receive"), replace(inbox, to_receiver=False), outbox

    def _take(self, me: Process, inbox: Edge, outbox: Edge | None) -> object:
        taken = max(inbox.taken, me.number + 1)
        return replace(me, move="wake_taken"), replace(inbox, taken=taken), outbox

    def _wake_taken(self, me: Process, inbox: Edge, outbox: Edge | None) -> object:
        return replace(me, move="send"), replace(inbox, to_sender=True), outbox

    def _send(self, me: Process, inbox: Edge | None, outbox: Edge | None) -> object:
        # What was received is still there while it is used.
        if inbox is not None:
            assert inbox.slots[me.number % self.slots] == me.number, "written over while in use"
        if outbox is None or me.number < outbox.published:
            return replace(me, move="count"), inbox, outbox
        covered = outbox.taken if self.broken == "looks at taken alone" else outbox.saved
        if me.number - outbox.taken >= self.depth or me.number - covered >= self.slots:
            return replace(me, move="sleep_to_send"), inbox, outbox
        if self.broken == "publishes first":
            outbox = replace(outbox, published=me.number + 1)
        slots = _put(outbox.slots, me.number % self.slots, TORN)
        return replace(me, move="write"), inbox, replace(outbox, slots=slots)

    def _sleep_to_send(self, me: Process, inbox: Edge | None, outbox: Edge) -> object:
        if not outbox.to_sender:
            return None
        return replace(me, move="send"), inbox, replace(outbox, to_sender=False)

    def _write(self, me: Process, inbox: Edge | None, outbox: Edge) -> object:
        slots = _put(outbox.slots, me.number % self.slots, me.number)
        return replace(me, move="publish"), inbox, replace(outbox, slots=slots)

    def _publish(self, me: Process, inbox: Edge | None, outbox: Edge) -> object:
        outbox = replace(outbox, published=me.number + 1)
        assert outbox.published - outbox.taken <= self.depth
        return replace(me, move="wake_published"), inbox, outbox

    def _wake_published(self, me: Process, inbox: Edge | None, outbox: Edge) -> object:
        return replace(me, move="count"), inbox, replace(outbox, to_receiver=True)

    def _count(self, me: Process, inbox: Edge | None, outbox: Edge | None) -> object:
        handled = me.number + 1
        me = replace(me, number=handled, move="receive")
        if handled - me.snapshot < (self.interval or self.slots // 2) or handled == self.messages:
            return me, inbox, outbox
        if self.broken == "saves first" and inbox is not None and inbox.saved < handled:
            inbox = replace(inbox, saved=handled)
            return replace(me, number=handled - 1, move="count"), inbox, outbox
        return replace(me, snapshot=handled, move="save"), inbox, outbox

    def _save(self, me: Process, inbox: Edge | None, outbox: Edge | None) -> object:
        if inbox is not None:
            inbox = replace(inbox, saved=me.snapshot)
        return replace(me, move="wake_saved"), inbox, outbox

    def _wake_saved(self, me: Process, inbox: Edge | None, outbox: Edge | None) -> object:
        if inbox is not None:
            inbox = replace(inbox, to_sender=True)
        return replace(me, move="receive"), inbox, outbox

    def explore(self) -> int:
        """Return the number of states.

        Raises AssertionError for a deadlock, and for a message that is lost, torn or another one.
        """
        seen, todo = {self.start()}, [self.start()]
        while todo:
            state = todo.pop()
            found = list(self.moves(state))
            assert found or self.is_done(state), f"deadlock in {state}"
            for after in found:
                if after not in seen:
                    seen.add(after)
                    todo.append(after)
        return len(seen)


def _put(values: tuple, index: int, value: object) -> tuple:  # type: ignore[type-arg]
    return (*values[:index], value, *values[index + 1 :])


@pytest.mark.parametrize(
    ("workers", "depth", "slots", "messages", "deaths"),
    [(2, 1, 6, 8, 2), (2, 2, 8, 10, 1), (2, 1, 2, 5, 2), (3, 1, 2, 2, 1)],
)
def test_no_order_of_events_and_deaths_ends_a_pipeline(
    workers: int, depth: int, slots: int, messages: int, deaths: int
) -> None:
    assert Rings(workers, depth, slots, messages, deaths).explore() > 500


@pytest.mark.parametrize(
    ("broken", "reason", "deaths"),
    [
        ("wakes nobody", "deadlock", 1),
        ("looks at taken alone", "message|written over", 1),
        ("publishes first", "message|written over", 0),
        ("saves first", "saved|message|written over", 1),
    ],
)
def test_the_model_sees_what_it_is_for(broken: str, reason: str, deaths: int) -> None:
    with pytest.raises(AssertionError, match=reason):
        Rings(2, 2, 4, 7, deaths, broken, interval=3).explore()
    if deaths:  # without a death none of these is a fault
        Rings(2, 2, 4, 7, 0, broken, interval=3).explore()


def test_snapshots_that_are_late_hold_the_sender_up_and_are_no_deadlock() -> None:
    """A snapshot waits for the end of a step, which may have several messages."""
    assert Rings(2, 2, 4, 7, 1, interval=4).explore() > 500
    with pytest.raises(AssertionError, match="deadlock"):
        Rings(2, 2, 4, 7, 0, interval=5).explore()

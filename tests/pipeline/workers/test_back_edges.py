"""Every order of events of a pipeline with edges back: it ends, no send waits, no slot is lost.

A worker's program for step n: receive n; take what is due; compute and send n; update, and send its
parameters back. A send forward waits while `depth` messages are not requested, as in shared memory.
A send back would wait if the ring were too small. A snapshot that is read must be the one of its
step. The program is explored in every order in which the workers may move.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from localpipe.config.resolved import ResolvedFeedback
from localpipe.pipeline.channels.channel import RECEIVE_SLOTS
from localpipe.pipeline.workers.feedback import back_depth, lag_without_waits, list_pairs
from localpipe.pipeline.workers.persistent_edges import back_slots
from tests.harness import settings

# (position in the program, step) of every stage; sent forward; sent back and taken, by pair.
State = tuple[tuple[tuple[int, int], ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]
PROGRAM = ("receive", "take", "send", "update")


@dataclass(frozen=True)
class Pipeline:
    """A pipeline of one stage a process, as a model of which worker may do what next."""

    stages: int
    depth: int
    steps: int
    feedback: ResolvedFeedback
    ring: int | None = None  # of an edge back, None for that of the product
    interval: int | None = None  # steps between a stage's snapshots, with run.recover=stage

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return list_pairs(self.feedback, self.stages)

    def start(self) -> State:
        edges = len(self.pairs)
        return ((0, 1),) * self.stages, (0,) * (self.stages - 1), (0,) * edges, (0,) * edges

    def is_done(self, state: State) -> bool:
        return all(step > self.steps for _, step in state[0])

    def moves(self, state: State) -> Iterator[tuple[int, State]]:
        """Yield (stage, the state after it has moved)."""
        for stage, (position, step) in enumerate(state[0]):
            if step <= self.steps:
                after = self._move(state, stage, PROGRAM[position], step)
                if after is not None:
                    yield stage, after

    def _move(self, state: State, stage: int, action: str, step: int) -> State | None:
        """Return the state after a stage's next action, or None where it has to wait."""
        places, sent, back, taken = state
        position = PROGRAM.index(action)
        last = position == len(PROGRAM) - 1
        place = (0, step + 1) if last else (position + 1, step)
        places = _put(places, stage, place)
        if action == "receive" and stage > 0 and sent[stage - 1] < step:
            return None
        if action == "take":
            due = self.feedback.due(step)
            for number, (_, earlier) in enumerate(self.pairs):
                if earlier != stage or due is None:
                    continue
                if back[number] == taken[number]:
                    return None  # it has not come
                newest = (taken[number] + 1) * self.feedback.every
                assert newest == due, f"step {step} of stage {stage} takes {newest}, not {due}"
                taken = _put(taken, number, taken[number] + 1)
        if action == "send" and stage < self.stages - 1:
            # The receiver requests a message when it receives the one before it.
            position_after, step_after = state[0][stage + 1]
            received = step_after if position_after > 0 else step_after - 1
            if sent[stage] - received > self.depth:
                return None
            sent = _put(sent, stage, step)
        if last and self.feedback.is_sent(step):
            for number, (later, _) in enumerate(self.pairs):
                if later == stage:
                    free = self._covered(places[self.pairs[number][1]], taken[number])
                    in_flight = back[number] - free
                    assert in_flight < self._room(), f"stage {stage} would wait to send {step}"
                    back = _put(back, number, back[number] + 1)
        return places, sent, back, taken

    def _covered(self, place: tuple[int, int], taken: int) -> int:
        """Return how many of the taken messages may be written over, by the earlier stage's place.

        With recovery they are those that its newest snapshot has taken.
        """
        if self.interval is None:
            return taken
        saved_step = (place[1] - 1) // self.interval * self.interval
        return max(0, saved_step - self.feedback.lag) // self.feedback.every

    def _room(self) -> int:
        """Return how many snapshots may be sent and not received."""
        if self.ring is not None:
            return self.ring
        return back_depth(self.feedback) + RECEIVE_SLOTS - 1  # one slot is being read

    def explore(self) -> tuple[int, int]:
        """Return the number of states, and how often a stage had to wait for parameters.

        Raises AssertionError for a deadlock, a send back that waits, and a wrong snapshot.
        """
        seen, todo, waits = {self.start()}, [self.start()], 0
        while todo:
            state = todo.pop()
            found = dict(self.moves(state))
            assert found or self.is_done(state), f"deadlock in {state}"
            for stage, (position, step) in enumerate(state[0]):
                waits += PROGRAM[position] == "take" and step <= self.steps and stage not in found
            for after in found.values():
                if after not in seen:
                    seen.add(after)
                    todo.append(after)
        return len(seen), waits


def _put(values: tuple, index: int, value: object) -> tuple:  # type: ignore[type-arg]
    return (*values[:index], value, *values[index + 1 :])


CASES = [
    (mode, stages, depth, lag, every)
    for mode in ("block", "readout")
    for stages, depth in ((2, 1), (3, 1), (3, 2))
    for lag, every in ((1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (2, 4))
]


@pytest.mark.parametrize(("mode", "stages", "depth", "lag", "every"), CASES)
def test_no_order_of_events_ends_a_pipeline_or_fills_a_ring(
    mode: str, stages: int, depth: int, lag: int, every: int
) -> None:
    feedback = ResolvedFeedback.model_validate({"mode": mode, "lag": lag, "every": every})
    states, _ = Pipeline(stages, depth, lag + 2 * every + depth + 3, feedback).explore()
    assert states > 30


@pytest.mark.parametrize("mode", ["block", "readout"])
@pytest.mark.parametrize(("stages", "depth"), [(2, 1), (2, 3), (3, 1), (3, 2)])
def test_nothing_waits_from_the_lag_of_the_plan_on(mode: str, stages: int, depth: int) -> None:
    """The note of `plan` says from which lag on no stage waits, and no smaller lag is enough."""
    distance = stages - 1 if mode == "readout" else 1
    lag = lag_without_waits(distance, depth)
    for late, waits in ((lag, False), (lag - 1, True)):
        feedback = ResolvedFeedback.model_validate({"mode": mode, "lag": late, "every": 1})
        _, found = Pipeline(stages, depth, lag + depth + 4, feedback).explore()
        assert bool(found) == waits


def test_a_ring_of_one_fewer_would_be_full() -> None:
    """The model sees what it is for."""
    feedback = ResolvedFeedback.model_validate({"mode": "block", "lag": 3, "every": 1})
    Pipeline(2, 1, 12, feedback, ring=3).explore()
    with pytest.raises(AssertionError, match="would wait"):
        Pipeline(2, 1, 12, feedback, ring=2).explore()


@pytest.mark.parametrize(("lag", "every"), [(1, 1), (3, 2), (2, 4)])
@pytest.mark.parametrize("mode", ["block", "readout"])
def test_the_ring_of_a_run_that_recovers_holds_what_no_snapshot_covers(
    tmp_path: Path, mode: str, lag: int, every: int
) -> None:
    """A send back waits for no snapshot of the earlier stage, which may wait for the sender."""
    config = settings(
        tmp_path,
        method={"feedback": {"mode": mode, "lag": lag, "every": every}},
        pipeline={"stages": 3, "processes": 3, "depth": 1, "replay": 8},
        run={"recover": "stage"},
    )
    feedback, slots, interval = config.method.feedback, back_slots(config), 4
    steps = lag + 2 * every + 2 * interval + 2
    Pipeline(3, 1, steps, feedback, slots, interval).explore()
    with pytest.raises(AssertionError, match="would wait"):
        small = min((lag + interval) // every, interval - 1)
        Pipeline(3, 1, steps, feedback, small, interval).explore()


def test_a_lag_of_none_would_be_a_deadlock() -> None:
    feedback = ResolvedFeedback.model_construct(mode="block", lag=0, every=1)
    with pytest.raises(AssertionError, match="deadlock"):
        Pipeline(2, 1, 4, feedback).explore()

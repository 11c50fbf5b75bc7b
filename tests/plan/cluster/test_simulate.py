"""The simulator equals closed forms, exactly, and a reading of the channel one step at a time."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import pytest

from localpipe.plan.cluster import formulas, simulate
from localpipe.plan.cluster.formulas import MicroTiming, Timing
from localpipe.plan.cluster.simulate import Failures, Jitter

NOISE = Jitter("lognormal", 0.3, seed=1)


def any_timing(rng: random.Random, stages: int) -> Timing:
    """Return whole seconds at random, so that sums are exact."""

    def some(count: int, most: int) -> tuple[float, ...]:
        return tuple(float(rng.randint(0, most)) for _ in range(count))

    edges = stages - 1
    return Timing(
        some(stages, 9),
        some(stages, 9),
        some(edges, rng.choice([0, 5, 30])),
        some(edges, rng.choice([0, 3, 20])),
    )


# -- localpipe -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 5, 16])
@pytest.mark.parametrize("depth", [1, 2, 7])
def test_equal_stages_fill_drain_and_run_at_their_own_pace(stages: int, depth: int) -> None:
    timing = Timing.uniform(stages, before_s=1, after_s=2)
    run = simulate.simulate_pipeline(timing, 40, depth)
    assert run.fill_s == formulas.fill_s(timing) == stages - 1
    assert run.drain_s == formulas.drain_s(timing) == stages - 1
    assert run.period_s == formulas.period_s(timing) == 3
    assert run.wall_s == formulas.run_s(timing, 40) == (stages - 1) + 40 * 3
    assert list(np.diff(run.finished_s)) == [3.0] * 39


def test_the_longest_path_through_any_chain_is_found_exactly_at_any_depth() -> None:
    rng = random.Random(0)
    for _ in range(400):
        stages, steps = rng.randint(1, 7), rng.randint(1, 40)
        timing = any_timing(rng, stages)
        depth = [rng.randint(1, 4) for _ in range(stages - 1)] or 1
        assert simulate.simulate_pipeline(timing, steps, depth).wall_s == formulas.run_s(
            timing, steps
        ), (
            timing,
            steps,
            depth,
        )


def test_a_thousand_stages_are_one_run() -> None:
    timing = Timing.uniform(1024, 1, 2)
    assert (
        simulate.simulate_pipeline(timing, 300).wall_s == formulas.run_s(timing, 300) == 1023 + 900
    )


def test_the_slowest_stage_or_edge_decides() -> None:
    timing = Timing((1, 1, 1), (1, 4, 1), (0, 0), (0, 0))
    assert simulate.simulate_pipeline(timing, 60).period_s == 5
    slow_link = Timing((1, 1, 1), (1, 4, 1), (7, 0), (3, 0))
    assert (
        simulate.simulate_pipeline(slow_link, 60).period_s
        == formulas.period_s(slow_link)
        == 7 + 2 * 3
    )


def test_waits_show_where_the_bottleneck_is() -> None:
    run = simulate.simulate_pipeline(Timing((1, 1, 1), (1, 4, 1), (0, 0), (0, 0)), 400)
    assert run.send_wait[0] > 0.5 > 0.01 > max(run.send_wait[1:])
    assert run.receive_wait[2] > 0.5 > 0.01 > max(run.receive_wait[:2])
    assert run.busy[1] == pytest.approx(1, abs=0.01)


def factors(steps: int, stages: int, jitter: Jitter) -> dict[tuple[int, int], float]:
    """Return the factor of every (stage, step), in the order in which the simulator draws."""
    rng, found = np.random.default_rng(jitter.seed), {}
    for diagonal in range(steps + stages - 1):
        here = range(max(0, diagonal - steps + 1), min(stages, diagonal + 1))
        for stage, factor in zip(
            here, jitter.draw_factors(rng, (1, len(here)))[0].tolist(), strict=True
        ):
            found[stage, diagonal - stage] = factor
    return found


def one_at_a_time(
    timing: Timing, steps: int, depth: int, factor: dict[tuple[int, int], float]
) -> list[float]:
    """Return when the last stage ends each step: the events of channel.py, a cell at a time.

    Every time is a maximum of earlier ones, so sweeping until nothing changes needs no order.
    """
    stages = timing.stages
    began: dict[tuple[int, int], float] = {}
    sent: dict[tuple[int, int], float] = {}
    ended: dict[tuple[int, int], float] = {}
    moved: dict[tuple[int, int], float] = {}

    def at(times: dict[tuple[int, int], float], stage: int, step: int) -> float:
        return times.get((stage, step), -math.inf if times is began else 0.0)

    changed = True
    while changed:
        before = (dict(began), dict(sent), dict(ended), dict(moved))
        for step in range(steps):
            for stage in range(stages):
                start = at(ended, stage, step - 1)
                if stage > 0:
                    move, wait = timing.transfer_s[stage - 1], timing.latency_s[stage - 1]
                    ready = at(began, stage, step - 1) + wait
                    moved[stage, step] = (
                        max(at(sent, stage - 1, step), ready, at(moved, stage, step - 1), 0.0)
                        + move
                    )
                    start = max(start, moved[stage, step] + wait)
                began[stage, step] = start
                sent[stage, step] = start + timing.before_s[stage] * factor[stage, step]
                if stage < stages - 1:
                    sent[stage, step] = max(sent[stage, step], at(moved, stage + 1, step - depth))
                ended[stage, step] = sent[stage, step] + timing.after_s[stage] * factor[stage, step]
        changed = before != (began, sent, ended, moved)
    return [ended[stages - 1, step] for step in range(steps)]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_diagonal_at_a_time_is_the_channel_one_step_at_a_time(depth: int) -> None:
    rng = random.Random(depth)
    for _ in range(8):
        stages, steps = rng.randint(2, 5), rng.randint(3, 12)
        timing = any_timing(rng, stages)
        found = simulate.simulate_pipeline(timing, steps, depth, NOISE).finished_s.tolist()
        assert found == one_at_a_time(timing, steps, depth, factors(steps, stages, NOISE))


def test_on_a_fast_link_an_edge_is_a_queue_of_depth_and_one_more() -> None:
    """The plain queue: a send returns once the next stage began the message depth + 1 before."""
    first, second = 1.0, 10.0
    for depth in (1, 2, 5):
        timing = Timing((first, second), (0, 0), (0,), (0,))
        begun: list[float] = []
        sends: list[float] = []
        for step in range(20):
            room = begun[step - depth - 1] if step > depth else 0.0
            sends.append(max((sends[-1] if sends else 0.0) + first, room))
            begun.append(max(sends[-1], begun[-1] + second if begun else 0.0))
        assert simulate.simulate_pipeline(timing, 20, depth).finished_s.tolist() == [
            start + second for start in begun
        ]
        # The first stage ends depth + 2 messages ahead: one is being read, depth + 1 wait.
        assert simulate.simulate_pipeline(timing, 20, depth).drain_s == (depth + 2) * second


@pytest.mark.parametrize("jitter", [Jitter("uniform", 0.5), NOISE])
def test_more_depth_is_never_slower_and_hides_jitter(jitter: Jitter) -> None:
    timing = Timing.uniform(6, 1, 2, 0.5, 0.1)
    runs = [simulate.simulate_pipeline(timing, 1500, depth, jitter) for depth in (1, 2, 4, 8, 16)]
    for shallow, deep in zip(runs, runs[1:], strict=False):
        assert (deep.finished_s <= shallow.finished_s).all()
    without = formulas.period_s(timing)
    lost = [run.period_s / without - 1 for run in runs]
    assert lost[0] > 2 * lost[-1] > 0 and lost[-1] < 0.08


def test_jitter_has_a_mean_of_one_and_follows_its_seed() -> None:
    for jitter in (Jitter("uniform", 0.4), Jitter("lognormal", 0.4)):
        drawn = jitter.draw_factors(np.random.default_rng(0), (200_000,))
        assert drawn.mean() == pytest.approx(1, abs=0.005) and drawn.std() > 0.2
    timing = Timing.uniform(3, 1, 1)
    walls = [
        simulate.simulate_pipeline(timing, 50, 2, Jitter("uniform", 0.4, seed)).wall_s
        for seed in (1, 1, 2)
    ]
    assert walls[0] == walls[1] != walls[2]


def test_replicas_wait_for_the_slowest_of_them() -> None:
    timing = Timing.uniform(3, 1, 1)
    assert (
        simulate.simulate_pipeline(timing, 50, replicas=4).wall_s
        == simulate.simulate_pipeline(timing, 50).wall_s
    )
    periods = [
        simulate.simulate_pipeline(timing, 400, 2, Jitter("uniform", 0.4), n).period_s
        for n in (1, 2, [8, 8, 8])
    ]
    assert periods == sorted(periods) and periods[2] > 1.2 * 2
    one_wide = simulate.simulate_pipeline(timing, 400, 2, Jitter("uniform", 0.4), [1, 8, 1])
    assert one_wide.period_s == pytest.approx(periods[2], rel=0.03)
    work = [share * one_wide.wall_s / 400 for share in one_wide.busy]
    assert work == pytest.approx(
        [2, 2 * (1 + 0.4 * 7 / 9), 2], rel=0.03
    )  # the mean of the largest of eight


# -- the peers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batches", [1, 2, 4, 8, 32])
def test_gpipe_and_1f1b_take_m_plus_k_minus_1_turns(stages: int, micro_batches: int) -> None:
    timing = MicroTiming.uniform(stages, 1, 1, 1)
    turns = 3 * (micro_batches + stages - 1)
    for schedule, formula in (("gpipe", formulas.gpipe_s), ("1f1b", formulas.one_f_one_b_s)):
        assert (
            simulate.simulate_synchronous(schedule, timing, micro_batches)
            == turns
            == formula(timing, micro_batches)
        )
    assert turns / (3 * micro_batches) == pytest.approx(
        formulas.bubble_ratio(micro_batches, stages), rel=1e-15
    )


@pytest.mark.parametrize("work", [(1, 1, 1), (1, 2, 1), (2, 1, 0.5), (1, 1, 4), (1, 2, 2)])
@pytest.mark.parametrize("stages", [1, 2, 4, 6])
def test_zb_h1_has_the_papers_bubble(stages: int, work: tuple[float, float, float]) -> None:
    forward, inputs, weights = work
    timing = MicroTiming.uniform(stages, *work, update_s=0.25)
    for micro_batches in (stages, stages + 1, 2 * stages, 16):
        step = simulate.simulate_synchronous("zb-h1", timing, micro_batches)
        assert step == formulas.zero_bubble_s(timing, micro_batches)
        assert step <= simulate.simulate_synchronous("1f1b", timing, micro_batches)
        if weights <= forward:
            paper = micro_batches * sum(work) + (stages - 1) * (forward + inputs - weights)
            assert step == paper + 0.25


def test_gpipe_is_two_flow_shops_on_any_chain() -> None:
    rng = random.Random(0)
    for _ in range(150):
        stages, micro_batches = rng.randint(1, 6), rng.randint(1, 12)
        chain, others = any_timing(rng, stages), any_timing(rng, stages)
        timing = MicroTiming(
            chain.before_s,
            chain.after_s,
            others.before_s,
            (0.0,) * stages,
            chain.transfer_s,
            chain.latency_s,
        )
        assert simulate.simulate_synchronous("gpipe", timing, micro_batches) == formulas.gpipe_s(
            timing, micro_batches
        )


def test_the_estimate_of_1f1b_holds_on_a_mild_chain() -> None:
    timing = MicroTiming(
        (10, 12, 9, 11), (10, 12, 9, 11), (10, 12, 9, 11), (0, 0, 0, 0), (2, 2, 2), (1, 1, 1)
    )
    for micro_batches in (4, 8, 16, 64):
        simulated = simulate.simulate_synchronous("1f1b", timing, micro_batches)
        assert formulas.one_f_one_b_s(timing, micro_batches) == pytest.approx(simulated, rel=0.05)


def in_flight(order: Sequence[tuple[str, int]]) -> int:
    """Return the most micro-batches that are between their forward pass and their last gradient."""
    return max(
        accumulate({simulate.F: 1, simulate.B: 0, simulate.W: -1}[kind] for kind, _ in order)
    )


@pytest.mark.parametrize(
    "schedule",
    [simulate.order_gpipe, simulate.order_one_f_one_b, simulate.order_zero_bubble],
    ids=["gpipe", "one_f_one_b", "zero_bubble"],
)
def test_an_order_does_everything_once_and_each_gradient_after_its_forward(
    schedule: Callable[[int, int, int], simulate.Order],
) -> None:
    for stages, micro_batches in ((1, 3), (4, 2), (4, 4), (4, 9)):
        for stage in range(stages):
            order = schedule(stage, stages, micro_batches)
            expected = sorted(
                (kind, i)
                for kind in (simulate.F, simulate.B, simulate.W)
                for i in range(micro_batches)
            )
            assert sorted(order) == expected
            for i in range(micro_batches):
                assert (
                    order.index(("forward", i))
                    < order.index(("input", i))
                    < order.index(("weight", i))
                )


def test_1f1b_and_zb_h1_hold_no_more_than_the_published_number_of_micro_batches() -> None:
    for stage in range(4):
        assert in_flight(simulate.order_one_f_one_b(stage, 4, 16)) == 4 - stage
        assert in_flight(simulate.order_zero_bubble(stage, 4, 16)) <= 4
        assert in_flight(simulate.order_gpipe(stage, 4, 16)) == 16


def test_jitter_and_links_slow_the_peers_down() -> None:
    still, linked = MicroTiming.uniform(4, 1, 1, 1), MicroTiming.uniform(4, 1, 1, 1, 0, 0.2, 0.1)
    for schedule in simulate.SCHEDULES:
        base = simulate.simulate_synchronous(schedule, still, 8)
        assert simulate.simulate_synchronous(schedule, still, 8, 100, Jitter("uniform", 0.3)) > base
        assert simulate.simulate_synchronous(schedule, linked, 8) > base


def test_buckets_hide_the_all_reduce_behind_the_backward() -> None:
    for reduce in ([], [1.0], [1.0] * 4, [5.0] * 4, [0.0, 9.0]):
        assert simulate.simulate_ddp(2, 4, 1, reduce, devices=8) == formulas.ddp_s(2, 4, 1, reduce)
    assert formulas.ddp_s(2, 4, 1, []) == 7
    assert formulas.ddp_s(2, 4, 1, [1.0] * 4) == 7 + 1  # only the last bucket shows
    assert (
        formulas.ddp_s(2, 4, 1, [5.0] * 4) == 2 + 1 + 4 * 5 + 1
    )  # the link decides, after the first bucket
    assert (
        simulate.simulate_ddp(2, 4, 1, [], devices=8, steps=500, jitter=Jitter("uniform", 0.3))
        > 1.1 * 7
    )


def test_a_ring_moves_nearly_twice_the_bytes() -> None:
    assert formulas.ring_all_reduce_s(1e9, 1, 1e9, 1) == 0
    assert formulas.ring_all_reduce_s(1e9, 4, 1e9, 0) == pytest.approx(1.5)
    assert formulas.ring_all_reduce_s(0, 4, 1e9, 0.01) == pytest.approx(0.06)


# -- failures --------------------------------------------------------------------------------------


def test_failures_cost_what_the_formula_expects() -> None:
    finished = np.arange(1, 20_001) * 1.0
    for devices, checkpoint in ((10, 50.0), (40, 100.0)):
        found = [
            simulate.add_failures(finished, Failures(devices, 20_000.0, 30.0, checkpoint, seed))
            for seed in range(60)
        ]
        expected = formulas.expected_s(20_000.0, checkpoint, 30.0, 20_000.0 / devices)
        assert sum(found) / len(found) == pytest.approx(expected, rel=0.03)
        assert expected > 20_000 + 20_000 / 20_000 * devices * 30


def test_without_failures_a_run_takes_what_it_takes() -> None:
    finished = simulate.simulate_pipeline(Timing.uniform(4, 1, 2), 30).finished_s
    never = Failures(8, math.inf, 60, 60)
    assert (
        simulate.add_failures(finished, never)
        == finished[-1]
        == formulas.expected_s(93, 60, 60, math.inf)
    )
    assert formulas.expected_s(93, 1e6, 60, 1.0) == math.inf

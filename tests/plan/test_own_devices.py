"""Workers with devices, threads and budgets of their own, and the cuts that follow from them."""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path
from typing import Any

import pytest

from localpipe import config as configs
from localpipe import data
from localpipe.cli.command_line import main
from localpipe.config.load import to_dict
from localpipe.config.resolve import DataFacts, Facts, MachineFacts, resolve
from localpipe.config.resolved import Resolved, take_workers
from localpipe.errors import UserError
from localpipe.networks.cuts import balance_part, balance_workers
from localpipe.pipeline.launch.process import prepare_process
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.workers.device import check_listed_devices
from localpipe.plan.balanced_cuts import time_cuts
from localpipe.plan.costs import count_costs
from localpipe.plan.measure import measure_profile
from localpipe.plan.memory import worker_memory
from localpipe.plan.predict import fits_cores, predict
from localpipe.plan.profile import SECONDS, Profile
from localpipe.plan.resolve_here import resolve_here
from tests.plan.test_balanced_cuts import profile

MIB = 2**20


def parsed(**pipeline: Any) -> Any:
    """Return a configuration of four stages of ResNet-8 on small images."""
    run = pipeline.pop("run", {"threads": 1})
    sections = {
        "model": {"name": "resnet8"},
        "pipeline": {"stages": 4, **pipeline},
        "data": {"name": "synthetic", "samples": 32, "image_size": 16, "batch_size": 16},
        "run": run,
    }
    return configs.parse(sections, "test")


def resolved(**pipeline: Any) -> Resolved:
    given = parsed(**pipeline)
    return resolve_here(given, data.load(given.data, 0))


def with_workers(*factors: float) -> Profile:
    """Return the profile of a chain on workers of these speeds, as multiples of its seconds."""
    one = profile()
    each = []
    for factor in factors:
        values: dict[str, Any] = {}
        for name in SECONDS:
            values[name] = scaled(getattr(one, name), factor)
        each.append(values)
    return profile(each=tuple(each), devices=("cpu",) * len(factors))


def scaled(value: Any, factor: float) -> Any:
    if isinstance(value, dict):
        return {key: scaled(item, factor) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(scaled(item, factor) for item in value)
    return value * factor


# --- Cuts


@pytest.mark.parametrize("stages", [(1, 1, 1), (2, 1), (1, 3), (2, 2)])
def test_the_cut_of_workers_is_the_best_of_all_cuts(stages: tuple[int, ...]) -> None:
    """Against all cuts: the costliest worker, the sum of its stages, costs least."""
    blocks, speeds = 7, (1.0, 0.4, 2.0)
    hosts: list[range] = []
    for count in stages:
        first = hosts[-1][-1] + 1 if hosts else 0
        hosts.append(range(first, first + count))

    def cost(first: int, last: int, stage: int) -> float:
        return sum((3 * block) % 5 + 1 for block in range(first, last + 1)) + stage

    def split(first: int, last: int, worker: int) -> tuple[float, tuple[int, ...]]:
        total, cut = balance_part(first, last, hosts[worker], cost, lambda a, b: a + b)
        return speeds[worker] * total, cut

    def slowest(cut: tuple[int, ...]) -> float:
        firsts, lasts = (0, *(end + 1 for end in cut)), (*cut, blocks - 1)
        seconds = []
        for worker, hosted in enumerate(hosts):
            own = [cost(firsts[stage], lasts[stage], stage) for stage in hosted]
            seconds.append(speeds[worker] * sum(own))
        return max(seconds)

    found = balance_workers(blocks, stages, split)
    every = itertools.combinations(range(blocks - 1), sum(stages) - 1)
    assert len(found) == sum(stages) - 1
    assert slowest(found) == pytest.approx(min(map(slowest, every)))


def test_the_time_cut_gives_a_slow_worker_less() -> None:
    assert time_cuts(with_workers(1, 1), (1, 1), 2) == (0,)
    assert time_cuts(with_workers(3, 1), (1, 1), 2) == (0,)
    assert time_cuts(with_workers(1, 3), (1, 1), 2) == (2,)
    # Three stages on two workers: the second one hosts the last stage alone.
    assert time_cuts(with_workers(1, 4), (1, 1, 1), 2) == (0, 2)


def test_replicas_of_a_stage_wait_for_the_slowest_of_them() -> None:
    # Ranks 0 and 1 are the first replica of both stages, ranks 2 and 3 the second.
    assert time_cuts(with_workers(1, 3, 1, 1), (2, 2), 4) == (2,)
    assert time_cuts(with_workers(1, 1, 1, 3), (2, 2), 4) == (2,)
    assert time_cuts(with_workers(1, 1, 1, 1), (2, 2), 4) == (0,)


def test_a_prediction_takes_each_workers_own_seconds() -> None:
    bounds = [(0, 1), (2, 3)]
    found = predict(with_workers(1, 4), bounds, [0], 2, 4)
    assert found.stage_s == pytest.approx((0.039, 4 * 0.021))
    assert found.samples_per_s == pytest.approx(16 / (4 * 0.021))
    listed = profile(threads=(3, 1))
    assert predict(listed, bounds, [0], 2, 3).efficiency is None
    assert predict(listed, bounds, [0], 2, 4).efficiency is not None


def test_the_budget_cut_is_the_best_of_all_cuts() -> None:
    budgets = [40 * MIB, 4 * MIB]
    found = resolved(processes=2, cuts="memory", memory=budgets)
    shares = {}
    for cut in itertools.combinations(range(3), 3):
        other = resolved(processes=2, cuts=list(cut), stages=None)
        shares[cut] = fullest_share(other, budgets)
    assert fullest_share(found, budgets) == pytest.approx(min(shares.values()))


@pytest.mark.parametrize("budgets", [(8, 3), (3, 8)])
def test_a_small_worker_gets_less_memory(budgets: tuple[int, int]) -> None:
    sizes = [budget * MIB for budget in budgets]
    found = resolved(stages=2, processes=2, cuts="memory", memory=sizes)
    shares = {}
    for last in range(3):
        other = resolved(stages=2, processes=2, cuts=[last])
        shares[(last,)] = fullest_share(other, sizes)
    assert found.pipeline.cuts == min(shares, key=lambda cut: shares[cut])
    assert len(set(shares.values())) == 3


def fullest_share(config: Resolved, budgets: list[int]) -> float:
    """Return the largest share of its budget that a worker of consecutive stages uses."""
    blueprint, plans = build_plans(config)
    costs = count_costs(blueprint, plans, config)
    half = len(plans) // 2
    used = []
    for rank, hosted in enumerate((slice(0, half), slice(half, len(plans)))):
        memory = worker_memory(plans[hosted], costs[hosted], config)
        used.append(memory.total_bytes / budgets[rank])
    return max(used)


def test_what_does_not_fit_a_budget_is_refused() -> None:
    advice = "lower data.batch_size or pipeline.depth, or raise optim.accumulate$"
    best = r"config: worker 1 needs 3\.\d MiB by the plan, but pipeline.memory gives it 1.0 MiB; "
    with pytest.raises(UserError, match=best + advice):
        resolved(processes=2, cuts="memory", memory=["4GiB", "1MiB"])
    with pytest.raises(UserError, match="set pipeline.cuts=memory, " + advice):
        resolved(processes=2, memory=["4GiB", "1MiB"])


# --- Keys


def test_lists_of_workers_decide_their_number() -> None:
    facts = Facts(
        DataFacts((3, 16, 16), 10, (0.5,) * 3, (0.5,) * 3, "none"), MachineFacts(8, cuda_devices=4)
    )
    config = resolve(parsed(devices=["cuda:1", "cuda:0"], run={}), facts)
    assert (config.run.device, config.pipeline.processes) == ("cuda", 2)
    listed = resolve(parsed(run={"threads": [3, 1, 2], "device": "cpu"}), facts)
    assert listed.threads == (3, 1, 2) and listed.pipeline.processes == 3
    assert listed.workers_differ and not resolve(parsed(), facts).workers_differ
    pinned = resolve(parsed(devices=["cpu:0", "cpu:1"], run={}), facts)
    assert pinned.run.threads == 1
    assert take_workers(config, 1)["pipeline.devices"] == ["cuda:1"]
    # Budgets are for the stages that all workers share: one of them alone would be too small.
    budgeted = resolve(parsed(memory=["1GiB", "1GiB"]), facts)
    assert take_workers(budgeted, 1)["pipeline.memory"] is None
    assert to_dict(parsed(memory="24GiB,512MB"))["pipeline"]["memory"] == [24 * 2**30, 512 * 10**6]


@pytest.mark.parametrize(
    ("pipeline", "line"),
    [
        ({"devices": ["cpu", "cuda:0"]}, "pipeline.devices has both cpu and cuda"),
        ({"devices": ["gpu:0"]}, "null or a list of cpu, cpu:N or cuda:N"),
        ({"devices": []}, "null or a list of cpu, cpu:N or cuda:N"),
        ({"memory": ["much"]}, "null or a list of sizes, as 24GiB"),
        ({"devices": ["cpu"], "run": {"device": "cuda"}}, "set run.device=cpu"),
        (
            {"devices": ["cpu"], "processes": 2},
            "pipeline.devices lists 1 workers, but pipeline.processes is 2; give one value",
        ),
        (
            {"devices": ["cpu", "cpu"], "run": {"threads": [1, 1, 1]}},
            "pipeline.devices lists 2 and run.threads lists 3 workers; give one value",
        ),
        ({"devices": ["cpu"] * 5}, "pipeline.devices lists 5 workers, but 4 stages"),
        (
            {"devices": ["cpu:0", "cpu:1"], "run": {"threads": 2}},
            "run.threads gives rank 0 2 threads, but pipeline.devices gives it one core, cpu:0,",
        ),
        (
            {"devices": ["cpu", "cpu:1"], "run": {"threads": [2, 2]}},
            "rank 1 2 threads, but pipeline.devices gives it one core, cpu:1, on which they wait",
        ),
    ],
)
def test_lists_that_do_not_fit_are_refused(pipeline: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as refused:
        parsed(**pipeline)
    assert line in str(refused.value) and "\n" not in str(refused.value)


def test_a_core_has_one_thread_and_a_free_worker_has_several() -> None:
    devices = ["cpu:0", "cpu"]
    for threads in ("auto", 1, [1, 2]):
        assert parsed(devices=devices, run={"threads": threads}).pipeline.devices == (
            "cpu:0",
            "cpu",
        )


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2})
    with pytest.raises(UserError, match="names cpu:1, but this machine has cpu:0, cpu:2; choose"):
        check_listed_devices(["cpu:0", "cpu:1"], "gloo")
    check_listed_devices(["cpu:0", "cpu:2", "cpu"], "gloo")


# --- Workers


def test_a_worker_is_kept_on_its_own_core_with_its_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: kept.append((pid, cores)))
    monkeypatch.setattr("torch.set_num_threads", kept.append)
    config = resolved(processes=2, devices=["cpu:0", "cpu"], run={"threads": [1, 2]})
    prepare_process(config, 0)
    prepare_process(config, 1)
    assert kept == [(0, {0}), 1, 2]
    assert not fits_cores(config)


def test_workers_that_differ_are_measured_each(tmp_path: Path) -> None:
    args = {"time_ms": [1, 1, 1], "message_bytes": 4096}
    given = configs.parse(
        {
            "model": {"name": "chain", "args": args},
            "pipeline": {"stages": 2, "devices": ["cpu:0", "cpu"]},
            "data": {"name": "synthetic", "samples": 32, "image_size": 8, "batch_size": 16},
            "run": {"dir": str(tmp_path / "run"), "threads": 1},
        },
        "test",
    )
    config = resolve_here(given, data.load(given.data, 0))
    found = measure_profile(config, [2], 2)
    assert found.each is not None and len(found.each) == 2 and found.devices == ("cpu:0", "cpu")
    assert found.each[0]["tail_s"] != found.each[1]["tail_s"]
    assert not math.isnan(found.of_worker(1).stage_s(0, 1, 0, 2))
    assert Profile.from_json(found.to_json()).mismatch(config) is None
    alike = found.mismatch(resolve_here(parsed(stages=2), data.load(given.data, 0)))
    assert alike is not None


def test_a_worker_without_its_device_says_so() -> None:
    """torchrun's workers are on machines that nobody has looked at before."""
    for name, found in (("cpu:9999", "cpu:"), ("cuda:9999", "cuda:")):
        config = resolved(processes=1, devices=["cpu"])
        pipeline = config.pipeline.model_copy(update={"devices": (name,)})
        with pytest.raises(UserError, match=f"names {name}, but this machine has") as refused:
            prepare_process(config.model_copy(update={"pipeline": pipeline}), 0)
        assert found in str(refused.value)


def test_bench_counts_memory_beside_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data.batch_size=32", "pipeline.processes=2", "pipeline.memory=12MiB,12MiB"]
    assert main(["bench", "demo", "model.name=resnet8", *words, "--memory"]) == 0
    assert "dgl" in capsys.readouterr().out

"""Cuts that balance: the optimal partition against brute force, memory cuts, and profiles.

Cuts by memory are compared with the papers' hand-made ones.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from localpipe import config as configs
from localpipe import data
from localpipe.cli.command_line import main
from localpipe.config.keys import Config
from localpipe.config.load import to_yaml, update
from localpipe.config.resolved import Resolved
from localpipe.config.resume import read_recorded
from localpipe.errors import RunError, UserError
from localpipe.networks.cuts import balance
from localpipe.pipeline.stages.stage_plan import build_blueprint, build_plans
from localpipe.plan.balanced_cuts import time_cuts
from localpipe.plan.costs import count_costs, count_saved_bytes
from localpipe.plan.measure import measure_profile
from localpipe.plan.predict import predict, predict_cuts
from localpipe.plan.profile import Profile, profile_facts, read_profile
from localpipe.plan.resolve_here import resolve_here
from localpipe.runs.prepare import prepare
from tests.harness import settings
from tests.networks.test_chain import chained

CONTRAST = {"name": "infopro", "task": "contrast"}


def resolved(network: str, stages: int, method: Any, cuts: Any, tmp_path: Path) -> Resolved:
    """Return a resolved configuration of a network on 32x32 images."""
    sections = {
        "model": {"name": network, "num_classes": 10},
        "method": method,
        "pipeline": {"stages": stages, "cuts": cuts},
        "data": {"name": "synthetic", "samples": 64, "image_size": 32, "batch_size": 8},
        "run": {"dir": str(tmp_path / "run"), "threads": 1},
    }
    given = configs.parse(sections, "test")
    return resolve_here(given, data.load(given.data, 0))


def saved(config: Resolved) -> list[int]:
    return [cost.activation_bytes_per_sample for cost in count_costs(*build_plans(config), config)]


def profile(**given: Any) -> Profile:
    """Return a profile of a chain of 4 blocks, 10 ms each. Losses take longest after block 1."""
    loss = (0.001, 0.02, 0.002, math.nan)
    values: dict[str, Any] = {
        "network": "chain", "blocks": ("a", "b", "c", "d"), "method": {}, "image": (3, 8, 8),
        "batch_size": 16, "precision": "fp32", "threads": 1, "device": "cpu",
        "channels_last": False, "torch": "2", "workers": 2,
        "lead_s": ((0.009, math.nan, math.nan, math.nan), (math.nan, 0.008, 0.008, 0.008)),
        "block_s": (math.nan, 0.01, 0.01, 0.01), "loss_s": {"2": (loss,), "3": (loss, loss)},
        "tail_s": 0.003, "copy_s_per_byte": 0.0, "turn_s": 0.0,
    }  # fmt: skip
    return Profile(**{**values, **given})


# --- The optimal partition


def test_the_cut_is_the_best_of_all_cuts() -> None:
    draw = random.Random(0)
    for _ in range(60):
        blocks = draw.randint(1, 8)
        stages = draw.randint(1, blocks)
        costs = {
            (first, last, stage): float(draw.randint(1, 9))
            for first, last, stage in itertools.product(range(blocks), range(blocks), range(stages))
        }

        def figures(cut: tuple[int, ...], costs: Any = costs, blocks: int = blocks) -> list[float]:
            starts, ends = [0, *(end + 1 for end in cut)], [*cut, blocks - 1]
            return [
                costs[first, last, k]
                for k, (first, last) in enumerate(zip(starts, ends, strict=True))
            ]

        def cost(first: int, last: int, stage: int, costs: Any = costs) -> float:
            return float(costs[first, last, stage])

        found = figures(balance(blocks, stages, cost))
        every = [figures(cut) for cut in itertools.combinations(range(blocks - 1), stages - 1)]
        least = min(max(each) for each in every)
        assert len(found) == stages and max(found) == least
        assert sum(c * c for c in found) == min(
            sum(c * c for c in each) for each in every if max(each) == least
        )


def test_only_stages_that_can_be_are_asked_for() -> None:
    def cost(first: int, last: int, stage: int) -> float:
        assert stage <= first <= last <= 9 - 4 + stage and (stage < 3 or last == 8)
        assert (stage == 0) == (first == 0)
        return last - first + 1

    assert balance(9, 4, cost) in {(1, 3, 5), (1, 3, 6), (1, 4, 6), (2, 4, 6)}


def test_more_stages_than_blocks_have_no_cut() -> None:
    with pytest.raises(UserError, match="cannot cut 3 blocks into 4 stages"):
        balance(3, 4, lambda first, last, stage: 1.0)


# --- Memory


@pytest.mark.parametrize(
    "method",
    [
        {"objective": CONTRAST},
        {"objective": {"name": "dgl"}, "context": {"mode": "E"}},
        {"objective": {"name": "auglocal"}},
    ],
)
def test_saved_bytes_of_a_candidate_are_those_of_the_stage(
    method: dict[str, Any], tmp_path: Path
) -> None:
    config = resolved("resnet20", 4, method, [1, 2, 6], tmp_path)
    blueprint, plans = build_plans(config)
    cost = count_saved_bytes(blueprint, config, 4)
    assert [int(cost(plan.first, plan.last, plan.stage)) for plan in plans] == saved(config)


def test_memory_cut_needs_no_more_than_the_papers_hand_made_one(tmp_path: Path) -> None:
    config = resolved("resnet110", 4, {"objective": CONTRAST}, "equal", tmp_path)
    blueprint, _ = build_plans(config)
    for stages, published_kib in ((2, 4337), (3, 3121), (4, 2362)):
        cost = count_saved_bytes(blueprint, config, stages)
        cuts = balance(55, stages, cost)
        bounds = zip([0, *(end + 1 for end in cuts)], [*cuts, 54], strict=True)
        assert (
            max(cost(first, last, k) for k, (first, last) in enumerate(bounds)) / 1024
            < published_kib + 1
        )


def test_published_weights_follow_the_decided_cut(tmp_path: Path) -> None:
    method = {"objective": CONTRAST}
    given = {
        "model": {"name": "resnet32", "num_classes": 10},
        "method": method,
        "pipeline": {"stages": 2, "cuts": "memory"},
    }
    images = {"name": "synthetic", "image_size": 32, "batch_size": 8}
    parsed = configs.parse({**given, "data": images}, "test")
    objective = resolve_here(parsed, data.load(parsed.data, 0)).method.objective
    assert objective["image_weight"] != "auto"


# --- Profiles


def test_a_stage_is_the_sum_of_its_pieces() -> None:
    one = profile()
    assert one.stage_s(0, 1, 0, 2) == pytest.approx(0.009 + 0.01 + 0.02)
    assert one.stage_s(2, 3, 1, 2) == pytest.approx(0.008 + 0.01 + 0.003)
    assert one.stage_s(2, 2, 1, 3) == pytest.approx(0.008 + 0.002)
    assert one.stage_s(3, 3, 2, 3) == pytest.approx(0.008 + 0.003)
    with pytest.raises(UserError, match="measured for 2, 3 stages, not for 4"):
        one.stage_s(0, 0, 0, 4)


def test_the_time_cut_counts_the_auxiliary_network() -> None:
    even = profile(loss_s={"2": ((0.003,) * 4,)})
    assert time_cuts(even, (1, 1), 1) == (1,)
    # After block 1 it would be 39 ms, so it is 31 ms at either side.
    assert time_cuts(profile(), (1, 1), 1) == (0,)


def test_a_profile_of_a_gpu_that_it_does_not_name_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    config = update(settings(tmp_path), {"run.device": "cuda"})
    blueprint = build_blueprint(config)
    facts = {
        **profile_facts(config),
        "blocks": tuple(block.name for block in blueprint.blocks),
        "image": tuple(blueprint.sample),
    }
    assert profile(**facts).mismatch(config) is None
    other = "gpu is 'Emulated GPU' there, the configuration has 'NVIDIA H200'"
    assert profile(**{**facts, "gpu": "Emulated GPU"}).mismatch(config) == other
    # An older version named no GPU. What it left out of the rest is not compared.
    old = {**facts, "gpu": None, "capture": None, "wire_dtype": None}
    assert str(profile(**old).mismatch(config)).startswith("gpu is None there")
    assert profile(**{**old, "gpu": "NVIDIA H200"}).mismatch(config) is None
    assert json.loads(profile(**{**facts, "gpu": "Emulated GPU"}).to_json())["emulated"] is True
    assert "emulated" not in json.loads(profile(**facts).to_json())


def test_a_profile_reads_back_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(profile().to_json())
    assert "NaN" not in file.read_text()
    assert read_profile(file).to_json() == profile().to_json()
    assert read_profile(file).stage_s(0, 1, 0, 2) == profile().stage_s(0, 1, 0, 2)
    file.write_text("[]")
    with pytest.raises(UserError, match="is no profile of this version"):
        read_profile(file)


def test_a_prediction_is_the_busiest_worker_and_what_it_copies() -> None:
    bounds, cores = [(0, 1), (2, 3)], 4
    alone = predict(profile(), bounds, [1000], 2, cores)
    assert alone.samples_per_s == pytest.approx(16 / 0.039) and alone.efficiency == pytest.approx(1)
    assert alone.balance == pytest.approx((0.039 + 0.021) / 2 / 0.039)
    copying = predict(profile(copy_s_per_byte=1e-6), bounds, [1000], 2, cores)
    assert copying.samples_per_s == pytest.approx(
        16 / 0.040
    ) and copying.efficiency == pytest.approx(0.039 / 0.040)
    turning = predict(profile(turn_s=0.002), bounds, [1000], 2, cores)
    assert turning.samples_per_s == pytest.approx(
        16 / 0.041
    ) and turning.efficiency == pytest.approx(0.039 / 0.041)
    together = predict(profile(copy_s_per_byte=1e-6), bounds, [1000], 1, cores)
    assert together.samples_per_s == pytest.approx(16 / 0.060)
    coded = profile(encode_s_per_byte=2e-6, decode_s_per_byte=1e-6)
    coding = predict(coded, bounds, [1000], 2, cores, [(1000, 0), (0, 1000)])
    assert coding.samples_per_s == pytest.approx(16 / 0.041)
    assert coding.stage_s == pytest.approx((0.041, 0.022)) and coding.efficiency == 1
    crowded = predict(profile(), bounds, [1000], 2, 1)
    assert crowded.samples_per_s == pytest.approx(16 / 0.060) and crowded.efficiency is None


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Profile]:
    """A chain of 4 blocks, the third one slow, measured by two processes for 2 and 3 stages."""
    args = {"time_ms": [1, 1, 30, 1], "message_bytes": 4096}
    pipeline = {"stages": 2, "processes": 2}
    config = chained(
        tmp_path_factory.mktemp("measured"),
        {},
        model={"name": "chain", "args": args},
        pipeline=pipeline,
    )
    return config, measure_profile(config, [2, 3], 2)


def test_measured_pieces_find_the_slow_block(measured: tuple[Resolved, Profile]) -> None:
    config, found = measured
    assert (
        found.workers == 2
        and found.batch_size == 16
        and found.blocks == ("wait0", "wait1", "wait2", "wait3")
    )
    assert found.mismatch(config) is None
    assert found.block_s[2] > 0.03 and found.lead_s[1][2] > 0.03
    assert found.stage_s(0, 1, 0, 2) < found.stage_s(2, 3, 1, 2)
    assert time_cuts(found, (1, 1, 1), 1) in {(0, 1), (1, 2)}
    assert set(predict_cuts(config, found)) == {
        "this",
        "equal",
        "time",
        "time, 3 stages on 3 processes",
    }


def test_plan_predicts_from_a_profile_and_says_what_it_is_of(
    measured: tuple[Resolved, Profile], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, found = measured
    (tmp_path / "p.json").write_text(found.to_json())
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    words = [str(tmp_path / "c.yaml"), "--profile", str(tmp_path / "p.json")]
    assert main(["plan", *words, "--json"]) == 0
    predicted = json.loads(capsys.readouterr().out)["predicted"]
    assert predicted["samples_per_s"] > 0 and 0 < predicted["efficiency"] <= 1
    assert len(predicted["stage_s"]) == 2
    assert predicted["others"].keys() == {"equal", "time", "time, 3 stages on 3 processes"}
    assert main(["plan", *words]) == 0
    assert "predicted step of each stage" in capsys.readouterr().out
    assert main(["plan", *words, "data.batch_size=8"]) == 2
    assert "batch_size is 16 there, the configuration has 8" in capsys.readouterr().err


def test_a_measurement_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = chained(
        tmp_path, {"blocks": 2, "message_bytes": 1000}, pipeline={"stages": 2, "processes": 1}
    )
    with pytest.raises(UserError, match="^model: message_bytes 1000 is no multiple"):
        measure_profile(broken, [2], 1)
    monkeypatch.setattr("localpipe.plan.measure.WORKER", "localpipe.no_such_module")
    with pytest.raises(RunError, match="measuring process failed: .*no_such_module"):
        measure_profile(chained(tmp_path, {}, pipeline={"stages": 2, "processes": 1}), [2], 1)


def test_a_measured_cut_is_written_down_and_never_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = profile(blocks=("wait0", "wait1", "wait2", "wait3"))
    monkeypatch.setattr("localpipe.plan.balanced_cuts.measure_profile", lambda *_: found)
    given = update(chained(tmp_path, {}, pipeline={"stages": 2}), {"pipeline.cuts": "time"})
    first = prepare(given)
    assert first.config.pipeline.cuts == (0,)
    assert read_recorded(tmp_path / "config.yaml").pipeline.cuts == (0,)
    first.lock.close()
    monkeypatch.setattr(
        "localpipe.plan.balanced_cuts.measure_profile", lambda *_: pytest.fail("measured again")
    )
    assert prepare(given).config.pipeline.cuts == (0,)

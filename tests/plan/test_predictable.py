"""What plan counts and predicts of every key that shapes a step, and what it refuses to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from localpipe import config as configs
from localpipe.config.load import to_dict
from localpipe.errors import UserError
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from localpipe.pipeline.stages.probe import Probe
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.plan import measure, predict, whole_plan
from localpipe.plan.costs import count_costs
from localpipe.plan.measure_worker import PieceSteps
from localpipe.plan.tables import add_memory, plan_json
from localpipe.runs.prepare import prepare
from tests.harness import settings


def memory(replicas: Any, folder: Path) -> list[dict[str, int]]:
    config = settings(folder, pipeline={"stages": 2, "replicas": replicas, "processes": "auto"})
    blueprint, plans = build_plans(config)
    costs = count_costs(blueprint, plans, config)
    stages = add_memory(plan_json(plans, costs), plans, costs, config)["stages"]
    return [stage["memory"] for stage in stages]


def test_a_replica_holds_its_part_of_the_activations(tmp_path: Path) -> None:
    one, two, uneven = memory(1, tmp_path), memory(2, tmp_path), memory([1, 2], tmp_path)
    for whole, half in zip(one, two, strict=True):
        assert whole["activations_bytes"] == 2 * half["activations_bytes"]
        assert whole["buffers_bytes"] == 2 * half["buffers_bytes"]
        assert whole["weights_bytes"] == half["weights_bytes"]
    assert uneven == [one[0], two[1]]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"run.capture": "compile"}, "run.capture is compile; set run.capture=none"),
        ({"pipeline.replicas": 2}, "one replica of every stage"),
    ],
)
def test_what_no_profile_can_predict_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(predict, "measure_here", lambda *_: pytest.fail("blocks were measured"))
    values = to_dict(settings(tmp_path, pipeline={"stages": 2}))
    values["pipeline"]["processes"] = "auto"
    for key, value in keys.items():
        section, name = key.split(".")
        values[section][name] = value
    given = configs.parse(values, "test")
    for arguments in ({"measure": True}, {"profile_file": tmp_path / "profile.json"}):
        with pytest.raises(UserError, match=message):
            whole_plan.make_plan(given, **arguments)
    assert not predict.can_predict(given)


def test_the_step_of_a_probe_is_part_of_a_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[int] = []
    monkeypatch.setattr(Probe, "learn", lambda self, h, target: learned.append(len(h)))
    for probe, expected in (("none", []), ("linear", [4] * 4)):
        optim = {"accumulate": 4}
        config = settings(tmp_path, pipeline={"stages": 2}, run={"probe": probe}, optim=optim)
        step = PieceSteps(config, "cpu").loss(0, 2, 0)
        learned.clear()
        assert step() > 0 and learned == expected


@pytest.mark.parametrize(
    "schedule", ["cosine_epoch", "cosine_epoch_from_0", "cosine_step", "poly", "step", "constant"]
)
def test_what_is_timed_has_a_rate_of_0_in_every_step(schedule: str, tmp_path: Path) -> None:
    optim = {"schedule": schedule, "warmup_epochs": 2, "lr": 1e6, "epochs": 4}
    in_steps = {"schedule": schedule, "lr": 1e6, "min_lr": 1.0, "warmup_steps": 2, "max_steps": 4}
    for keys in (optim, {**in_steps, "epochs": None}):
        held = measure.hold_weights(settings(tmp_path, optim=keys))
        rates = LearningRateSchedule(held.optim, steps_per_epoch=3)
        assert {rates.rate(step) for step in range(1, 30)} == {0.0}


def test_a_measurement_holds_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Store:
        def set(self, key: str, value: str) -> None:
            asked.append(value)

        def get(self, key: str) -> bytes:
            return b"no profile"

    monkeypatch.setattr(measure, "open_file_store", lambda folder: Store())
    config = settings(tmp_path, optim={"lr": 1e6}, pipeline={"stages": 2})
    with pytest.raises(ValueError):  # nobody has measured
        measure.measure_profile(config, [2], workers=0)
    assert '"lr": 0.0' in asked[0]


def test_blocks_are_not_measured_for_a_batch_that_no_images_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "measure_here", lambda *_: pytest.fail("blocks were measured"))
    given = settings(tmp_path / "run", data={"drop_last": True, "samples": 10})
    values = to_dict(given)
    values["pipeline"]["cuts"] = "time"
    with pytest.raises(UserError, match="make no batch"):
        prepare(configs.parse(values, "test"))

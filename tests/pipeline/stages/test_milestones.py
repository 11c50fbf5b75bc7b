"""Schedules with milestones, by tables of rates, and the rule of runs from before there were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from localpipe import config as configs
from localpipe.config.load import to_yaml
from localpipe.config.resolve import auto_milestones
from localpipe.config.resume import join_recorded, read_recorded
from localpipe.errors import UserError
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from tests import harness

STEPS = 7  # of an epoch

# {epoch: rate}, counted from 1, by the released code of each paper.
DGL = {1: 0.1, 15: 0.1, 16: 0.02, 30: 0.02, 31: 0.004, 45: 0.004, 46: 0.0008, 50: 0.0008}
PREDSIM = {1: 5e-4, 200: 5e-4, 201: 1.25e-4, 301: 3.125e-5, 351: 7.8125e-6, 376: 1.953125e-6}
INFOPRO_STEP = {1: 0.8, 79: 0.8, 80: 0.08, 119: 0.08, 120: 0.008, 160: 0.008}


def decide(**optim: Any) -> LearningRateSchedule:
    """Return the schedule of the keys of `optim`, with every `auto` decided."""
    keys = {"warmup_epochs": 0, **optim}
    return LearningRateSchedule(harness.resolved({"optim": keys}).optim, STEPS)


@pytest.mark.parametrize(
    ("keys", "published"),
    [
        ({"lr": 0.1, "milestones": [16, 31, 46], "factor": 0.2, "epochs": 50}, DGL),
        (
            {
                "lr": 5e-4, "milestones": [201, 301, 351, 376], "factor": 0.25, "epochs": 400,
                "name": "adamw", "weight_decay": 0.0,
            },
            PREDSIM,
        ),
    ],
    ids=["dgl", "predsim"],
)  # fmt: skip
def test_multistep_has_the_published_rates(
    keys: dict[str, Any], published: dict[int, float]
) -> None:
    found = decide(schedule="multistep", **keys)
    for epoch, rate in published.items():
        for step in ((epoch - 1) * STEPS + 1, epoch * STEPS):
            assert found.rate(step) == pytest.approx(rate), epoch


def test_step_drops_where_the_official_codes_do() -> None:
    found = decide(schedule="step", lr=0.8, epochs=160)
    for epoch, rate in INFOPRO_STEP.items():
        assert found.rate((epoch - 1) * STEPS + 1) == pytest.approx(rate), epoch


@pytest.mark.parametrize(
    ("epochs", "milestones"), [(1, [2, 2]), (2, [2, 2]), (4, [2, 3]), (160, [80, 120])]
)
def test_no_rate_of_step_falls_before_the_second_epoch(epochs: int, milestones: list[int]) -> None:
    assert auto_milestones(epochs) == milestones
    assert decide(schedule="step", lr=0.8, epochs=epochs).rate(1) == 0.8


def test_without_epochs_milestones_count_steps() -> None:
    keys = {"lr": 0.8, "epochs": None, "max_steps": 6, "factor": 0.5}
    found = decide(schedule="multistep", milestones=[3, 5], **keys)
    assert [found.rate(step) for step in range(1, 7)] == [0.8, 0.8, 0.4, 0.4, 0.2, 0.2]
    assert decide(schedule="step", **keys).optim.milestones == (3, 4)


def test_a_warmup_precedes_the_milestones() -> None:
    found = decide(schedule="multistep", milestones=[3], lr=1.0, warmup_epochs=1, epochs=4)
    assert [found.rate(step) for step in (1, 7, 8, 15)] == pytest.approx([1 / 7, 1, 1, 0.1])


def test_a_run_from_before_milestones_resumes_under_its_own_rule(tmp_path: Path) -> None:
    given = {"optim": {"schedule": "step", "lr": 0.8, "warmup_epochs": 0, "epochs": 160}}
    written = yaml.safe_load(to_yaml(harness.resolved(given)))
    assert written["optim"].pop("milestones") == [80, 120]
    written["optim"].pop("factor")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    old = read_recorded(tmp_path / "config.yaml")

    joined = join_recorded(configs.parse(given, "test"), old, "run")
    found = LearningRateSchedule(joined.optim, STEPS)
    rates = {epoch: found.rate(epoch * STEPS) for epoch in (80, 81, 120, 121)}
    assert rates == pytest.approx({80: 0.8, 81: 0.08, 120: 0.08, 121: 0.008})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "^config: optim.schedule multistep needs optim.milestones, .*=16,31,46"),
        ({"milestones": []}, "^config: optim.schedule multistep needs optim.milestones"),
        ({"milestones": [5, 3]}, r"^config: optim.milestones must not fall; got \[5, 3\]"),
        ({"milestones": [3], "factor": 0}, "^config: optim.factor must be a number above 0"),
    ],
)
def test_milestones_that_make_no_schedule_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        configs.parse({"optim": {"schedule": "multistep", **keys}}, "test")

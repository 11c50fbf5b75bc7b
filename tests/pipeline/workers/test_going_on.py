"""A process that goes on after any message of another one ends like one that was not killed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from localpipe import data
from localpipe.config.resolved import Resolved
from localpipe.pipeline.channels.message import Flag
from localpipe.pipeline.launch.process import prepare_process
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.workers.assemble import build_source, join_stages
from localpipe.pipeline.workers.loop import RunnerContext, StageRunner
from localpipe.pipeline.workers.phase import PhaseTimer
from localpipe.pipeline.workers.steps import build_step_schedule
from tests.harness import settings


class Records:
    """Keeps what the stages write of their losses and evaluations."""

    def __init__(self) -> None:
        self.lines: list[tuple[Any, ...]] = []

    def write(self, kind: str, **values: Any) -> None:
        kept = ("step", "stage", "split", "loss", "accuracy", "probe_accuracy", "lr")
        self.lines.append((kind, *(values.get(key) for key in kept)))


class Saves:
    """Keeps the steps of the checkpoints of a run."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def write_stage(self, step: int, stage: int, state: Any) -> None:
        self.steps.append(step)

    def commit(self, step: int, facts: Any) -> None:
        self.steps.append(-step)


def start(
    config: Resolved, handled: int = 0, past_flags: Any = lambda number: None
) -> list[StageRunner]:
    """Return all stages of a run in this process, whose source goes on after some messages."""
    prepare_process(config)
    blueprint, plans = build_plans(config)
    stages = [Stage(plan, blueprint, config) for plan in plans]
    dataset = data.load(config.data, config.run.seed)
    schedule = build_step_schedule(config, dataset)
    rates = LearningRateSchedule(config.optim, schedule.steps_per_epoch)
    context = RunnerContext(rates, PhaseTimer(), Records(), Saves(), log_every=2)
    source = build_source(
        config, stages[0], dataset, schedule, handled=handled, past_flags=past_flags
    )
    return join_stages(stages, source, context, with_probes=config.run.probe == "linear")


def run(runners: list[StageRunner], messages: int | None = None) -> int:
    """Run the stages for some messages, or to the end; return how many messages there were."""
    count, more = 0, True
    while more and count != messages:
        for runner in runners:
            more = runner.turn()
        count += 1
    return count


def leftovers(runners: list[StageRunner]) -> tuple[list[dict[str, Any]], list[float | None]]:
    weights = [runner.stage.weights() for runner in runners]
    return weights, [runner.meter.mean_loss() for runner in runners]


CASES: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "probe and average": {"run": {"probe": "linear"}, "optim": {"ema": 0.9}},
    "several messages a step": {"optim": {"accumulate": 2, "clip": 1.0}},
    "adamw and a validation": {
        "optim": {"name": "adamw", "lr": 0.01},
        "data": {"validation": 20},
    },
    "parameters that come back": {
        "method": {"feedback": {"mode": "block", "lag": 2, "every": 1}},
    },
    "gradients that are reconciled": {"method": {"reconcile": "cosine", "context": "E"}},
}


@pytest.mark.parametrize("case", CASES)
def test_a_new_process_goes_on_from_any_snapshot(tmp_path: Path, case: str) -> None:
    keys = {**CASES[case], "pipeline": {"stages": 2, "processes": 1}}
    keys["optim"] = {"epochs": 1, **keys.get("optim", {})}
    config = settings(tmp_path, **keys)
    undisturbed = start(config)
    total = run(undisturbed)
    expected_weights, expected_losses = leftovers(undisturbed)
    expected = undisturbed[0].context.recorder.lines  # type: ignore[union-attr]

    # The last but one is in the middle of an evaluation.
    boundaries = running = 0
    for handled in (0, 4, total - 3, total - 2):
        first = start(config)
        run(first, handled)
        if not first[-1].ends_step:
            continue
        boundaries += 1
        content = io.BytesIO()
        step = first[0].context.timer.step
        torch.save([runner.state(step) for runner in first], content)
        content.seek(0)

        second = start(config, handled)
        for runner, state in zip(second, torch.load(content, weights_only=True), strict=True):
            runner.load_state(state)
            again = runner.state(step)
            for key in ("evaluation", "probe_evaluation"):
                assert again[key]["samples"] == state[key]["samples"]
            running += state["evaluation"]["samples"] > 0
        assert run(second) == total - handled
        weights, losses = leftovers(second)
        assert losses == expected_losses
        for stage, other in zip(weights, expected_weights, strict=True):
            assert stage.keys() == other.keys()
            assert all(torch.equal(stage[name], other[name]) for name in stage)
        written = first[0].context.recorder.lines  # type: ignore[union-attr]
        written += second[0].context.recorder.lines  # type: ignore[union-attr]
        assert written == expected
    assert boundaries > 2 and running


def test_a_first_stage_takes_the_flags_that_messages_have_had(tmp_path: Path) -> None:
    """A save that was decided by a clock is not decided again."""
    config = settings(tmp_path, pipeline={"stages": 2, "processes": 1})
    flags = {2: Flag.SAVE_AFTER, 3: Flag.NONE}
    runners = start(config, past_flags=flags.get)
    run(runners)
    steps = runners[0].context.checkpoints.steps  # type: ignore[union-attr]
    last = config.optim.epochs * 6  # type: ignore[operator]
    assert sorted(set(steps)) == [-last, -3, 3, last]

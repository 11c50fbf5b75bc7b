"""Evaluation: the task's metric for every stage's exit and for the whole network, in one process.

The weights are those of a run's newest checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from localpipe import data
from localpipe.config.keys import Config
from localpipe.config.load import update
from localpipe.config.resolved import Resolved
from localpipe.data.verify.choice import TEST
from localpipe.pipeline.launch.process import prepare_process
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.workers.assemble import join_stages
from localpipe.pipeline.workers.loop import RunnerContext, Worker
from localpipe.pipeline.workers.phase import PhaseTimer
from localpipe.pipeline.workers.source import BatchSource
from localpipe.pipeline.workers.steps import build_step_schedule
from localpipe.plan.resolve_here import resolve_here
from localpipe.runs.checkpoint import Checkpoint
from localpipe.runs.directory import RunDirectory
from localpipe.runs.prepare import check_images


def load_stages(config: Resolved, checkpoint: Checkpoint) -> list[Stage]:
    """Return every stage of a run, in order, with the weights of a checkpoint.

    The stages are on the CPU, whatever run.device says. Raises UserError if a file of the
    checkpoint is missing or damaged, and RunError if names or shapes of weights are others.
    """
    blueprint, plans = build_plans(config)
    stages = [Stage(plan, blueprint, config) for plan in plans]
    for stage in stages:
        state = checkpoint.load_stage(stage.plan.stage)
        stage.load_weights(state["weights"])
    return stages


class _RecordList:
    """A recorder that keeps the records in memory."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def write(self, kind: str, **values: Any) -> None:
        self.records.append({"kind": kind, **values})


def evaluate(run_dir: Path, given: Config) -> list[dict[str, Any]]:
    """Return one record a stage, in order: accuracy and loss of its exit on the test images.

    The keys are `kind`, `step`, `epoch`, `stage`, `split`, `loss`, `accuracy` (0 to 1) and
    `samples`. `loss` and `accuracy` are None for a stage without an exit, a `loss` that is not
    finite too. The images go through the pipeline's own loop. given: the run's configuration, with
    overrides. It works on the CPU, and sets threads and determinism of this process. Raises
    UserError without a complete checkpoint, or for other data than the network takes. Raises
    RunError if the weights do not fit.
    """
    checkpoint = RunDirectory(run_dir).require_checkpoint()
    # No training image is looked at, and another data set may have fewer than the run held out.
    given = update(given, {"data.train_subset": None, "data.validation": 0})
    dataset = data.load(given.data, given.run.seed, TEST)
    config = resolve_here(given, dataset)
    prepare_process(config)
    check_images(config, dataset)

    # All stages in this process, joined in memory, read the headers of one evaluation.
    stages = load_stages(config, checkpoint)
    steps = build_step_schedule(config, dataset)
    headers = steps.evaluation_headers(checkpoint.step)
    source = BatchSource(dataset, headers, config.run.seed, float("inf"))
    rates = LearningRateSchedule(config.optim, max(steps.steps_per_epoch, 1))
    recorder, timer = _RecordList(), PhaseTimer()
    context = RunnerContext(rates, timer, recorder, None)
    runners = join_stages(stages, source, context, saved_step=checkpoint.step)
    Worker(runners, timer).run()
    return [record for record in recorder.records if record.get("split") == "test"]

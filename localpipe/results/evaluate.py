"""The task's metric for every stage's exit and for the whole network, from a run's newest checkpoint, in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from localpipe import data
from localpipe.config.keys import Config
from localpipe.config.load import update
from localpipe.config.resolved import Resolved
from localpipe.pipeline.channels.channel import MemoryChannel
from localpipe.pipeline.launch.process import prepare_process
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.workers.loop import RunnerContext, StageRunner, Worker
from localpipe.pipeline.workers.phase import PhaseTimer
from localpipe.pipeline.workers.source import BatchSource
from localpipe.pipeline.workers.steps import step_schedule
from localpipe.plan.resolve_here import resolve_here
from localpipe.runs.checkpoint import Checkpoint
from localpipe.runs.directory import require_checkpoint
from localpipe.runs.prepare import check_images


def load_stages(config: Resolved, checkpoint: Checkpoint) -> list[Stage]:
    """Return every stage of a run with the weights of a checkpoint."""
    blueprint, plans = build_plans(config)
    stages = [Stage(plan, blueprint, config) for plan in plans]
    for stage in stages:
        state: dict[str, Any] = checkpoint.stage(stage.plan.stage)
        stage.load_weights(state["weights"])
    return stages


class _KeptRecords:
    """A recorder that keeps what it is given."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def write(self, kind: str, **values: Any) -> None:
        self.records.append({"kind": kind, **values})


def evaluate(run_dir: Path, given: Config) -> list[dict[str, Any]]:
    """Return one record a stage: accuracy and loss of its exit on the held-out images, through the pipeline's own loop."""
    checkpoint = require_checkpoint(run_dir)
    # Another data set may have fewer training images than the run took or held out, and none of them is looked at.
    given = update(given, {"data.train_subset": None, "data.validation": 0})
    dataset = data.load(given.data, given.run.seed)
    config = resolve_here(given, dataset)
    prepare_process(config)
    check_images(config, dataset)
    stages = load_stages(config, checkpoint)
    todo = step_schedule(config, dataset)
    verdicts, pulse = _KeptRecords(), PhaseTimer()
    tools = RunnerContext(
        LearningRateSchedule(config.optim, max(todo.steps_per_epoch, 1)), pulse, verdicts, None
    )
    inbox: Any = BatchSource(
        dataset, todo.evaluation(checkpoint.step), config.run.seed, float("inf")
    )
    seats = []
    for stage in stages:
        sends = stage.plan.sends
        outbox = None if sends is None else MemoryChannel(sends, 1)
        seats.append(StageRunner(stage, inbox, outbox, tools, checkpoint.step))
        inbox = outbox
    Worker(seats, pulse).run()
    return [record for record in verdicts.records if record.get("split") == "test"]

"""Prepares a run: checks everything that can be known before a worker starts, and decides where it begins."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

import localpipe
from localpipe import data
from localpipe.config.keys import MEASURED, Config
from localpipe.config.load import to_dict, to_yaml, update
from localpipe.config.resolved import Resolved, count_stages
from localpipe.config.resume import join_recorded, read_recorded
from localpipe.data.dataset import Dataset
from localpipe.errors import UserError
from localpipe.files import write_whole
from localpipe.pipeline.launch.job import Job
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.workers.steps import StepSchedule, step_schedule
from localpipe.plan.notes import plan_notes
from localpipe.plan.resolve_here import resolve_here
from localpipe.runs.checkpoint import Checkpoints, newest_checkpoint
from localpipe.runs.directory import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, finished_summary
from localpipe.runs.lock import acquire_lock
from localpipe.runs.records import begin_records
from localpipe.runs.trace import TRACE_FILE
from localpipe.runs.trackers import check_wandb

# What a run leaves; what tells that it is one goes last.
_LEFT = (SUMMARY_FILE, TRACE_FILE, "checkpoints", "tensorboard", METRICS_FILE, CONFIG_FILE)


@dataclass(frozen=True)
class Prepared:
    """A job that may start, or a finished run's summary; `lock` must stay alive as long as the run."""

    job: Job
    config: Resolved
    course: StepSchedule
    lock: IO[str]
    summary: Mapping[str, Any] | None
    notes: tuple[str, ...]


def prepare(given: Config, world: int | None = None) -> Prepared:
    """Check everything that can be known before a worker starts, take the run directory, and decide where to begin."""
    check_wandb(given.run.wandb)
    said, given = given, _with_recorded_cuts(given)
    dataset = data.load(given.data, given.run.seed)
    config = resolve_here(given, dataset, world)
    stages = check_plan(config, dataset)
    notes = [] if config.run.init_from is None else [_fit(stages, config.run.init_from)]
    run_dir = Path(given.run.dir)
    held = acquire_lock(run_dir)
    _sweep(run_dir)
    config = _recorded(config, given, run_dir, dataset, world)
    checkpoint = newest_checkpoint(run_dir)
    start = checkpoint.step if checkpoint else 0
    if (
        checkpoint is not None
        and checkpoint.manifest.get("data_sha256", dataset.sha256) != dataset.sha256
    ):
        raise UserError(
            f"data: {config.data.name} holds other labels or images than the run in {run_dir} was started with; give it the "
            "same data, or choose another run.dir"
        )
    todo = step_schedule(config, dataset)
    if start > todo.steps:
        raise UserError(
            f"run: {run_dir} has already made {start} steps, more than the {todo.steps} asked for; "
            "raise optim.max_steps, or choose another run.dir"
        )
    summary = finished_summary(run_dir, todo.steps)
    notes += plan_notes(config)
    if todo.dropped:
        notes.append(
            f"note: the last {todo.dropped} of {todo.train_size} images are left out of every epoch; "
            "batch normalisation needs two in every replica"
        )
    schedule = LearningRateSchedule(config.optim, todo.steps_per_epoch)
    if start < todo.steps and not any(
        schedule.rate(step) for step in range(start + 1, todo.steps + 1)
    ):
        notes.append(
            f"note: the learning rate of {config.optim.schedule} is 0 in every step that is left; nothing moves"
        )
    if summary is None:
        (run_dir / SUMMARY_FILE).unlink(missing_ok=True)
        write_whole(run_dir / CONFIG_FILE, to_yaml(config))
        versions = {"localpipe": localpipe.__version__, "torch": torch.__version__}
        elapsed = begin_records(
            run_dir / METRICS_FILE,
            {**versions, "steps": todo.steps},
            start,
            lambda step: todo.evaluates_after(step) and step != start,
        )
        who = f"{config.model.name} on {config.data.name}, {len(stages)} stages, {config.pipeline.processes} processes"
        first = (
            f"resuming {run_dir} after step {start} of {todo.steps}"
            if start
            else f"starting {run_dir}"
        )
        notes.append(f"{first}: {who}")
    else:
        elapsed = 0.0
    job = Job(to_dict(config), to_dict(said), start, elapsed, time.time(), dataset.sha256)
    return Prepared(job, config, todo, held, summary, tuple(notes))


def _with_recorded_cuts(given: Config) -> Config:
    """Return what the user gave, with a measured cut as the run directory recorded it: a resume never measures again."""
    recorded_file = Path(given.run.dir) / CONFIG_FILE
    if (
        given.pipeline.cuts not in MEASURED
        or given.run.resume == "never"
        or not recorded_file.exists()
    ):
        return given
    recorded = read_recorded(recorded_file)
    if recorded.pipeline.stages != count_stages(given) or not isinstance(
        recorded.pipeline.cuts, tuple
    ):
        return given
    return update(given, {"pipeline.cuts": list(recorded.pipeline.cuts)})


def check_images(config: Resolved, dataset: Dataset) -> None:
    """Raise UserError when a data set's images are not what a resolved configuration was made for."""
    if dataset.image != config.image:
        raise UserError(
            f"data: {dataset.name} has images of shape {dataset.image}, the run was made for {config.image}"
        )


def read_old_weights(run_dir: str) -> dict[str, torch.Tensor]:
    """Return the weights of another run's newest checkpoint, by their names in the whole network."""
    checkpoint = newest_checkpoint(Path(run_dir))
    if checkpoint is None:
        raise UserError(
            f"run: run.init_from {run_dir} holds no complete checkpoint; give the directory of a run"
        )
    return checkpoint.weights()


def _fit(stages: Sequence[Stage], init_from: str) -> str:
    """Say what of an old run's weights fits, and list the rest."""
    weights = read_old_weights(init_from)
    taken = {name for stage in stages for name in stage.take_weights(weights)}
    own = {name for stage in stages for name in stage.weights()}
    lines = [f"run.init_from {init_from}: {len(taken)} of {len(own)} tensors taken"]
    for what, names in (("left as initialised", own - taken), ("not used", weights.keys() - taken)):
        if names:
            lines.append(f"  {what}: {', '.join(sorted(names))}")
    return "\n".join(lines)


def check_plan(config: Resolved, dataset: Dataset) -> list[Stage]:
    """Build every stage on the meta device: what cannot be built is known before a worker starts."""
    blueprint, plans = build_plans(config)
    stages = [Stage(stage_plan, blueprint, config, "meta") for stage_plan in plans]
    if step_schedule(config, dataset).steps_per_epoch < 1:
        raise UserError(
            f"data: {len(dataset.train.labels)} training images make no batch of {config.data.batch_size}; "
            "lower data.batch_size, or set data.drop_last=false"
        )
    return stages


def _sweep(run_dir: Path) -> None:
    """Remove what an interrupted run left half-written, also because it may be what fills a full disk."""
    Checkpoints(run_dir, 0).sweep()
    for name in (CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, TRACE_FILE):
        for left_over in run_dir.glob(f".{name}.*"):
            left_over.unlink(missing_ok=True)


def _recorded(
    config: Resolved, given: Config, run_dir: Path, dataset: Dataset, world: int | None
) -> Resolved:
    """Join a configuration with the one that the run directory holds, if any; refuse or clear what is in the way."""
    there = sorted(
        path.name
        for path in run_dir.iterdir()
        if path.name != "lock" and not path.name.startswith(".")
    )
    if not there:
        return config
    # Whatever it is, it is not a run's to throw away; a lone config.yaml may be the user's.
    if CONFIG_FILE not in there or (given.run.resume == "never" and METRICS_FILE not in there):
        raise UserError(f"run: {run_dir} holds {there[0]!r} and no run; choose another run.dir")
    if given.run.resume == "never":
        if not given.run.overwrite:
            raise UserError(
                f"run: {run_dir} is not empty and run.resume is never; set run.overwrite=true to throw its run "
                "away, or choose another run.dir"
            )
        for name in _LEFT:
            path = run_dir / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(
                missing_ok=True
            )
        return config
    recorded = read_recorded(run_dir / CONFIG_FILE, {given.method.objective["name"]})
    joined = join_recorded(given, recorded, str(run_dir))
    return resolve_here(joined, dataset, world)

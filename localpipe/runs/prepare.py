"""Prepares a run: checks all that can be checked before a worker starts, and decides its start."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

import localpipe
from localpipe import data
from localpipe.config.keys import MEASURED, Config
from localpipe.config.load import to_dict, to_yaml, update
from localpipe.config.resolved import Resolved, count_stages
from localpipe.config.resume import join_recorded
from localpipe.data.dataset import Dataset
from localpipe.errors import UserError
from localpipe.files import write_output
from localpipe.networks.blueprint import Blueprint
from localpipe.pipeline.launch.job import Job
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import StagePlan, build_plans
from localpipe.pipeline.workers.steps import StepSchedule, build_step_schedule
from localpipe.pipeline.workers.trial import try_stages
from localpipe.plan.notes import plan_notes
from localpipe.plan.resolve_here import resolve_here
from localpipe.runs.checkpoint import FOLDER, Checkpoint, Checkpoints
from localpipe.runs.directory import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, RunDirectory
from localpipe.runs.recorded_run import Record
from localpipe.runs.records import begin_records
from localpipe.runs.trace import TRACE_FILE
from localpipe.runs.trackers import check_wandb

# What a run leaves. The files that show that it is a run come last, so that they go last.
_RUN_CONTENT = (SUMMARY_FILE, TRACE_FILE, FOLDER, "tensorboard", METRICS_FILE, CONFIG_FILE)
_DIRECTORY_ADVICE = "choose another run.dir"


@dataclass(frozen=True)
class Prepared:
    """A job that may start, or a finished run's summary.

    `lock` must stay open as long as the run. `summary` is None unless the run has made all its
    steps, and then nothing is to be trained. notes: lines for the user, in the order to print.
    """

    job: Job
    config: Resolved
    blueprint: Blueprint
    plans: tuple[StagePlan, ...]
    schedule: StepSchedule
    lock: IO[str]
    summary: Record | None
    notes: tuple[str, ...]


def prepare(given: Config, world: int | None = None) -> Prepared:
    """Check all that can be checked before a worker starts, take the run directory, find the start.

    given: the user's configuration. world: torchrun's number of workers, None without torchrun. It
    writes config.yaml and the start of metrics.jsonl, unless the run is finished. It may measure
    blocks for `cuts: time`. Raises UserError for a mistake in the configuration, in the data, or in
    what the run directory holds. Raises UserError after 30 s if another run has the directory, and
    RunError if a file cannot be written.
    """
    # Nothing is written before the configuration is known to be possible.
    check_wandb(given.run.wandb)
    directory = RunDirectory(given.run.dir)
    requested = _take_recorded_images(_take_recorded_cuts(given, directory), directory)
    dataset = data.load(requested.data, given.run.seed, check_files=True)
    config = resolve_here(requested, dataset, world)
    blueprint, plans = build_plans(config)
    check_steps(config, dataset)
    stages = try_stages(config, blueprint, plans, build_step_schedule(config, dataset))
    notes = [*dataset.notes, *_describe_init_weights(config, stages)]

    # From here on no other run changes the directory. A run that it holds decides.
    lock = directory.lock()
    _remove_partial_files(directory)
    recorded = _read_recorded_config(requested, directory)
    if recorded is not None:
        joined = join_recorded(requested, recorded, str(directory.path))
        config = resolve_here(joined, dataset, world)
        blueprint, plans = build_plans(config)
    checkpoint = directory.newest_checkpoint()
    schedule = build_step_schedule(config, dataset)
    start_step = _find_start(config, directory, dataset, schedule, checkpoint)

    # Begin, unless the run has made all its steps.
    notes += plan_notes(config)
    notes += _describe_steps(config, schedule, start_step)
    summary = directory.finished_summary(schedule.steps)
    elapsed_s = 0.0
    if summary is None:
        elapsed_s = _begin(config, directory, schedule, start_step)
        notes.append(_describe_start(config, schedule, start_step))
    job = Job(to_dict(config), to_dict(given), start_step, elapsed_s, time.time(), dataset.sha256)
    return Prepared(job, config, blueprint, plans, schedule, lock, summary, tuple(notes))


# -- the configuration --------------------------------------------------------------------------


def check_plan(config: Resolved, dataset: Dataset) -> None:
    """Raise UserError if a resolved configuration cannot be built or run, or has no steps.

    Stages are built on the meta device, without weights, and try a step there.
    """
    check_steps(config, dataset)
    try_stages(config, *build_plans(config), build_step_schedule(config, dataset))


def check_steps(config: Resolved, dataset: Dataset) -> None:
    """Raise UserError if an epoch has no step, because the training images make no batch."""
    if build_step_schedule(config, dataset).steps_per_epoch < 1:
        raise UserError(
            f"data: {len(dataset.train.labels)} training images make no batch of "
            f"{config.data.batch_size}; lower data.batch_size, or set data.drop_last=false"
        )


def load_init_weights(init_from: str) -> dict[str, torch.Tensor]:
    """Return the weights of run.init_from's newest checkpoint, {name in the whole network: tensor}.

    init_from: the directory of a run. The tensors are on the CPU. Raises UserError if there is no
    complete checkpoint, or if it is damaged.
    """
    checkpoint = RunDirectory(init_from).newest_checkpoint()
    if checkpoint is None:
        raise UserError(
            f"run: run.init_from {init_from} holds no complete checkpoint; "
            "give the directory of a run"
        )
    return checkpoint.load_weights()


def _describe_init_weights(config: Resolved, stages: Sequence[Stage]) -> list[str]:
    """Return a note on which weights of run.init_from fit, and the names of the others."""
    init_from = config.run.init_from
    if init_from is None:
        return []
    init_weights = load_init_weights(init_from)
    taken: set[str] = set()
    names: set[str] = set()
    for stage in stages:
        taken |= stage.take_weights(init_weights)
        names |= stage.weights().keys()

    lines = [f"run.init_from {init_from}: {len(taken)} of {len(names)} tensors taken"]
    if names - taken:
        lines.append(f"  left as initialised: {', '.join(sorted(names - taken))}")
    unused = init_weights.keys() - taken
    if unused:
        lines.append(f"  not used: {', '.join(sorted(unused))}")
    return ["\n".join(lines)]


# -- what the run directory holds ---------------------------------------------------------------


def _take_recorded_cuts(given: Config, directory: RunDirectory) -> Config:
    """Return the user's configuration, its measured cuts replaced by the recorded list.

    So a resume never measures again.
    """
    if given.pipeline.cuts not in MEASURED or given.run.resume == "never":
        return given
    if not directory.config_file.exists():
        return given
    pipeline = directory.recorded_config({given.method.objective["name"]}).pipeline
    if pipeline.stages != count_stages(given) or not isinstance(pipeline.cuts, tuple):
        return given
    return update(given, {"pipeline.cuts": list(pipeline.cuts)})


def _take_recorded_images(given: Config, directory: RunDirectory) -> Config:
    """Return the user's configuration, `auto` of an image folder replaced by what is recorded.

    So a resume sees the images as its run did, and reads none of them to measure again.
    """
    if given.data.name != "image_folder" or given.run.resume == "never":
        return given
    if not directory.config_file.exists():
        return given
    recorded = directory.recorded_config({given.method.objective["name"]}).data
    if recorded.name != given.data.name:
        return given
    values: dict[str, Any] = {}
    for key in ("image_size", "mean", "std"):
        value = getattr(recorded, key)
        if isinstance(value, tuple):
            value = list(value)
        if getattr(given.data, key) == "auto":
            values[f"data.{key}"] = value
    return update(given, values)


def _remove_partial_files(directory: RunDirectory) -> None:
    """Remove what an interrupted run wrote in part, which may be what fills a full disk."""
    Checkpoints(directory.path, 0).remove_partial()
    for name in (CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, TRACE_FILE):
        for path in directory.path.glob(f".{name}.*"):
            path.unlink(missing_ok=True)


def _read_recorded_config(given: Config, directory: RunDirectory) -> Config | None:
    """Return the configuration of the run in the directory, or None for an empty directory.

    With run.resume=never the run is removed, if run.overwrite allows it. Raises UserError if the
    directory holds anything else: it is not a run's to remove. A config.yaml alone may be a user's.
    """
    names = directory.names
    if not names:
        return None
    starts_anew = given.run.resume == "never"
    if CONFIG_FILE not in names or (starts_anew and METRICS_FILE not in names):
        raise directory.error(_DIRECTORY_ADVICE)
    if not starts_anew:
        return directory.recorded_config({given.method.objective["name"]})
    if not given.run.overwrite:
        raise UserError(
            f"run: {directory.path} is not empty and run.resume is never; "
            "set run.overwrite=true to throw its run away, or choose another run.dir"
        )
    for name in _RUN_CONTENT:
        _remove(directory.path / name)
    return None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# -- where the run begins -----------------------------------------------------------------------


def _find_start(
    config: Resolved,
    directory: RunDirectory,
    dataset: Dataset,
    schedule: StepSchedule,
    checkpoint: Checkpoint | None,
) -> int:
    """Return the step after which the run begins.

    Raises UserError if its checkpoint was made from other data, or after more steps.
    """
    if checkpoint is None:
        return 0
    if checkpoint.manifest.get("data_sha256", dataset.sha256) != dataset.sha256:
        raise UserError(
            f"data: {config.data.name} holds other labels or images than the run in "
            f"{directory.path} was started with; give it the same data, or choose another run.dir"
        )
    if checkpoint.step > schedule.steps:
        raise UserError(
            f"run: {directory.path} has already made {checkpoint.step} steps, more than the "
            f"{schedule.steps} asked for; raise optim.max_steps, or choose another run.dir"
        )
    return checkpoint.step


def _begin(
    config: Resolved, directory: RunDirectory, schedule: StepSchedule, start_step: int
) -> float:
    """Write the configuration and the start of the records; return the seconds recorded so far."""

    def keeps_evaluation(step: int) -> bool:
        return schedule.is_evaluation_due(step) and step != start_step

    directory.summary_file.unlink(missing_ok=True)
    write_output(directory.config_file, to_yaml(config))
    header = {
        "localpipe": localpipe.__version__,
        "torch": torch.__version__,
        "steps": schedule.steps,
    }
    return begin_records(directory.metrics_file, header, start_step, keeps_evaluation)


# -- notes for the user -------------------------------------------------------------------------


def _describe_steps(config: Resolved, schedule: StepSchedule, start_step: int) -> list[str]:
    """Return notes on images that are never used, and on steps that change nothing."""
    notes = []
    if schedule.dropped_samples:
        notes.append(
            f"note: the last {schedule.dropped_samples} of {schedule.train_size} images are left "
            "out of every epoch; batch normalisation needs two in every replica"
        )
    rates = LearningRateSchedule(config.optim, schedule.steps_per_epoch)
    steps_left = range(start_step + 1, schedule.steps + 1)
    if steps_left and not any(rates.rate(step) for step in steps_left):
        notes.append(
            f"note: the learning rate of {config.optim.schedule} is 0 in every step that is left; "
            "nothing moves"
        )
    return notes


def _describe_start(config: Resolved, schedule: StepSchedule, start_step: int) -> str:
    run = (
        f"{config.model.name} on {config.data.name}, {config.stages} stages, "
        f"{config.pipeline.processes} processes"
    )
    if start_step:
        return f"resuming {config.run.dir} after step {start_step} of {schedule.steps}: {run}"
    return f"starting {config.run.dir}: {run}"

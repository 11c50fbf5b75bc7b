"""Prepares a run: checks all that can be checked before a worker starts, and decides its start."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

import localpipe
from localpipe.config.keys import MEASURED, Config
from localpipe.config.load import to_dict, to_yaml, update
from localpipe.config.resolved import Resolved, count_stages
from localpipe.config.resume import OPEN_SCHEDULES, join_recorded
from localpipe.config.user_code import is_user_code
from localpipe.data.dataset import Dataset
from localpipe.data.identity import describe_classes
from localpipe.data.verify.choice import BOTH
from localpipe.errors import UserError
from localpipe.files import write_output
from localpipe.networks.blueprint import Blueprint
from localpipe.networks.weights.pretrained import load_pretrained
from localpipe.pipeline.launch.job import Job
from localpipe.pipeline.stages.learning_rate import WARMUP_START, LearningRateSchedule
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import StagePlan, build_plans
from localpipe.pipeline.workers.steps import StepSchedule, build_step_schedule
from localpipe.pipeline.workers.trial import try_stages
from localpipe.plan.notes import plan_notes, untrained_notes
from localpipe.plan.resolve_here import load_data, number_cuts, resolve_here
from localpipe.runs.checkpoint import FOLDER, Checkpoint, Checkpoints
from localpipe.runs.directory import (
    CONFIG_FILE,
    FILES_FOLDER,
    METRICS_FILE,
    SUMMARY_FILE,
    RunDirectory,
)
from localpipe.runs.recorded_data import (
    Change,
    RecordedData,
    check_data,
    describe_change,
    keep_class_names,
    keep_normalisation,
    write_listing,
)
from localpipe.runs.recorded_run import Record, record_network
from localpipe.runs.records import begin_records
from localpipe.runs.trace import TRACE_FILE
from localpipe.runs.trackers import check_wandb
from localpipe.tasks.metric import Metric

# What a run leaves. The files that show that it is a run come last, so that they go last.
_RUN_CONTENT = (
    SUMMARY_FILE,
    TRACE_FILE,
    FOLDER,
    FILES_FOLDER,
    "tensorboard",
    METRICS_FILE,
    CONFIG_FILE,
)
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
    RunError if a file cannot be written. The directory is free again after an error.
    """
    # An error releases the lock, also where somebody keeps its traceback, as a notebook does.
    with contextlib.ExitStack() as resources:
        prepared = _prepare(given, world, resources)
        resources.pop_all()
    return prepared


def _prepare(given: Config, world: int | None, resources: contextlib.ExitStack) -> Prepared:
    """Prepare a run, and let `resources` close the lock of its directory."""
    # Nothing is written before the configuration is known to be possible.
    check_wandb(given.run.wandb)
    directory = RunDirectory(given.run.dir)
    earlier = _peek(given, directory)
    requested = earlier.complete(given)
    pretrained = None
    if earlier.checkpoint is None:
        pretrained = load_pretrained(requested.model)
    requested, dataset = load_data(requested, pretrained, BOTH, earlier.left_out)
    dataset = keep_class_names(dataset, requested, earlier.config)
    requested = number_cuts(requested, dataset, world)
    if requested.pipeline.cuts in MEASURED:
        # Before the blocks are measured.
        equal = update(requested, {"pipeline.cuts": "equal"})
        check_steps(resolve_here(equal, dataset, world), dataset)
    config = resolve_here(requested, dataset, world)
    blueprint, plans = build_plans(config)
    check_steps(config, dataset)
    stages = try_stages(config, blueprint, plans, build_step_schedule(config, dataset))
    notes = [*dataset.notes]
    if earlier.checkpoint is None:
        notes += _describe_init_weights(config, stages)
    if pretrained is not None:
        notes.append(pretrained.describe(blueprint))

    # From here on no other run changes the directory. A run that it holds decides.
    lock = resources.enter_context(directory.lock())
    _remove_partial_files(directory)
    recorded = _read_recorded_config(requested, directory)
    checkpoint = directory.newest_checkpoint()
    resumed = _Resumed(config, dataset)
    if recorded is not None:
        resumed = _join(requested, recorded, directory, dataset, checkpoint)
        dataset = resumed.dataset
        config = resolve_here(resumed.config, dataset, world)
        blueprint, plans = build_plans(config)
    config = record_network(config, blueprint)
    schedule = build_step_schedule(config, dataset)
    start_step, summary = 0, resumed.summary
    if summary is None:
        start_step = _find_start(config, directory, schedule, checkpoint)
        summary = directory.finished_summary(schedule.steps)

    # Begin, unless the run has made all its steps.
    notes += plan_notes(config)
    if config.model.crossing_untrained == "allow":  # else such parameters are refused above
        notes += untrained_notes(stages)
    notes += _describe_steps(config, schedule, start_step)
    elapsed_s = 0.0
    if summary is None:
        notes += _describe_change(resumed, directory)
        metric = blueprint.task.metric
        elapsed_s = _begin(config, directory, resumed, schedule, start_step, metric)
        notes.append(_describe_start(config, schedule, start_step))
    job = _build_job(config, given, resumed, start_step, elapsed_s)
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
        images = len(dataset.train)
        raise UserError(
            f"data: {images} training images make no batch of {config.data.batch_size}; "
            f"{_advise_on_images(config, images)}"
        )


def _advise_on_images(config: Resolved, images: int) -> str:
    """Return which keys to change where the training images make no batch."""
    # Without drop_last a batch of two images in every replica is enough.
    replicas = max(config.replicas)
    choices = []
    if config.data.drop_last and images >= 2 * replicas:
        choices.append("set data.drop_last=false")
    if not config.data.drop_last and images >= 2:
        choices.append("lower pipeline.replicas")

    choices += advise_on_takers(config)
    return ", or ".join(choices) or "add images"


def advise_on_takers(config: Config) -> list[str]:
    """Return how to undo what takes training images away, as one text, or nothing."""
    # The subset is one of those that validation leaves.
    takers = []
    if config.data.train_subset is not None:
        takers.append("raise data.train_subset")
    if config.data.validation:
        takers.append("lower data.validation")
    if not takers:
        return []
    return [" and ".join(takers)]


def load_init_weights(init_from: str) -> dict[str, torch.Tensor]:
    """Return the weights of run.init_from's newest checkpoint, {name in the whole network: tensor}.

    init_from: the directory of a run. The tensors are on the CPU. Raises UserError if there is no
    complete checkpoint, or if it is damaged.
    """
    checkpoint = RunDirectory(init_from).newest_checkpoint()
    if checkpoint is None:
        raise UserError(
            f"run: run.init_from {init_from} holds no complete checkpoint; "
            "give the directory of a run that has one"
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
    lines += _describe_init_classes(config, init_from)
    if names - taken:
        lines.append(f"  left as initialised: {', '.join(sorted(names - taken))}")
    unused = init_weights.keys() - taken
    if unused:
        lines.append(f"  not used: {', '.join(sorted(unused))}")
    return ["\n".join(lines)]


def _describe_init_classes(config: Resolved, init_from: str) -> list[str]:
    """Return a line on outputs that run.init_from trained for other classes, if it is known."""
    before = RecordedData.from_manifest(
        RunDirectory(init_from).require_checkpoint().manifest
    ).classes
    if before is None or before == config.data.classes:
        return []
    return [f"  trained for other classes: {describe_classes(before, config.data.classes)}"]


# -- what the run directory holds ---------------------------------------------------------------


@dataclass(frozen=True)
class _Earlier:
    """The run that is to go on, as it is before its directory is locked.

    config, checkpoint: None where there is none, and for run.resume=never.
    """

    config: Config | None = None
    checkpoint: Checkpoint | None = None

    @property
    def left_out(self) -> Sequence[str] | None:
        """The image files that the run leaves out. None without a checkpoint: it begins anew."""
        if self.checkpoint is None:
            return None
        names: Sequence[str] = self.checkpoint.manifest.get("left_out", ())
        return names

    def complete(self, given: Config) -> Config:
        """Return the user's configuration, with what a resume does not decide again."""
        if self.config is None:
            return given
        values = {
            **_recorded_cuts(given, self.config),
            **_recorded_images(given, self.config),
            **_recorded_weights(given, self.config),
        }
        return update(given, values)


def _peek(given: Config, directory: RunDirectory) -> _Earlier:
    """Return the run that the directory holds, read once."""
    if given.run.resume == "never":
        return _Earlier()
    config = None
    if directory.config_file.exists():
        config = directory.recorded_config({given.method.objective["name"]})
    return _Earlier(config, directory.newest_checkpoint())


def _recorded_cuts(given: Config, recorded: Config) -> dict[str, Any]:
    """Return the recorded list for measured cuts, so that a resume never measures again."""
    cuts = recorded.pipeline.cuts
    fits = recorded.pipeline.stages == count_stages(given) and isinstance(cuts, tuple)
    if given.pipeline.cuts not in MEASURED or not fits:
        return {}
    return {"pipeline.cuts": list(cuts)}


def _recorded_images(given: Config, recorded: Config) -> dict[str, Any]:
    """Return what is recorded for each `auto` of image files, of a user's data, or with weights.

    So a resume sees the images as its run did, and reads none of them to measure again.
    """
    # The statistics of weights are those of their file, which a resume does not read.
    is_measured = given.data.name == "image_folder" or is_user_code(given.data.name)
    is_decided = is_measured or recorded.model.weights is not None
    if not is_decided or recorded.data.name != given.data.name:
        return {}
    values: dict[str, Any] = {}
    for key in ("image_size", "mean", "std"):
        value = getattr(recorded.data, key)
        if isinstance(value, tuple):
            value = list(value)
        if getattr(given.data, key) == "auto":
            values[f"data.{key}"] = value
    return values


def _recorded_weights(given: Config, recorded: Config) -> dict[str, Any]:
    """Return the recorded weights that a run began with, where the user names no other ones."""
    model, before = given.model, recorded.model
    names_others = model.weights not in (None, before.weights)
    if names_others or given.run.init_from not in (None, recorded.run.init_from):
        return {}
    values: dict[str, Any] = {
        "run.init_from": recorded.run.init_from,
        "model.weights": before.weights,
    }
    if model.weights_sha256 is None:
        values["model.weights_sha256"] = before.weights_sha256
    return values


def _remove_partial_files(directory: RunDirectory) -> None:
    """Remove what an interrupted run wrote in part, which may be what fills a full disk."""
    Checkpoints(directory.path, 0).remove_partial()
    for name in (CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, TRACE_FILE):
        for path in directory.path.glob(f".{name}.*"):
            path.unlink(missing_ok=True)
    for path in directory.files_folder.glob(".*"):
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


@dataclass(frozen=True)
class _Resumed:
    """What a run in the directory decides: its configuration, its data, and what it has made.

    changes: of its data, all that were accepted. is_changed: whether the last one is new. summary:
    of a finished run whose data are of no matter, because this version reads them otherwise.
    """

    config: Config
    dataset: Dataset
    changes: tuple[Change, ...] = ()
    is_changed: bool = False
    summary: Record | None = None


def _join(
    requested: Config,
    recorded: Config,
    directory: RunDirectory,
    dataset: Dataset,
    checkpoint: Checkpoint | None,
) -> _Resumed:
    """Return what becomes of a recorded run with the user's new configuration and data.

    Raises UserError for keys that differ and are not free, and for data that it cannot go on with.
    """
    config = join_recorded(requested, recorded, str(directory.path))
    if checkpoint is None:
        check_data(config, recorded, directory, dataset, None)
        return _Resumed(config, dataset)

    # A finished run is not trained on the data.
    before = RecordedData.from_manifest(checkpoint.manifest)
    asks_the_same = (config.optim.epochs, config.optim.max_steps) == (
        recorded.optim.epochs,
        recorded.optim.max_steps,
    )
    if before.reads_otherwise(dataset) and asks_the_same:
        summary = directory.finished_summary(checkpoint.step)
        if summary is not None:
            return _Resumed(config, dataset, summary=summary)

    changes = check_data(config, recorded, directory, dataset, checkpoint)
    is_changed = len(changes) > len(before.changes)
    if is_changed:
        dataset = keep_normalisation(dataset, requested, recorded)
    return _Resumed(config, dataset, changes, is_changed)


def _find_start(
    config: Resolved,
    directory: RunDirectory,
    schedule: StepSchedule,
    checkpoint: Checkpoint | None,
) -> int:
    """Return the step after which the run begins.

    Raises UserError if its checkpoint was made after more steps than the schedule has.
    """
    if checkpoint is None:
        return 0
    if checkpoint.step > schedule.steps:
        advice = f"begin another run.dir with its weights: run.init_from={directory.path}"
        if schedule.max_steps == schedule.steps:
            advice = f"set optim.max_steps to at least {checkpoint.step}, or choose another run.dir"
        elif config.optim.schedule in OPEN_SCHEDULES:
            advice = "raise optim.epochs, or choose another run.dir"
        raise UserError(
            f"run: {directory.path} has already made {checkpoint.step} steps, more than the "
            f"{schedule.steps} asked for; {advice}"
        )
    return checkpoint.step


def _begin(
    config: Resolved,
    directory: RunDirectory,
    resumed: _Resumed,
    schedule: StepSchedule,
    start_step: int,
    metric: Metric,
) -> float:
    """Write the configuration, the list of image files and the start of the records.

    Returns the seconds recorded so far.
    """

    def keeps_evaluation(step: int) -> bool:
        is_due = schedule.is_evaluation_due(step)
        # Other data may have had epochs of another length.
        return (is_due or bool(resumed.changes)) and not (is_due and step == start_step)

    directory.summary_file.unlink(missing_ok=True)
    write_output(directory.config_file, to_yaml(config))
    write_listing(directory, resumed.dataset)
    header: dict[str, Any] = {
        "localpipe": localpipe.__version__,
        "torch": torch.__version__,
        "steps": schedule.steps,
        "metric": metric.as_json(),
    }
    if resumed.changes:
        header["data_changed"] = list(resumed.changes)
    return begin_records(directory.metrics_file, header, start_step, keeps_evaluation)


def _build_job(
    config: Resolved, given: Config, resumed: _Resumed, start_step: int, elapsed_s: float
) -> Job:
    return Job(
        config=to_dict(config),
        given=to_dict(given),
        start_step=start_step,
        elapsed_s=elapsed_s,
        started=time.time(),
        data_sha256=resumed.dataset.sha256,
        data_changed=list(resumed.changes),
        left_out=resumed.dataset.left_out,
    )


# -- notes for the user -------------------------------------------------------------------------


def _describe_steps(config: Resolved, schedule: StepSchedule, start_step: int) -> list[str]:
    """Return notes on images that are never used, and on what steps do less than is meant."""
    notes = []
    if schedule.dropped_samples:
        notes.append(
            f"note: the last {schedule.dropped_samples} of {schedule.train_size} images are left "
            "out of every epoch; batch normalisation needs two in every replica"
        )
    notes += _describe_rates(config, schedule, start_step)
    ema = config.optim.ema
    if ema is not None and schedule.steps < 1 / (1 - ema):
        notes.append(
            f"note: optim.ema {ema:g} averages over some {1 / (1 - ema):.0f} steps, the run has "
            f"{schedule.steps}, and what is evaluated is near the initial weights; lower optim.ema"
        )
    return notes


def _describe_rates(config: Resolved, schedule: StepSchedule, start_step: int) -> list[str]:
    """Return notes on a learning rate that is always 0, and on a warm-up above the peak."""
    optim = config.optim
    rates = LearningRateSchedule(optim, schedule.steps_per_epoch)
    steps_left = range(start_step + 1, schedule.steps + 1)
    notes = []
    if steps_left and not any(rates.rate(step) for step in steps_left):
        note = (
            f"note: the learning rate of {optim.schedule} is 0 in every step that is left; "
            "nothing moves"
        )
        if start_step == 0 and optim.lr > 0:
            note += "; set optim.schedule=cosine_step"
        notes.append(note)
    has_own_warmup = optim.schedule == "cosine_epoch" and optim.warmup_steps is None
    if has_own_warmup and optim.warmup_epochs >= 1 and optim.lr < WARMUP_START and not start_step:
        notes.append(
            f"note: the warm-up of {optim.schedule} begins at {WARMUP_START:g}, above the peak "
            f"rate of {optim.lr:g}; set optim.schedule=cosine_step, or optim.warmup_epochs=0"
        )
    return notes


def _describe_change(resumed: _Resumed, directory: RunDirectory) -> list[str]:
    """Return a note on a change of the data, if there is one since the checkpoint."""
    if not resumed.is_changed:
        return []
    return [describe_change(directory, resumed.dataset, resumed.changes[-1])]


def _describe_start(config: Resolved, schedule: StepSchedule, start_step: int) -> str:
    run = (
        f"{config.model.name} on {config.data.name}, {config.stages} stages, "
        f"{config.pipeline.processes} processes"
    )
    if start_step:
        return f"resuming {config.run.dir} after step {start_step} of {schedule.steps}: {run}"
    return f"starting {config.run.dir}: {run}"

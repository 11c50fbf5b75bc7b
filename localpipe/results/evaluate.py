"""Evaluation: the task's metric for every stage's exit and for the whole network, in one process.

The weights are those of a run's newest checkpoint. The images are those of its test set, or others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localpipe.config.keys import Config
from localpipe.config.load import update
from localpipe.config.resolved import Resolved
from localpipe.data.dataset import Dataset, limit_classes
from localpipe.data.evaluation import EvaluationData, load_evaluation
from localpipe.errors import RunError, UserError
from localpipe.pipeline.channels.channel import Inbox
from localpipe.pipeline.channels.message import Header
from localpipe.pipeline.launch.process import prepare_process
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from localpipe.pipeline.stages.stage import Stage, TailLoss
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.workers.assemble import join_stages
from localpipe.pipeline.workers.loop import RunnerContext, StageRunner, Worker
from localpipe.pipeline.workers.phase import PhaseTimer
from localpipe.pipeline.workers.source import BatchSource
from localpipe.pipeline.workers.steps import build_step_schedule
from localpipe.plan.resolve_here import resolve_here
from localpipe.results.ensemble import EnsembleResult, ExitEnsemble
from localpipe.results.predictions import (
    NumberPredictions,
    OutputRecorder,
    Predictions,
    TargetRecorder,
    read_classes,
    read_numbers,
)
from localpipe.runs.checkpoint import Checkpoint, evaluated_weights
from localpipe.runs.directory import RunDirectory
from localpipe.tasks.metric import Metric
from localpipe.tasks.task import Task

# A run of GPUs is evaluated on a machine without one.
_CPU_KEYS = {
    "run.device": "cpu",
    "run.capture": "none",
    "pipeline.backend": "gloo",
    "pipeline.devices": None,
    "pipeline.memory": None,
}


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation of a run found.

    stages: one record a stage, in order. Its keys are `kind`, `step`, `epoch`, `stage`, `split`,
    `loss`, the task's figures, as `accuracy` (0 to 1), and `samples`, and where the run has probes
    `probe_` and the metric's name. All figures are None for a stage without an exit, a `loss` that
    is not finite too, and for images without labels. metric: what the task is judged by.
    predictions: those of the whole network, None where one does not fit into a row. notes: lines
    for the user, in the order to print. ensemble: what the exits reach together, if asked for.
    """

    stages: list[dict[str, Any]]
    metric: Metric
    predictions: Predictions | NumberPredictions | None
    notes: tuple[str, ...]
    ensemble: EnsembleResult | None = None

    def as_json(self) -> dict[str, Any]:
        """Return what `eval --json` prints.

        Keys: `schema`, `metric`, `stages`, those of the predictions, and `ensemble` if asked for.
        """
        value = self.stages[-1][self.metric.name]
        content: dict[str, Any] = {
            "schema": 1,
            "metric": {**self.metric.as_json(), "value": value},
            "stages": self.stages,
        }
        if self.predictions is not None:
            content.update(self.predictions.as_json())
        if self.ensemble is not None:
            content["ensemble"] = self.ensemble.as_json()
        return content


def evaluate(
    run_dir: Path, given: Config, needs_predictions: bool = False, ensemble: str | None = None
) -> Evaluation:
    """Evaluate a run's newest checkpoint on the test images of `given.data`.

    The images go through the pipeline's own loop. given: the run's configuration, with overrides.
    ensemble: `mean` or `2^k`, to average the exits too.
    It works on the CPU, and sets threads and determinism of this process. Raises UserError without
    a complete checkpoint, or for other data than the network takes. Raises RunError if the weights
    do not fit.
    """
    directory = RunDirectory(run_dir)
    checkpoint = directory.require_checkpoint()
    images = _load_images(given, checkpoint, directory)
    config = _resolve_on_cpu(given, images.dataset)
    prepare_process(config)

    stages = _load_fitting_stages(config, checkpoint, directory)
    head = stages[-1].objective
    assert isinstance(head, TailLoss), "the last stage has the network's own head"
    task, notes = head.task, images.dataset.notes
    epoch = _find_epoch(directory, checkpoint.step)
    source = _open_source(config, images.dataset, checkpoint.step, epoch)
    _check_options(config.task.name, task, needs_predictions, ensemble is not None)
    if task.predicts == "more":
        return Evaluation(_run(config, stages, checkpoint, source), task.metric, None, notes)

    # Observe what the network predicts and what the data say.
    read = read_classes if task.predicts == "class" else read_numbers
    outputs, targets = OutputRecorder(head.tail, read), TargetRecorder(source)
    exits = None
    if ensemble is not None:
        exits = ExitEnsemble(stages, ensemble)
    records = _run(config, stages, checkpoint, targets)
    if task.predicts == "numbers":
        (numbers,) = outputs.result()
        number_predictions = NumberPredictions(numbers, targets.result(), images.files)
        return Evaluation(records, task.metric, number_predictions, notes)

    # Images without labels have predictions alone.
    labels = targets.result() if images.has_labels else None
    if labels is None:
        records = [_clear_figures(record, task) for record in records]
    predictions = _compare_classes(outputs, labels, images.files, config)
    ensemble_result = None
    if exits is not None:
        ensemble_result = exits.result(task, labels)
    return Evaluation(records, task.metric, predictions, notes, ensemble_result)


def _load_images(config: Config, checkpoint: Checkpoint, directory: RunDirectory) -> EvaluationData:
    classes = config.model.num_classes
    assert classes != "auto", "a run records it"
    return load_evaluation(config.data, classes, _find_skipped_files(config, checkpoint, directory))


def _resolve_on_cpu(config: Config, dataset: Dataset) -> Resolved:
    """Return the resolved configuration of one process on the CPU."""
    threads = config.run.threads
    if isinstance(threads, tuple):
        threads = threads[0]
    return resolve_here(update(config, {**_CPU_KEYS, "run.threads": threads}), dataset)


def _compare_classes(
    outputs: OutputRecorder,
    targets: NDArray[Any] | None,
    files: Sequence[str] | None,
    config: Resolved,
) -> Predictions:
    """Return the predicted classes beside those of the targets, None without labels."""
    labels = None
    if targets is not None:
        labels = _find_classes(targets)
    predicted, probability = outputs.result()
    classes, names = config.model.num_classes, config.data.classes
    return Predictions(predicted, probability, labels, files, classes, names)


def _check_options(name: str, task: Task, needs_predictions: bool, needs_ensemble: bool) -> None:
    """Raise UserError where a task does not predict what the command asks for."""
    if needs_ensemble and task.predicts != "class":
        raise UserError(
            f"eval: --ensemble averages the probabilities of classes, but task {name} predicts no "
            "class of a sample; leave it out"
        )
    if needs_predictions and task.predicts == "more":
        raise UserError(
            "eval: --predictions writes the class or the numbers of every sample, but task "
            f"{name} predicts more of one; leave it out"
        )


def _find_classes(targets: NDArray[Any]) -> NDArray[np.int64]:
    """Return the class of every target, (N,): itself, or the most probable of (N, classes)."""
    if targets.ndim == 1:
        return targets
    classes: NDArray[np.int64] = targets.argmax(1)
    return classes


def _find_skipped_files(
    config: Config, checkpoint: Checkpoint, directory: RunDirectory
) -> Sequence[str] | None:
    """Return the image files that the run leaves out of its own data, None for other data."""
    names: Sequence[str] | None = checkpoint.manifest.get("left_out")
    if not names or not config.data.skip_broken:
        return None
    if config.data.root != directory.recorded_config(None).data.root:
        return None
    return names


def load_stages(config: Resolved, checkpoint: Checkpoint) -> list[Stage]:
    """Return every stage of a run, in order, with the evaluated weights of a checkpoint.

    The stages are on the CPU, whatever run.device says. Raises UserError if a file of the
    checkpoint is missing or damaged, and RunError if names or shapes of weights are others.
    """
    blueprint, plans = build_plans(config)
    stages = [Stage(plan, blueprint, config) for plan in plans]
    for stage in stages:
        state = checkpoint.load_stage(stage.plan.stage)
        stage.load_weights(evaluated_weights(state))
    return stages


def _load_fitting_stages(
    config: Resolved, checkpoint: Checkpoint, directory: RunDirectory
) -> list[Stage]:
    """Return the stages of a run. UserError tells where they do not fit the images' shape."""
    try:
        return load_stages(config, checkpoint)
    except RunError:
        trained = directory.read().config.sample
        if trained == config.sample:
            raise
        raise UserError(
            f"eval: the images of {config.data.name} have the shape {config.sample}, and the "
            f"network of {directory.path} fits {trained} alone; give images of that shape"
        ) from None


class _RecordList:
    """A recorder that keeps the records in memory."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def write(self, kind: str, **values: Any) -> None:
        self.records.append({"kind": kind, **values})


def _open_source(config: Resolved, dataset: Dataset, step: int, epoch: int) -> BatchSource:
    """Return the source of the messages of one evaluation after a step."""
    steps = build_step_schedule(config, dataset)
    headers = _set_epoch(steps.evaluation_headers(step), epoch)
    dataset = limit_classes(dataset, config.task, config.model.num_classes)
    return BatchSource(dataset, headers, config.run.seed, float("inf"))


def _run(
    config: Resolved, stages: Sequence[Stage], checkpoint: Checkpoint, source: Inbox
) -> list[dict[str, Any]]:
    """Send the test images through the stages, and return the record of each."""
    # All stages are in this process, joined in memory.
    rates = LearningRateSchedule(config.optim, 1)
    recorder, timer = _RecordList(), PhaseTimer()
    context = RunnerContext(rates, timer, recorder, None)
    has_probes = config.run.probe == "linear"
    runners = join_stages(
        stages, source, context, with_probes=has_probes, saved_step=checkpoint.step
    )
    if has_probes:
        _load_probes(runners, checkpoint)
    Worker(runners, timer).run()
    return [record for record in recorder.records if record.get("split") == "test"]


def _set_epoch(
    headers: Iterator[tuple[Header, slice]], epoch: int
) -> Iterator[tuple[Header, slice]]:
    """Yield the headers with an epoch that the test images alone do not tell."""
    for header, rows in headers:
        yield replace(header, epoch=epoch), rows


def _load_probes(runners: Sequence[StageRunner], checkpoint: Checkpoint) -> None:
    """Load every stage's probe, and leave it out where the checkpoint has none."""
    for runner in runners:
        state = checkpoint.load_stage(runner.stage.plan.stage).get("probe")
        if state is None or runner.probe is None:
            runner.probe = None
        else:
            runner.probe.load_state(state)


def _find_epoch(directory: RunDirectory, step: int) -> int:
    """Return the epoch of the newest record up to a step, 1 without records."""
    epochs = [1]
    with contextlib.suppress(UserError):  # what is evaluated needs no records
        for record in directory.records():
            recorded_step, epoch = record.get("step"), record.get("epoch")
            if isinstance(recorded_step, int) and recorded_step <= step and isinstance(epoch, int):
                epochs.append(epoch)
    return max(epochs)


def _clear_figures(record: dict[str, Any], task: Task) -> dict[str, Any]:
    """Return a record of images without labels, which have no loss and no figure."""
    figures = ("loss", *task.figures, f"probe_{task.metric.name}")
    return {key: None if key in figures else value for key, value in record.items()}

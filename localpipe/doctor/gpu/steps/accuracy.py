"""ResNet-32 on CIFAR-10 for as many epochs as fit: end to end, and with AugLocal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from localpipe.doctor.gpu.commands import CommandEnd, train_all
from localpipe.doctor.gpu.device_work import build_stages, measure_step_s, resolve_words
from localpipe.doctor.gpu.step_context import StepContext
from localpipe.runs.directory import RunDirectory

_KINDS: Mapping[str, Sequence[str]] = {
    "end to end": ("pipeline.stages=1",),
    "AugLocal, 4 stages": ("method=auglocal", "pipeline.stages=4"),
}
_START_S = 20.0  # until a run's first step, and from its last one to its summary
_TRAINING_SHARE = 0.8  # of the time that is left, because evaluations take time too
_EVALUATIONS = 4


def run(context: StepContext) -> None:
    """Add a finding for each way to train, or why there are no data."""
    context.note_machine()
    if context.cifar is None:
        context.add_absence("CIFAR-10", "no data were given; --cifar FILE names an .npz")
        return
    for index, (name, kind) in enumerate(_KINDS.items()):
        limit_s = context.left_s / (len(_KINDS) - index)
        words = [*_list_words(context), *kind]
        epochs = _count_epochs(words, context.size.rate_s, limit_s)
        epochs = max(1, min(epochs, context.size.accuracy_epochs))
        words += [f"optim.epochs={epochs}", f"run.evaluate_every={max(1, epochs // _EVALUATIONS)}"]
        run_name = name.replace(",", "")
        end = train_all(context, {run_name: words}, limit_s)[run_name]
        _add_end(context, name, end, epochs, context.folder / run_name.replace(" ", "_"))


def _list_words(context: StepContext) -> list[str]:
    size = context.size
    return [
        f"model.name={size.accuracy_network}",
        "data.name=npz",
        f"data.root={context.cifar}",
        f"data.batch_size={size.accuracy_batch}",
        "optim.lr=auto",
        "optim.schedule=cosine_epoch",
        "optim.warmup_epochs=auto",
        "pipeline.processes=1",
        "run.device=cuda",
        "run.threads=1",
        "run.precision=tf32",
        "run.capture=graphs",
    ]


def _count_epochs(words: Sequence[str], seconds: float, limit_s: float) -> int:
    """Return how many epochs fit into some seconds, by the time of a few steps here."""
    config = resolve_words(words)
    stages = build_stages(config)
    step_s = measure_step_s(stages.step, seconds)
    steps = stages.runners[0].context.schedule.steps_per_epoch
    return int(_TRAINING_SHARE * (limit_s - seconds - _START_S) / (steps * step_s))


def _add_end(context: StepContext, name: str, end: CommandEnd, epochs: int, folder: Path) -> None:
    """Add the accuracy of a run, or that of its last evaluation if it was killed."""
    if end.result is not None:
        summary = end.result
        text = f"{100 * summary['test_accuracy']:.2f} % after {summary['epochs']} epochs"
        text += f", {summary['wall_s']:.0f} s"
        keys = ("test_accuracy", "test_accuracy_per_stage", "epochs", "wall_s")
        figures = {key: summary[key] for key in keys}
        context.add_ok(name, text, **figures, samples_per_s=summary["train_samples_per_s"])
        return
    last = _find_last_evaluation(folder)
    if last is None:
        context.add_failure(name, end.problem)
        return
    text = f"{100 * last['accuracy']:.2f} % in epoch {last['epoch']} of {epochs}; {end.problem}"
    context.add_failure(name, text, test_accuracy=last["accuracy"], epochs=last["epoch"])


def _find_last_evaluation(folder: Path) -> Mapping[str, Any] | None:
    """Return the newest test record of a run's last stage, None if there is none."""
    last: Mapping[str, Any] | None = None
    for record in RunDirectory(folder).records():
        if record["kind"] != "eval" or record["split"] != "test":
            continue
        if last is None or record["stage"] >= last["stage"]:
            last = record
    return last

"""What `eval` prints: the exits of the stages, the classes, the confusion matrix."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from localpipe.errors import to_line
from localpipe.plan.formats import format_number, format_percent
from localpipe.results.ensemble import EnsembleResult
from localpipe.results.evaluate import Evaluation
from localpipe.results.predictions import Predictions
from localpipe.tasks.metric import TOP5_ACCURACY, Metric

_MAX_CLASSES = 20  # of more, those of the least accuracy
_MAX_MATRIX_CLASSES = 12  # so wide a matrix fits a terminal


def evaluation_tables(title: str, evaluation: Evaluation) -> Iterator[Table]:
    """Yield the tables of an evaluation, in the order to print.

    They are the stages, the classes, and the confusion matrix of up to 12 classes. title: names the
    run.
    """
    yield _build_stage_table(title, evaluation)
    predictions = evaluation.predictions
    if not isinstance(predictions, Predictions):
        return
    confusion = predictions.confusion()
    if confusion is None:
        yield _build_prediction_table(predictions)
        return
    yield _build_class_table(predictions, confusion)
    if predictions.num_classes <= _MAX_MATRIX_CLASSES:
        yield _build_confusion_table(predictions, confusion)


def metric_line(evaluation: Evaluation) -> str:
    """Return the line on the whole network."""
    record, metric = evaluation.stages[-1], evaluation.metric
    value = record[metric.name]
    if value is None:
        return f"whole network: {metric.words} -, {record['samples']} samples without labels"
    line = f"whole network: {metric.words} {metric.format(value, digits=2)}"
    if TOP5_ACCURACY.name in record:
        top5 = TOP5_ACCURACY.format(record[TOP5_ACCURACY.name], digits=2)
        line += f", {TOP5_ACCURACY.words} {top5}"
    return line


def ensemble_line(ensemble: EnsembleResult, metric: Metric) -> str:
    """Return the line on the ensemble of exits."""
    stages = ", ".join(map(str, ensemble.stages))
    value = metric.format(ensemble.figures[metric.name], digits=2)
    line = f"ensemble of exits {stages} ({ensemble.weights}): {metric.words} {value}"
    if TOP5_ACCURACY.name in ensemble.figures:
        top5 = TOP5_ACCURACY.format(ensemble.figures[TOP5_ACCURACY.name], digits=2)
        line += f", {TOP5_ACCURACY.words} {top5}"
    return line


def _build_stage_table(title: str, evaluation: Evaluation) -> Table:
    """Return a row for every stage: its exit and, where the run has probes, its probe."""
    records, metric = evaluation.stages, evaluation.metric
    table = _make_table(f"{title} after step {records[-1]['step']}")
    probe_key = f"probe_{metric.name}"
    has_probes = any(probe_key in record for record in records)
    has_top5 = TOP5_ACCURACY.name in records[-1]
    names = ["stage", f"exit {metric.words}", "exit loss", "samples"]
    if has_probes:
        names.insert(3, f"probe {metric.words}")
    if has_top5:
        names.insert(2, f"exit {TOP5_ACCURACY.words}")
    for name in names:
        table.add_column(name, justify="right")
    for record in records:
        row = [
            str(record["stage"]),
            metric.format(record[metric.name], digits=2),
            format_number(record["loss"], digits=4),
            str(record["samples"]),
        ]
        if has_probes:
            row.insert(3, metric.format(record.get(probe_key), digits=2))
        if has_top5:
            row.insert(2, TOP5_ACCURACY.format(record[TOP5_ACCURACY.name], digits=2))
        table.add_row(*row)
    return table


def _build_class_table(predictions: Predictions, confusion: NDArray[np.int64]) -> Table:
    """Return a row for every class, or for those of the least accuracy where there are many."""
    accuracies = predictions.accuracy_per_class()
    assert accuracies is not None, "there is a confusion matrix"
    indices = list(range(predictions.num_classes))
    title = "classes"
    if len(indices) > _MAX_CLASSES:
        # A class without images has no accuracy, and is not listed.
        measured = [(value, index) for index, value in enumerate(accuracies) if value is not None]
        indices = [index for _, index in sorted(measured)[:_MAX_CLASSES]]
        title = f"the {len(indices)} least accurate of {predictions.num_classes} classes"

    table = _make_table(title)
    table.add_column("class")
    for name in ("samples", "accuracy"):
        table.add_column(name, justify="right")
    table.add_column("most often taken for")
    for index in indices:
        samples = int(confusion[index].sum())
        table.add_row(
            to_line(predictions.name(index)),
            str(samples),
            format_percent(accuracies[index], digits=2),
            _describe_confusion(predictions, confusion[index], index),
        )
    return table


def _describe_confusion(predictions: Predictions, row: NDArray[np.int64], index: int) -> str:
    """Return the other class that most images of a class are taken for, and their number."""
    counts = row.copy()
    counts[index] = 0
    other = int(counts.argmax())
    if counts[other] == 0:
        return "-"
    return f"{to_line(predictions.name(other))} ({counts[other]})"


def _build_confusion_table(predictions: Predictions, confusion: NDArray[np.int64]) -> Table:
    """Return the whole confusion matrix. Its columns are numbered as the names of its rows are."""
    table = _make_table("samples by class (rows) and prediction")
    table.add_column("class")
    for index in range(predictions.num_classes):
        table.add_column(str(index), justify="right")
    for index, row in enumerate(confusion.tolist()):
        name = str(index)
        if predictions.name(index) != name:
            name = f"{index} {to_line(predictions.name(index))}"
        table.add_row(name, *map(str, row))
    return table


def _build_prediction_table(predictions: Predictions) -> Table:
    """Return the number of images that are taken for each class, the most frequent first."""
    counts = np.bincount(predictions.predicted, minlength=predictions.num_classes)
    indices = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    table = _make_table("predictions")
    table.add_column("class")
    table.add_column("samples", justify="right")
    for index in indices[:_MAX_CLASSES]:
        table.add_row(to_line(predictions.name(index)), str(counts[index]))
    return table


def _make_table(title: str) -> Table:
    return Table(title=title, title_justify="left")

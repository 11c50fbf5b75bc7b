"""What a network predicts for every sample of an evaluation, and how that compares with labels."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from localpipe.errors import RunError
from localpipe.files import write_whole
from localpipe.pipeline.channels.channel import Inbox
from localpipe.pipeline.channels.message import Message

_COLUMNS = ("class", "prediction", "probability")


@dataclass(frozen=True)
class Predictions:
    """The predictions for N images, in the order of the images.

    predicted: (N,) int64, the class of the largest output. probability: (N,) float32, that of the
    prediction. labels: (N,) int64, or None for images without labels. files: the N paths from
    data.root, or None for images that are no files. num_classes: outputs of the network. names:
    those of the first classes, or None.
    """

    predicted: NDArray[np.int64]
    probability: NDArray[np.float32]
    labels: NDArray[np.int64] | None
    files: Sequence[str] | None
    num_classes: int
    names: tuple[str, ...] | None

    def name(self, index: int) -> str:
        """Return the name of a class, or its index as text where it has no name."""
        if self.names is None or index >= len(self.names):
            return str(index)
        return self.names[index]

    def confusion(self) -> NDArray[np.int64] | None:
        """Return the number of images of each class (rows) by prediction (columns).

        It has the shape (num_classes, num_classes). Returns None without labels.
        """
        if self.labels is None:
            return None
        cells = self.labels * self.num_classes + self.predicted
        counts = np.bincount(cells, minlength=self.num_classes**2)
        return counts.reshape(self.num_classes, self.num_classes)

    def accuracy_per_class(self) -> list[float | None] | None:
        """Return the accuracy of each class in 0..1, None for a class without images.

        Returns None without labels.
        """
        confusion = self.confusion()
        if confusion is None:
            return None
        accuracies: list[float | None] = []
        for index, row in enumerate(confusion.tolist()):
            images = sum(row)
            accuracies.append(row[index] / images if images else None)
        return accuracies

    def as_json(self) -> dict[str, Any]:
        """Return `classes`, `accuracy_per_class` and `confusion`, as lists or None."""
        confusion = self.confusion()
        return {
            "classes": None if self.names is None else list(self.names),
            "accuracy_per_class": self.accuracy_per_class(),
            "confusion": None if confusion is None else confusion.tolist(),
        }

    def write_csv(self, path: Path) -> None:
        """Write a row for every image: its path or index, class, prediction and probability.

        The class is empty without labels. The file is UTF-8. Bytes of a name that are not UTF-8
        become escapes. Raises RunError if the file cannot be written.
        """
        rows = []
        for row, predicted in enumerate(self.predicted.tolist()):
            label = ""
            if self.labels is not None:
                label = self.name(int(self.labels[row]))
            rows.append([label, self.name(predicted), f"{self.probability[row]:.6f}"])
        _write_rows(path, _COLUMNS, rows, self.files)


@dataclass(frozen=True)
class NumberPredictions:
    """The numbers predicted for N samples, in their order.

    predicted: (N, outputs) float32. targets: (N, outputs) float32. files: the N paths from
    data.root, or None for samples that are no files.
    """

    predicted: NDArray[np.float32]
    targets: NDArray[np.float32]
    files: Sequence[str] | None

    def as_json(self) -> dict[str, Any]:
        """Return nothing: the task's metric says all."""
        return {}

    def write_csv(self, path: Path) -> None:
        """Write a row for every sample: its path or index, its targets, then its predictions.

        The columns are target and prediction, or target_0, target_1, ... of several outputs. Every
        number has the digits that give the same float32 again. Raises RunError if the file cannot
        be written.
        """
        outputs = self.predicted.shape[1]
        columns = []
        for name in ("target", "prediction"):
            columns += [name] if outputs == 1 else [f"{name}_{index}" for index in range(outputs)]
        numbers = np.concatenate([self.targets, self.predicted], 1)
        rows = [[str(number) for number in row] for row in numbers]
        _write_rows(path, columns, rows, self.files)


def _write_rows(
    path: Path, columns: Sequence[str], rows: Sequence[list[str]], files: Sequence[str] | None
) -> None:
    """Write a CSV file that appears whole: a path or an index in front of every row."""
    text = io.StringIO()
    # With the module's own line ends it puts every line break of a name into quotes.
    writer = csv.writer(text)
    samples: Sequence[str] | range = range(len(rows))
    if files is not None:
        samples = files
    writer.writerow(["index" if files is None else "path", *columns])
    for sample, row in zip(samples, rows, strict=True):
        writer.writerow([sample, *row])
    try:
        write_whole(path, text.getvalue().encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise RunError(
            f"eval: cannot write {path}: {error.strerror}; free space, or give another file"
        ) from None


class TargetRecorder:
    """The inbox of an evaluation's first stage, which keeps the targets of the messages."""

    def __init__(self, source: Inbox) -> None:
        self._source = source
        self._targets: list[Tensor] = []

    def receive(self) -> Message:
        """Return the next message of the source, and keep its targets."""
        message = self._source.receive()
        if "target" in message.fields:
            self._targets.append(message.fields["target"].clone())
        return message

    def result(self) -> NDArray[Any]:
        """Return the targets of all messages so far, (N, *target.shape)."""
        targets: NDArray[Any] = torch.cat(self._targets).numpy()
        return targets


class OutputRecorder:
    """Keeps what a network gives while the pipeline evaluates it.

    tail: the module that gives the outputs of the whole network. It is not changed, but observed.
    read: returns the tensors to keep of a batch's outputs, (B, outputs), each with B rows.
    """

    def __init__(self, tail: nn.Module, read: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        self._read = read
        self._batches: list[tuple[Tensor, ...]] = []
        tail.register_forward_hook(self._keep)

    def _keep(self, tail: nn.Module, inputs: Any, outputs: Tensor) -> None:
        self._batches.append(self._read(outputs))

    def result(self) -> tuple[NDArray[Any], ...]:
        """Return what was kept of all samples so far, (N, ...) each."""
        return tuple(
            torch.cat(tensors).cpu().numpy() for tensors in zip(*self._batches, strict=True)
        )


def read_classes(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the classes of the largest outputs, (B,) int64, and their probabilities, (B,)."""
    predicted = outputs.argmax(1)
    probabilities = outputs.float().softmax(1)
    return predicted, probabilities.gather(1, predicted[:, None])[:, 0]


def read_numbers(outputs: Tensor) -> tuple[Tensor]:
    """Return the outputs, (B, outputs) float32."""
    return (outputs.float(),)

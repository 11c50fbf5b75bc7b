"""What a network predicts for every image of an evaluation, and how that compares with labels."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
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
        text = io.StringIO()
        # With the module's own line ends it puts every line break of a name into quotes.
        writer = csv.writer(text)
        images: Sequence[str] | range = range(len(self.predicted))
        if self.files is not None:
            images = self.files
        writer.writerow(["index" if self.files is None else "path", *_COLUMNS])
        for row, image in enumerate(images):
            label = ""
            if self.labels is not None:
                label = self.name(int(self.labels[row]))
            prediction = self.name(int(self.predicted[row]))
            writer.writerow([image, label, prediction, f"{self.probability[row]:.6f}"])

        # The file appears whole.
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

    def result(self) -> NDArray[np.int64]:
        """Return the targets of all messages so far, (N,), which are class indices."""
        targets: NDArray[np.int64] = torch.cat(self._targets).numpy()
        return targets


class PredictionRecorder:
    """Keeps what a network predicts while the pipeline evaluates it.

    tail: the module that gives the logits of the whole network. It is not changed, but observed.
    """

    def __init__(self, tail: nn.Module) -> None:
        self._predicted: list[Tensor] = []
        self._probability: list[Tensor] = []
        tail.register_forward_hook(self._keep)

    def _keep(self, tail: nn.Module, inputs: Any, logits: Tensor) -> None:
        predicted = logits.argmax(1)
        probabilities = logits.float().softmax(1)
        self._predicted.append(predicted)
        self._probability.append(probabilities.gather(1, predicted[:, None])[:, 0])

    def result(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the predicted classes (N,), and their probabilities (N,), of all images so far."""
        predicted = torch.cat(self._predicted).cpu().numpy()
        probability = torch.cat(self._probability).cpu().numpy()
        return predicted, probability

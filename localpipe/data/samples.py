"""What a data set that has no images of bytes hands over: samples by index, and what they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from localpipe.fields import Field

SplitName = Literal["train", "test", "validation"]


class Samples(Protocol):
    """The N samples of a split, read by index: an input and a target each."""

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """The class of every sample, (N,), or None where a target is something else."""

    def __len__(self) -> int:
        """Return N."""

    def take(self, rows: NDArray[np.int64]) -> Samples:
        """Return the samples at `rows` (B,), in that order, without a copy of the inputs."""

    def read(self, index: NDArray[np.int64]) -> Mapping[str, NDArray[Any]]:
        """Return `input` (B, *sample) and `target` (B, ...) of the samples at `index` (B,).

        The arrays are new memory. Raises IndexError for an index out of range, and RunError for
        what cannot be read.
        """


@dataclass(frozen=True)
class Request:
    """A batch that will be read: positions in an epoch's order, or indices of another split.

    rows: start to stop. epoch: of a training batch, from 1.
    """

    split: SplitName
    epoch: int
    rows: slice


class BatchLoader(Protocol):
    """Reads batches by itself, ahead of their use, as loader processes do."""

    def with_classes(self, count: int, ignored: int | None = None) -> BatchLoader:
        """Return a loader that refuses a class that is not below `count`, and not `ignored`."""

    def read(
        self, requests: Iterable[tuple[Request, Samples, NDArray[np.int64]]], seed: int
    ) -> Iterator[Mapping[str, Tensor]]:
        """Yield the batch of every request, in order: the input and `target`, on the CPU.

        A request comes with its split and the indices of its samples there. It may be read long
        before its batch is taken. Raises RunError for what cannot be read.
        """


@dataclass(frozen=True)
class InputFacts:
    """What the samples of a data set are that are no images of bytes with a class.

    sample: the shape of an input. dtype: float32 or int64, or None for images of bytes (C, H, W).
    task: the name that `auto` stands for. digest: what tells the data apart, in hexadecimal.
    class_weights: those of `balanced`, where they are known. loader: reads the batches instead of
    `Samples.read`, where it is set. target: the field of the targets that it reads.
    evaluation_sample: the shape of an image of other splits than train, None where it is `sample`.
    ignored: the value of the places of a mask that are no class, None where it is not known.
    """

    sample: tuple[int, ...]
    dtype: str | None
    task: str
    digest: str
    class_weights: tuple[float, ...] | None = None
    loader: BatchLoader | None = None
    target: Field | None = None
    evaluation_sample: tuple[int, ...] | None = None
    ignored: int | None = None


@dataclass(frozen=True)
class FixedIdentity:
    """What tells a data set apart, known from the start. It has no list of files."""

    sha256: str
    listing: None = None


@dataclass(frozen=True)
class ArraySamples:
    """Samples in two arrays, which are not copied: the rows `rows` (B,) of them.

    inputs: (N, *sample). targets: (N, ...). name: of the field of the inputs, `image` or `input`.
    """

    inputs: NDArray[Any]
    targets: NDArray[Any]
    name: str
    rows: NDArray[np.int64]

    @property
    def labels(self) -> None:
        """None: a target is no class."""
        return None

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: NDArray[np.int64]) -> ArraySamples:
        """Return the samples at `rows` (B,), in that order. The arrays are not copied."""
        return replace(self, rows=self.rows[rows])

    def read(self, index: NDArray[np.int64]) -> Mapping[str, NDArray[Any]]:
        """Return the inputs by their name, and `target`, of the samples at `index` (B,)."""
        rows = self.rows[index]
        return {self.name: self.inputs[rows], "target": self.targets[rows]}


def samples_from_arrays(inputs: NDArray[Any], targets: NDArray[Any], name: str) -> ArraySamples:
    """Return all samples of two arrays, as of ArraySamples."""
    return ArraySamples(inputs, targets, name, np.arange(len(inputs)))


def hash_arrays(*arrays: NDArray[Any]) -> str:
    """Return the SHA-256 of arrays, their shapes and dtypes, in hexadecimal."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape} {array.dtype}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()

"""A user's own Dataset, named `package.module:function`, as samples that loader processes read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from localpipe import seeds
from localpipe.config.keys import Data
from localpipe.data.images import RawSamples, refuse_test_share
from localpipe.data.normalisation import Values, check_values, find_moments
from localpipe.data.samples import InputFacts, Request, Samples, SplitName
from localpipe.data.user.item_facts import check_configured, find_classes, find_task
from localpipe.data.user.items import ItemFormat
from localpipe.data.user.pool import LoaderPool
from localpipe.data.user.wire import Content
from localpipe.environment import available_cores
from localpipe.errors import UserError
from localpipe.fields import IMAGE, INPUT, Field

_MEASURED = 10_000  # items that mean and std are measured on
_CHUNK = 50  # items of one request
_MOST_PROCESSES = 8  # that measure
_WORTH_A_PROCESS = 1000  # items


@dataclass(frozen=True)
class UserSplit:
    """Items of a split by their indices in it: all of them, or some.

    source: the split that the user's function returned. rows: (N,). labels: (N,), or None.
    """

    source: SplitName
    rows: NDArray[np.int64]
    labels: NDArray[np.int64] | None
    loader: UserLoader

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: NDArray[np.int64]) -> UserSplit:
        """Return the items at `rows` (B,), in that order."""
        labels = None if self.labels is None else self.labels[rows]
        return dataclasses.replace(self, rows=self.rows[rows], labels=labels)

    def read(self, index: NDArray[np.int64]) -> Mapping[str, NDArray[Any]]:
        """Return the items at `index` (B,), under seed 0, by a loader process of their own."""
        request = Request(self.source, 0, slice(0, len(index)))
        (batch,) = self.loader.read([(request, self, index)], seed=0)
        return {name: tensor.numpy() for name, tensor in batch.items()}


@dataclass(frozen=True)
class UserLoader:
    """Reads batches of a user's Dataset in loader processes.

    pool: the processes that there are already. processes: how many read. classes: of targets that
    are class indices, None where they are something else or are not known. vocabulary: the number
    of tokens, or None. ignored: the pixel of a mask that is no class, or None.
    """

    pool: LoaderPool
    processes: int
    format: ItemFormat
    classes: int | None
    vocabulary: int | None
    ignored: int | None = None

    def with_classes(self, count: int, ignored: int | None = None) -> UserLoader:
        """Return a loader that refuses a class that is not below `count`, and not `ignored`."""
        return dataclasses.replace(self, classes=count, ignored=ignored)

    def read(
        self, requests: Iterable[tuple[Request, Samples, NDArray[np.int64]]], seed: int
    ) -> Iterator[Mapping[str, Tensor]]:
        """Yield the batch of every request, as `BatchLoader.read` says.

        The random numbers of training items depend on (seed, epoch, item), those of other items on
        (seed, item). So no batch depends on the number of processes.
        """
        name = IMAGE if self.format.input.dtype == "uint8" else INPUT
        contents = (self._write_request(*request, seed) for request in requests)
        try:
            self.pool.grow(self.processes)
            for _, arrays in self.pool.answer(contents):
                yield {name: arrays["input"], "target": arrays["target"]}
        finally:
            self.pool.close()

    def _write_request(
        self, request: Request, split: Samples, index: NDArray[np.int64], seed: int
    ) -> Content:
        assert isinstance(split, UserSplit), "every split of a user's is one"
        return {
            "kind": "batch",
            "split": split.source,
            "epoch": request.epoch if request.split == "train" else 0,
            "seed": seed,
            "indices": split.rows[index].tolist(),
            "format": self.format.to_json(),
            "classes": self.classes,
            "vocabulary": self.vocabulary,
            "is_mask": self.classes is not None and len(self.format.target.shape) == 2,
            "is_soft": self.classes is not None and self.format.target.dtype == "float32",
            "ignored": self.ignored,
        }


def load_user_dataset(config: Data, statistics: tuple[Values, Values] | None = None) -> RawSamples:
    """Return the splits of the function that data.name names, called in a loader process.

    The first, middle and last item of every split are read. mean and std of images of bytes that
    are `auto` are `statistics` where those are given, else they are measured. Raises RunError or
    UserError for data that cannot be trained on, and for items that differ when they are read twice
    under one seed.
    """
    refuse_test_share(config)
    pool = LoaderPool(config.name, config.timeout_s)
    try:
        return _load(config, statistics, pool)
    except BaseException:
        pool.close()
        raise


def _load(config: Data, statistics: tuple[Values, Values] | None, pool: LoaderPool) -> RawSamples:
    """Return the splits as `load_user_dataset` does, read by a pool without processes yet."""
    pool.grow(1)
    request = {"kind": "describe", "vocabulary": config.vocabulary}
    ((facts, labels),) = pool.answer([request])
    form = ItemFormat.from_json(facts["format"])
    check_configured(config, form)
    mean, std = _find_statistics(config, form, facts["lengths"]["train"], pool, statistics)

    classes, count = find_classes(config, facts["classes"])
    task, outputs = find_task(config, form, count, labels)
    loader = UserLoader(
        pool=pool,
        processes=1 if config.workers == "auto" else max(1, config.workers),
        format=form,
        classes=None,
        vocabulary=config.vocabulary,
    )
    splits: dict[str, UserSplit] = {}
    for source, length in facts["lengths"].items():
        known = None
        if source in labels and task == "classification":
            known = labels[source].numpy()
        splits[source] = UserSplit(source, np.arange(length), known, loader)
    inputs = InputFacts(
        sample=form.input.shape,
        dtype=None if form.input.dtype == "uint8" else form.input.dtype,
        task=task,
        digest=facts["digest"],
        loader=loader,
        target=Field("target", form.target.shape, form.target.dtype),
    )
    return RawSamples(
        train=splits["train"],
        test=splits["test"],
        num_classes=outputs,
        inputs=inputs,
        notes=_note_validation(config, splits),
        classes=classes,
        mean=mean,
        std=std,
        validation=splits.get("validation"),
    )


def _note_validation(config: Data, splits: Mapping[str, UserSplit]) -> tuple[str, ...]:
    if not config.validation or "validation" in splits:
        return ()
    return (
        f"note: the {config.validation} items of data.validation are read as training items are, "
        "with their transforms",
    )


def _find_statistics(
    config: Data,
    form: ItemFormat,
    size: int,
    pool: LoaderPool,
    statistics: tuple[Values, Values] | None,
) -> tuple[Values, Values]:
    """Return mean and std: the configured ones, else `statistics`, else those of the items.

    Inputs that are no images of bytes have none. size: training items.
    """
    given = {"mean": config.mean, "std": config.std}
    if form.input.dtype != "uint8":
        for key, values in given.items():
            if values not in ("auto", ()):
                raise UserError(
                    f"data: data.{key} is for images of bytes, and the inputs of {config.name} "
                    f"are {form.input.dtype}; set it to auto, and normalise them in the data set"
                )
        return (), ()
    channels = form.input.shape[0]
    found = statistics
    if "auto" in given.values() and (found is None or len(found[0]) != channels):
        found = _measure(config, form, size, pool)
    mean, std = found or ((), ())
    if config.mean != "auto":
        mean = check_values("mean", config.mean, config, channels)
    if config.std != "auto":
        std = check_values("std", config.std, config, channels)
    return mean, std


def _measure(config: Data, form: ItemFormat, size: int, pool: LoaderPool) -> tuple[Values, Values]:
    """Return mean and std of some training items, the same for every seed of a run."""
    rows = seeds.permutation(0, size, "statistics")[:_MEASURED]
    chunks = [rows[start : start + _CHUNK].tolist() for start in range(0, len(rows), _CHUNK)]
    processes = min(available_cores(), _MOST_PROCESSES)
    if config.workers != "auto":
        processes = max(1, config.workers)
    # Another process takes seconds to start.
    pool.grow(min(processes, len(rows) // _WORTH_A_PROCESS))
    counts = np.zeros((form.input.shape[0], 256), np.int64)
    head = {"kind": "count", "format": form.to_json()}
    for _, arrays in pool.answer({**head, "indices": chunk} for chunk in chunks):
        counts += arrays["counts"].numpy()
    return find_moments(counts)

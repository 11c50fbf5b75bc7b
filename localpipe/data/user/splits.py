"""The splits that a user's function returns, and their items in order. Runs in loader processes."""

from __future__ import annotations

import hashlib
import json
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, IterableDataset, Subset

from localpipe import seeds
from localpipe.config.user_code import call_user_code, describe_exception, import_user_code
from localpipe.data.user.items import BadItemError, Item, ItemFormat, check_values, convert_item
from localpipe.data.user.wire import Progress
from localpipe.errors import UserError

_SPLITS = ("train", "test", "validation")
_EXPECTED = "expected (train, test), or a dict with train, test and maybe validation and classes"


@dataclass(frozen=True)
class UserSplits:
    """The map-style data sets of a user by split, and what they say of their classes.

    classes: names of the classes, or their number, or None. progress: shows what is read.
    """

    name: str
    datasets: Mapping[str, Any]
    classes: tuple[str, ...] | int | None
    progress: Progress

    def read_item(self, split: str, index: int, seed: int, *stream: object) -> Item:
        """Return the item at `index`, its random numbers drawn from (seed, stream, index).

        torch's, numpy's and Python's global generators are seeded. Raises BadItemError, whose text
        goes on after `item 3 of train`, for an exception too. Its traceback is printed.
        """
        with self.progress.mark(split, index):
            seeds.enter_stream(seed, "item", *stream, index)
            try:
                item = self.datasets[split][index]
            except (Exception, SystemExit) as error:
                _print_traceback(error)
                raise BadItemError(
                    f"fails with {describe_exception(error)}; its traceback is above; correct the "
                    "data set"
                ) from None
            return convert_item(item)


def call_function(name: str, progress: Progress) -> UserSplits:
    """Return the splits that the function `name` makes, checked.

    Its random numbers are the same in every process and for every seed of a run. Raises UserError
    for a function that cannot be imported, that raises, or that returns something else than
    map-style data sets with at least one item each.
    """
    with progress.mark("call"):
        function = import_user_code(name, "data.name")
        seeds.enter_stream(0, "data")
        datasets, classes = _split_result(name, _call(name, function))
        for split, dataset in datasets.items():
            _check_dataset(name, split, dataset)
        if classes is None:
            classes = _find_classes(datasets["train"])
        return UserSplits(name, datasets, _check_classes(name, classes), progress)


def _call(name: str, function: Callable[[], Any]) -> Any:
    """Return function(). UserError tells what it raises, after its traceback was printed."""
    try:
        return function()
    except (Exception, SystemExit) as error:
        _print_traceback(error)
        raise UserError(
            f"data: {name} fails: {describe_exception(error)}; its traceback is above; correct it"
        ) from None


def find_labels(dataset: Any, size: int) -> NDArray[np.int64] | None:
    """Return the class of every item by `targets` or `labels` of a data set, None without them.

    It looks through torch's Subset and ConcatDataset. What is no list of `size` integers is None.
    """
    if isinstance(dataset, Subset):
        labels = find_labels(dataset.dataset, len(dataset.dataset))  # type: ignore[arg-type]
        return None if labels is None else labels[np.asarray(dataset.indices, np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [find_labels(part, len(part)) for part in dataset.datasets]  # type: ignore[arg-type]
        known = [part for part in parts if part is not None]
        return np.concatenate(known) if len(known) == len(parts) else None
    values = getattr(dataset, "targets", None)
    if values is None:
        values = getattr(dataset, "labels", None)
    try:
        array = np.asarray(values)
    except (ValueError, TypeError, RuntimeError):
        return None
    if array.shape != (size,) or array.dtype.kind not in "iub":
        return None
    return array.astype(np.int64)


def describe_splits(
    splits: UserSplits, vocabulary: int | None
) -> tuple[dict[str, Any], dict[str, NDArray[np.int64]]]:
    """Return what a run has to know of the splits, as JSON, and the labels where they are known.

    vocabulary: the number of tokens, to check them. Of every split the first, the middle and the
    last item are read twice under one seed. Raises UserError for items that differ then, and for
    items that cannot be trained on.
    """
    lengths = {split: len(dataset) for split, dataset in splits.datasets.items()}
    form: ItemFormat | None = None
    labels = {}
    digest = hashlib.sha256(json.dumps([lengths, splits.classes]).encode())
    for split, size in lengths.items():
        known = find_labels(splits.datasets[split], size)
        for index in sorted({0, size // 2, size - 1}):
            with named_item(split, index):
                item = _read_twice(splits, split, index)
                form = form or ItemFormat.of(item)
                form.check(item)
                check_values(item, _count(splits.classes), vocabulary)
            for array in item:
                digest.update(f"{array.shape} {array.dtype}".encode() + array.tobytes())
            # A transform of targets may give other classes than the data set lists.
            if known is not None and (item[1].shape or int(item[1]) != int(known[index])):
                known = None
        if known is not None:
            _check_labels(split, known, _count(splits.classes))
            labels[split] = known
    assert form is not None, "there is a split for training"
    content = {
        "lengths": lengths,
        "classes": splits.classes,
        "format": form.to_json(),
        "digest": digest.hexdigest(),
    }
    return content, labels


@contextmanager
def named_item(split: str, index: int) -> Iterator[None]:
    """Enter a context whose BadItemErrors become UserErrors that name the item."""
    try:
        yield
    except BadItemError as error:
        raise UserError(f"data: item {index} of {split} {error}") from None


def _read_twice(splits: UserSplits, split: str, index: int) -> Item:
    """Return an item under seed 0. Raises BadItemError if it differs when it is read again."""
    first = splits.read_item(split, index, 0, split, 0)
    copies = [array.copy() for array in first]
    second = splits.read_item(split, index, 0, split, 0)
    for copy, array in zip(copies, second, strict=True):
        is_same = copy.shape == array.shape and copy.dtype == array.dtype
        if not is_same or copy.tobytes() != array.tobytes():
            raise BadItemError(
                "differs when it is read twice under one seed, so it has a generator of its own; "
                "draw from the global generators, as torch.rand, np.random.rand or random.random"
            )
    return copies[0], copies[1]


def _count(classes: tuple[str, ...] | int | None) -> int | None:
    return len(classes) if isinstance(classes, tuple) else classes


def _check_labels(split: str, labels: NDArray[np.int64], classes: int | None) -> None:
    """Raise UserError for the first label that is out of range."""
    wrong = labels < 0
    if classes is not None:
        wrong |= labels >= classes
    if wrong.any():
        index = int(wrong.argmax())
        with named_item(split, index):
            check_values((labels[:0], labels[index]), classes, None)


def _split_result(name: str, result: Any) -> tuple[dict[str, Any], Any]:
    """Return the data sets by split, and the classes, of what the function returned."""
    if isinstance(result, tuple | list) and len(result) == 2:
        return dict(zip(_SPLITS, result, strict=False)), None
    if not isinstance(result, Mapping):
        raise UserError(f"data: {name} returned {type(result).__name__}; {_EXPECTED}")
    unknown = [key for key in result if key not in (*_SPLITS, "classes")]
    missing = [key for key in ("train", "test") if result.get(key) is None]
    if unknown or missing:
        found = ", ".join(str(key) for key in result) or "nothing"
        raise UserError(f"data: {name} returned a dict with {found}; {_EXPECTED}")
    given = {key: result[key] for key in _SPLITS if result.get(key) is not None}
    return given, result.get("classes")


def _check_dataset(name: str, split: str, dataset: Any) -> None:
    """Raise UserError for what is no map-style data set, or has no items."""
    where = f"data: {split} of {name}"
    kind = type(dataset).__name__
    if isinstance(dataset, IterableDataset):
        raise UserError(
            f"{where} is an IterableDataset ({kind}), whose items have no index; a run gives every "
            "epoch its order, and goes on anywhere in it; expected a Dataset with __getitem__ and "
            "__len__"
        )
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise UserError(f"{where} is a {kind}; expected a Dataset with __getitem__ and __len__")
    size = call_user_code(f"data: {split} of {name} has no length", lambda: len(dataset))
    if size == 0:
        raise UserError(f"{where} has no items; give it at least one")


def _find_classes(dataset: Any) -> Any:
    """Return the names of the classes that a data set has, as torchvision's have, else None."""
    if isinstance(dataset, Subset):
        return _find_classes(dataset.dataset)
    names = getattr(dataset, "classes", None)
    if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
        return names
    return None


def _check_classes(name: str, classes: Any) -> tuple[str, ...] | int | None:
    if classes is None or (isinstance(classes, int) and classes > 0):
        return classes
    is_list = isinstance(classes, list | tuple) and len(classes) > 0
    if is_list and all(isinstance(label, str) for label in classes):
        names = tuple(classes)
        if len(set(names)) == len(names):
            return names
    raise UserError(
        f"data: classes of {name} are {type(classes).__name__}; expected their number, or a list "
        "of different names"
    )


def _print_traceback(error: BaseException) -> None:
    """Print the traceback of a user's code, without localpipe's own frame."""
    trace = error.__traceback__
    assert trace is not None, "it was raised"
    traceback.print_exception(type(error), error, trace.tb_next)

"""Batches of a data set as tensors, in the order of an epoch, and a thread that reads ahead."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localpipe.data.augment import PaddedImages, augment_batch, pad_images, read_batch
from localpipe.data.dataset import Dataset, epoch_order
from localpipe.data.images import Split
from localpipe.data.samples import Request, Samples
from localpipe.fields import IMAGE

T = TypeVar("T")
AT_ONCE = 4  # items that the thread makes in a row


class BatchReader:
    """Reads batches of a data set: `image` (B, C, H, W), uint8, and `target` (B,), int64.

    Samples that are no images have `input` (B, *sample), and a target of their task. The order of
    the training images and their augmentation depend on (seed, epoch) only.
    pin_memory: put the tensors into pinned memory, for a GPU, which trains faster than a thread
    pads images. So padded images are kept then. Without CUDA, torch raises RuntimeError at the
    first read.
    """

    def __init__(self, dataset: Dataset, seed: int, pin_memory: bool = False) -> None:
        self._dataset, self._seed, self._pin_memory = dataset, seed, pin_memory
        self._epoch = -1  # of the order below
        self._order: NDArray[np.int64] = np.empty(0, np.int64)

    def read_train(self, epoch: int, rows: slice) -> dict[str, Tensor]:
        """Return augmented training images: `image` (B, C, H, W) uint8, `target` (B,) int64.

        rows: positions in the order of the epoch, any slice. Positions after the last image are
        left out, so B may be smaller than the slice, or 0. The tensors are new memory on the CPU.
        Epochs may be read in any order. The order of the last epoch alone is cached. Raises
        RunError if an image file is broken.
        """
        index = self.order(epoch)[rows]
        train = self._dataset.train
        if not isinstance(train, Split):
            return self._to_tensors(train.read(index))
        images = augment_batch(self._dataset, index, self._seed, epoch, self._padded)
        return self._to_tensors({IMAGE: images, "target": train.labels[index]})

    @cached_property
    def _padded(self) -> PaddedImages | None:
        """The padded training images for a GPU. They are made at the first batch."""
        return pad_images(self._dataset) if self._pin_memory else None

    def read_test(self, rows: slice) -> dict[str, Tensor]:
        """Return test images as they are: `image` (B, C, H, W) uint8, `target` (B,) int64.

        rows: indices into the test images, start to stop. Both bounds must be set, and the step is
        not read. The tensors are new memory on the CPU. Raises IndexError if stop is above the
        number of images, TypeError if start is None, and RunError if an image file is broken.
        """
        return self._read_split(self._dataset.test, rows)

    def read_validation(self, rows: slice) -> dict[str, Tensor]:
        """Return images held out of the training images, with the keys and dtypes of `read_test`.

        rows: indices into the validation images, with both bounds as for `read_test`. Raises
        AssertionError if the data set has no validation images, and otherwise what `read_test`
        raises.
        """
        assert self._dataset.validation is not None
        return self._read_split(self._dataset.validation, rows)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return the order of an epoch's training samples. The last epoch's alone is cached."""
        if epoch != self._epoch:
            size = len(self._dataset.train)
            self._order, self._epoch = epoch_order(size, self._seed, epoch), epoch
        return self._order

    def iterate(self, requests: Iterable[Request]) -> Iterator[dict[str, Tensor]]:
        """Yield the batch of every request, in order. Requests are read ahead of their batches.

        Raises what the reading raises.
        """
        inputs = self._dataset.inputs
        if inputs is not None and inputs.loader is not None:
            indexed = (self._find_samples(request) for request in requests)
            for batch in inputs.loader.read(indexed, self._seed):
                yield self._pin(dict(batch))
            return
        for request in requests:
            if request.split == "train":
                yield self.read_train(request.epoch, request.rows)
            elif request.split == "test":
                yield self.read_test(request.rows)
            else:
                yield self.read_validation(request.rows)

    def _find_samples(self, request: Request) -> tuple[Request, Samples, NDArray[np.int64]]:
        """Return a request with its split and the indices of its samples there."""
        split: Split | Samples | None = getattr(self._dataset, request.split)
        assert split is not None and not isinstance(split, Split), "a loader reads samples"
        if request.split == "train":
            return request, split, self.order(request.epoch)[request.rows]
        return request, split, np.arange(request.rows.start, request.rows.stop)

    def _read_split(self, split: Split | Samples, rows: slice) -> dict[str, Tensor]:
        index = np.arange(rows.start, rows.stop)
        if not isinstance(split, Split):
            return self._to_tensors(split.read(index))
        images = read_batch(split, index)
        return self._to_tensors({IMAGE: images, "target": split.labels[index]})

    def _to_tensors(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        return self._pin({name: torch.from_numpy(array) for name, array in arrays.items()})

    def _pin(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._pin_memory:
            return {name: tensor.pin_memory() for name, tensor in tensors.items()}
        return tensors


class ReadAhead(threading.Thread, Generic[T]):
    """Runs a generator in a thread of its own, a few items ahead of the reader.

    An item is handed over without a lock of Python's, which costs the reader a few microseconds
    only. The thread makes several items in a row, because while it works, it and the reader take
    the interpreter from each other.

    The constructor starts the thread, which is a daemon. There is no method to stop it: a thread
    whose items are not taken waits until the process ends.
    """

    def __init__(self, items: Iterator[T]) -> None:
        super().__init__(name="loader", daemon=True)
        self._items = items
        self._ready: SimpleQueue[T | BaseException | None] = SimpleQueue()
        self._requests: SimpleQueue[None] = SimpleQueue()  # one for every `AT_ONCE` items
        self._count = 0  # of items that were taken
        self._requests.put(None)
        self.start()

    def take(self) -> T | None:
        """Wait for the next item, and return it. Return None after the last one.

        Raises the error of the generator, of any class, in its place among the items. After None or
        an error there is nothing to take: one more call waits forever. One thread only may call it.
        """
        if self._count % AT_ONCE == 0:
            self._requests.put(None)  # for the items after those that are ready
        item = self._ready.get()
        self._count += 1
        if isinstance(item, BaseException):
            raise item
        return item

    def run(self) -> None:
        """Make the items, in the thread. The constructor starts it, so no caller needs to.

        It returns after the last item or the first error, and raises nothing: `take` raises the
        error.
        """
        try:
            for number, item in enumerate(self._items):
                if number % AT_ONCE == 0:
                    self._requests.get()
                self._ready.put(item)
            self._ready.put(None)
        except BaseException as error:  # any error ends the reader too, which waits for an item
            self._ready.put(error)

"""Batches of a data set as tensors, in the order of an epoch, and a thread that reads ahead."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localpipe.config.augmentation import read_words
from localpipe.data.augment import PaddedImages, augment_batch, pad_images, read_batch
from localpipe.data.dataset import Dataset, epoch_order
from localpipe.data.folders.file_loader import FileLoader, FileRequest
from localpipe.data.images import Split
from localpipe.data.samples import Request, Samples
from localpipe.data.transforms.mixtures import draw_mixture, find_partners, one_hot
from localpipe.fields import IMAGE

T = TypeVar("T")
AT_ONCE = 4  # items that the thread makes in a row


class BatchReader:
    """Reads batches of a data set: `image` (B, C, H, W), uint8, and `target` (B,), int64.

    Samples that are no images have `input` (B, *sample), and a target of their task. The order of
    the training images and their augmentation depend on (seed, epoch) only. Images are float32 in
    0..255 where data.augment has mixup, and targets float32 (B, classes) where the task takes
    probabilities.
    pin_memory: put the tensors into pinned memory, for a GPU, which trains faster than a thread
    pads images. So padded images are kept then. Without CUDA, torch raises RuntimeError at the
    first read.
    """

    def __init__(self, dataset: Dataset, seed: int, pin_memory: bool = False) -> None:
        self._dataset, self._seed, self._pin_memory = dataset, seed, pin_memory
        self._epoch = -1  # of the order below
        self._order: NDArray[np.int64] = np.empty(0, np.int64)
        words = read_words(dataset.augment)
        self._mixtures, self._blends = words.mixtures, words.blends

    def read_train(self, epoch: int, rows: slice) -> dict[str, Tensor]:
        """Return augmented training images: `image` (B, C, H, W) uint8, `target` (B,) int64.

        rows: positions in the order of the epoch, any slice. Positions after the last image are
        left out, so B may be smaller than the slice, or 0. The tensors are new memory on the CPU.
        Epochs may be read in any order. The order of the last epoch alone is cached. Raises
        RunError if an image file is broken.
        """
        order, train = self.order(epoch), self._dataset.train
        if not isinstance(train, Split):
            return self._to_tensors(train.read(order[rows]))
        positions = self._list_positions(rows)
        images = augment_batch(self._dataset, order[positions], self._seed, epoch, self._padded)
        return self._finish_train(epoch, rows, positions, images)

    def _list_positions(self, rows: slice) -> NDArray[np.int64]:
        """Return the positions of an epoch's order that a training batch is made of, (N,).

        They are those in `rows`, in order. With mixtures they are rising, and the partners of those
        in `rows` are among them.
        """
        size = len(self._dataset.train)
        own = np.arange(size)[rows]
        if not self._mixtures:
            return own
        steps = find_partners(rows, size, self._dataset.batch)
        return np.unique(np.concatenate([own, *(step.partners for step in steps)]))

    def _finish_train(
        self, epoch: int, rows: slice, positions: NDArray[np.int64], images: NDArray[np.uint8]
    ) -> dict[str, Tensor]:
        """Return the batch of `rows`. images: (N, C, H, W), augmented, of the N `positions`."""
        train = self._dataset.train
        assert isinstance(train, Split), "only images are augmented here"
        labels = train.labels[self.order(epoch)[positions]]
        if not self._mixtures:
            return self._to_tensors({IMAGE: images, "target": self._encode(labels)})

        # Every step that has rows here has a mixture of its own.
        classes = self._dataset.soft_classes or self._dataset.num_classes
        targets = one_hot(labels, classes)
        mixed_images: list[NDArray[Any]] = [images[:0].astype(self._dtype)]
        mixed_targets = [targets[:0]]
        for step in find_partners(rows, len(train), self._dataset.batch):
            mixture = draw_mixture(self._mixtures, self._seed, epoch, step.start, images.shape[2:])
            own = np.searchsorted(positions, step.own)
            partners = np.searchsorted(positions, step.partners)
            mixed = mixture.mix_images(images[own], images[partners])
            mixed_images.append(mixed.astype(self._dtype, copy=False))
            mixed_targets.append(mixture.mix_targets(targets[own], targets[partners]))
        return self._to_tensors(
            {IMAGE: np.concatenate(mixed_images), "target": np.concatenate(mixed_targets)}
        )

    @property
    def _dtype(self) -> type[np.generic]:
        """The dtype of images: a weighted sum of two has no bytes."""
        return np.float32 if self._blends else np.uint8

    def _encode(self, labels: NDArray[np.int64]) -> NDArray[Any]:
        """Return class indices (B,) as the task takes them, perhaps as (B, classes) float32."""
        if self._dataset.soft_classes is None:
            return labels
        return one_hot(labels, self._dataset.soft_classes)

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
        if self._dataset.loader is not None:
            yield from self._iterate_files(self._dataset.loader, requests)
            return
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

    def _iterate_files(
        self, loader: FileLoader, requests: Iterable[Request]
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the batch of every request, whose images loader processes read."""
        coming, current = itertools.tee(requests)
        images = loader.read((self._find_files(request) for request in coming), self._seed)
        for request, batch in zip(current, images, strict=True):
            if request.split == "train":
                positions = self._list_positions(request.rows)
                yield self._finish_train(request.epoch, request.rows, positions, batch)
            else:
                split = self._find_split(request)
                index = np.arange(request.rows.start, request.rows.stop)
                yield self._finish_evaluation(split, index, batch)

    def _find_files(self, request: Request) -> FileRequest:
        """Return what a loader is asked for, for a request."""
        images = self._find_split(request).images
        if request.split == "train":
            index = self.order(request.epoch)[self._list_positions(request.rows)]
            return FileRequest("train", images, index, request.epoch)
        index = np.arange(request.rows.start, request.rows.stop)
        return FileRequest(request.split, images, index, 0)

    def _find_split(self, request: Request) -> Split:
        split: Split | Samples | None = getattr(self._dataset, request.split)
        assert isinstance(split, Split), "image files have a class each"
        return split

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
        return self._finish_evaluation(split, index, read_batch(split, index))

    def _finish_evaluation(
        self, split: Split, index: NDArray[np.int64], images: NDArray[np.uint8]
    ) -> dict[str, Tensor]:
        """Return the batch of images (B, C, H, W) of another split than train, at `index` (B,)."""
        target = self._encode(split.labels[index])
        return self._to_tensors({IMAGE: images.astype(self._dtype, copy=False), "target": target})

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

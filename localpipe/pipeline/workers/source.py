"""The first stage's inbox: batches in the order that (seed, epoch, index) gives, and the flags that travel with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localpipe.data.augment import augment_batch, read_batch
from localpipe.data.batches import ReadAhead
from localpipe.data.dataset import Dataset, epoch_order
from localpipe.pipeline.channels.message import Flag, Header, Kind, Message


def _alone(verdict: int) -> int:
    return verdict


MadeBatch = tuple[Header, dict[str, Tensor]]


class BatchSource:
    """Makes the messages of a course ahead, in a thread, and decides when to save and when to stop.

    `begun` is the step, and its epoch, behind which it begins. Of several replicas the first one decides: `agree` takes every
    replica's verdict and returns the first one's. It is called once for every step and once at the end. `pinned` puts what is
    made into pinned memory, for a GPU.
    """

    def __init__(
        self,
        dataset: Dataset,
        schedule: Iterator[tuple[Header, slice]],
        seed: int,
        save_every_s: float,
        stop_requested: Callable[[], bool] = lambda: False,
        begun: tuple[int, int] = (0, 0),
        agree: Callable[[int], int] = _alone,
        pinned: bool = False,
    ) -> None:
        self._dataset, self._seed = dataset, seed
        self._save_every_s, self._stop_requested, self._agree = save_every_s, stop_requested, agree
        self._pinned = pinned
        self._saved_at = time.monotonic()
        self._last = Header(Kind.EMPTY, *begun, 0)
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))
        self._maker = ReadAhead(self._make(*each) for each in schedule)
        self._save: int = Flag.NONE  # what the end of the present step says
        self._ending: list[Header] = []

    def receive(self) -> Message:
        """Return the next message; behind the last one, or when asked to stop, a checkpoint's mark and a stop."""
        if self._ending:
            return Message(self._ending.pop(0), {})
        made = self._maker.take()
        verdict = self._verdict(made[0] if made else None)
        if verdict & Flag.STOP:
            self._ending = self._end(early=bool(verdict & Flag.SAVE_AFTER))
            return self.receive()
        self._save |= verdict
        assert made is not None, "the end of a course is a stop"
        header, fields = made
        self._last = header
        if self._save and header.kind is Kind.TRAIN and header.ends_step:
            header, self._save = replace(header, flags=header.flags | self._save), Flag.NONE
        if header.flags & Flag.SAVE_AFTER:
            self._saved_at = time.monotonic()
        return Message(header, fields)

    def _verdict(self, upcoming: Header | None) -> int:
        """Return whether to stop here, and whether to save: at the end of the step that begins, or at once."""
        if upcoming is None or (self._last.ends_step and self._stop_requested()):
            return self._agree(Flag.STOP | (Flag.NONE if upcoming is None else Flag.SAVE_AFTER))
        if upcoming.kind is Kind.TRAIN and upcoming.part == 0:
            due = time.monotonic() - self._saved_at >= self._save_every_s
            return self._agree(Flag.SAVE_AFTER if due else Flag.NONE)
        return Flag.NONE

    def _end(self, early: bool) -> list[Header]:
        last = replace(
            self._last, kind=Kind.EMPTY, count=0, flags=Flag.STOP, part=0, samples=0, batch=0
        )
        return [replace(last, flags=Flag.SAVE_AFTER), last] if early else [last]

    def _make(self, header: Header, rows: slice) -> MadeBatch:
        if header.kind is Kind.TRAIN:
            index = self._epoch_order(header.epoch)[rows]
            images = augment_batch(self._dataset, index, self._seed, header.epoch)
            labels = self._dataset.train.labels[index]
        else:
            split = self._dataset.test if header.kind is Kind.TEST else self._dataset.validation
            assert split is not None
            index = np.arange(rows.start, rows.stop)
            images = read_batch(split, index)
            labels = split.labels[index]
        fields = {"image": torch.from_numpy(images), "target": torch.from_numpy(labels)}
        return header, {
            name: tensor.pin_memory() for name, tensor in fields.items()
        } if self._pinned else fields

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(len(self._dataset.train.labels), self._seed, epoch))
        return self._order[1]

"""The first stage's inbox: batches in the order that (seed, epoch, index) gives, and the flags that travel with them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localpipe import config as configs
from localpipe import data
from localpipe.data import Dataset
from localpipe.message import Flag, Header, Kind, Message, share
from localpipe.sections import Config

Made = tuple[Header, dict[str, Tensor]]
AT_ONCE = 4  # messages that are made in a row


@dataclass(frozen=True)
class Course:
    """How many steps a run has, and which of them end an epoch. Steps and epochs are counted from 1."""

    train_size: int
    test_size: int
    batch: int
    epochs: int
    max_steps: int | None = None
    drop_last: bool = False
    validation_size: int = 0
    evaluate_every: int = 1
    accumulate: int = 1
    replicas: int = 1  # of the first stage
    widest: int = 1  # replicas of the stage that has most

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch; a remainder below two images a replica is dropped, batch normalisation cannot use it."""
        full, rest = divmod(self.train_size, self.batch)
        return full + (1 if rest >= 2 * self.widest and not self.drop_last else 0)

    @property
    def dropped(self) -> int:
        """Training images that an epoch leaves out although `drop_last` was not asked for."""
        rest = self.train_size % self.batch
        return rest if rest < 2 * self.widest and not self.drop_last else 0

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        whole = self.epochs * self.steps_per_epoch
        return whole if self.max_steps is None else min(whole, self.max_steps)

    def epoch(self, step: int) -> int:
        """Return the epoch of a step."""
        return (
            max(step - 1, 0) // max(self.steps_per_epoch, 1) + 1
        )  # an evaluation may have no images to train on

    def evaluates_after(self, step: int) -> bool:
        """Return whether an evaluation follows a step: at the end of every `evaluate_every` epochs, and of the run."""
        return step > 0 and (
            step % (self.steps_per_epoch * self.evaluate_every) == 0 or step == self.steps
        )

    def headers(self, after: int, replica: int = 0) -> Iterator[tuple[Header, slice]]:
        """Yield (header, rows) of every message behind step `after`, without a stop: a pure schedule.

        rows: places in the epoch's order for a training batch, indices of the held-out split for an evaluation batch.
        A run that resumes where an evaluation is due begins with it. Of several replicas the first one evaluates.
        """
        if self.evaluates_after(after) and replica == 0:
            yield from self.evaluation(after)
        for step in range(after + 1, self.steps + 1):
            place = (step - 1) % self.steps_per_epoch * self.batch
            whole = slice(place, min(place + self.batch, self.train_size))
            yield from self._messages(step, whole, replica)
            if self.evaluates_after(step) and replica == 0:
                yield from self.evaluation(step)

    def _messages(self, step: int, rows: slice, replica: int) -> Iterator[tuple[Header, slice]]:
        """Yield a replica's messages of one step: as equal as the rows divide, two at least each; the last ends the step."""
        samples = rows.stop - rows.start
        parts = max(1, min(self.accumulate, samples // (2 * self.widest)))
        for part in range(parts):
            these = share(samples, part, parts)
            batch = these.stop - these.start
            own = share(batch, replica, self.replicas)
            flags = (
                Flag.MORE
                if part + 1 < parts
                else Flag.SAVE_AFTER
                if step == self.steps
                else Flag.NONE
            )
            header = Header(
                Kind.TRAIN,
                step,
                self.epoch(step),
                own.stop - own.start,
                flags,
                part=part,
                samples=samples,
                batch=batch,
            )
            start = rows.start + these.start
            yield header, slice(start + own.start, start + own.stop)

    def evaluation(self, step: int) -> Iterator[tuple[Header, slice]]:
        """Yield the messages of one evaluation, held-out images first; the last one of each split is flagged."""
        for kind, size in ((Kind.VALIDATION, self.validation_size), (Kind.TEST, self.test_size)):
            rows = (
                self.batch // self.accumulate // self.widest
            )  # what fits every edge between first replicas
            for start in range(0, size, rows):
                stop = min(start + rows, size)
                flags = Flag.END_EVAL if stop == size else Flag.NONE
                yield Header(kind, step, self.epoch(step), stop - start, flags), slice(start, stop)


def course(config: Config, dataset: Dataset) -> Course:
    """Return the course of a configuration over a data set."""
    replicas = configs.replicas_of(config)
    return Course(
        train_size=len(dataset.train.labels),
        test_size=len(dataset.test.labels),
        batch=config.data.batch_size,
        epochs=config.optim.epochs,
        max_steps=config.optim.max_steps,
        drop_last=config.data.drop_last,
        validation_size=len(dataset.validation.labels) if dataset.validation else 0,
        evaluate_every=config.run.evaluate_every,
        accumulate=config.optim.accumulate,
        replicas=replicas[0],
        widest=max(replicas),
    )


def _alone(verdict: int) -> int:
    return verdict


class Loader:
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
        self._maker = _Maker(self._make(*each) for each in schedule)
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

    def _make(self, header: Header, rows: slice) -> Made:
        if header.kind is Kind.TRAIN:
            index = self._epoch_order(header.epoch)[rows]
            images = data.augmented(self._dataset, index, self._seed, header.epoch)
            labels = self._dataset.train.labels[index]
        else:
            split = self._dataset.test if header.kind is Kind.TEST else self._dataset.validation
            assert split is not None
            index = np.arange(rows.start, rows.stop)
            images = data.plain(split, index)
            labels = split.labels[index]
        fields = {"image": torch.from_numpy(images), "target": torch.from_numpy(labels)}
        return header, {
            name: tensor.pin_memory() for name, tensor in fields.items()
        } if self._pinned else fields

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if self._order[0] != epoch:
            self._order = (epoch, data.order(len(self._dataset.train.labels), self._seed, epoch))
        return self._order[1]


class _Maker(threading.Thread):
    """Runs a generator of messages in a thread of its own, a few ahead of what is taken.

    Handing over takes no lock of Python's, so that it costs the stage a few microseconds. The thread makes several messages in
    a row: while it works, it and the stage take the interpreter from each other.
    """

    def __init__(self, messages: Iterator[Made]) -> None:
        super().__init__(name="loader", daemon=True)
        self._messages = messages
        self._made: SimpleQueue[Made | BaseException | None] = SimpleQueue()
        self._wanted: SimpleQueue[None] = SimpleQueue()  # one for every `AT_ONCE` messages
        self._taken = 0
        self._wanted.put(None)
        self.start()

    def take(self) -> Made | None:
        """Wait for the next message; None behind the last one. Raises what its making raised."""
        if self._taken % AT_ONCE == 0:
            self._wanted.put(None)  # the ones behind those that are ready
        made = self._made.get()
        self._taken += 1
        if isinstance(made, BaseException):
            raise made
        return made

    def run(self) -> None:
        try:
            for number, made in enumerate(self._messages):
                if number % AT_ONCE == 0:
                    self._wanted.get()
                self._made.put(made)
            self._made.put(None)
        except BaseException as error:  # whatever it is, the stage that waits must hear of it
            self._made.put(error)

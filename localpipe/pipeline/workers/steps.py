"""The step schedule: which message comes when, which steps end an epoch, a pure function."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from localpipe.config.resolved import Resolved
from localpipe.data.dataset import Dataset
from localpipe.pipeline.channels.message import Flag, Header, Kind, replica_rows


@dataclass(frozen=True)
class StepSchedule:
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
            these = replica_rows(samples, part, parts)
            batch = these.stop - these.start
            own = replica_rows(batch, replica, self.replicas)
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


def step_schedule(config: Resolved, dataset: Dataset) -> StepSchedule:
    """Return the course of a configuration over a data set."""
    replicas = config.replicas
    return StepSchedule(
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

"""The step schedule, a pure function: which message comes when, and which steps end an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from localpipe.config.resolved import Resolved
from localpipe.data.dataset import Dataset
from localpipe.pipeline.channels.message import Flag, Header, Kind, replica_rows


@dataclass(frozen=True)
class StepSchedule:
    """The number of steps of a run, and its messages. Steps and epochs are counted from 1.

    batch: images of a step, over all replicas. epochs: None for as many as `max_steps` makes.
    max_steps: None for no limit. One of the two is a number. evaluate_every: in epochs.
    evaluate_steps: steps between evaluations, in its place. accumulate: messages of a step.
    replicas: those of the first stage. widest: the most replicas that any stage has.
    evaluation_batch: samples of an evaluation message, None for those of a training message.
    """

    train_size: int
    test_size: int
    batch: int
    epochs: int | None
    max_steps: int | None = None
    drop_last: bool = False
    validation_size: int = 0
    evaluate_every: int = 1
    evaluate_steps: int | None = None
    accumulate: int = 1
    replicas: int = 1
    widest: int = 1
    evaluation_batch: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, with a shorter last one if it is long enough.

        That is 2 images for each replica of the widest stage. The number may be 0. With `drop_last`
        there is no shorter batch.
        """
        batches, remainder = divmod(self.train_size, self.batch)
        if self._is_batch(remainder) and not self.drop_last:
            batches += 1
        return batches

    @property
    def dropped_samples(self) -> int:
        """Training images that every epoch leaves out although `drop_last` is not set.

        With `drop_last` it is 0.
        """
        remainder = self.train_size % self.batch
        if self._is_batch(remainder) or self.drop_last:
            return 0
        return remainder

    def _is_batch(self, samples: int) -> bool:
        # Batch normalisation cannot use fewer than two images a replica.
        return samples >= 2 * self.widest

    @property
    def steps(self) -> int:
        """Steps of the whole run: of all epochs, or `max_steps` if that is less."""
        if self.epochs is None:
            assert self.max_steps is not None, "checked with the configuration"
            # Without a batch no step can be made.
            return self.max_steps if self.steps_per_epoch else 0
        steps = self.epochs * self.steps_per_epoch
        if self.max_steps is None:
            return steps
        return min(steps, self.max_steps)

    @property
    def last_epoch(self) -> int:
        """The number of epochs that the run was asked for, or that its steps begin."""
        if self.epochs is None:
            return self.epoch(self.steps)
        return self.epochs

    def epoch(self, step: int) -> int:
        """Return the epoch of a step, from 1. Step 0 has epoch 1."""
        # A data set that is only evaluated may have no training images, and so no steps.
        return max(step - 1, 0) // max(self.steps_per_epoch, 1) + 1

    def is_evaluation_due(self, step: int) -> bool:
        """Return whether an evaluation follows a step.

        It does at the end of every `evaluate_every` epochs, or after every `evaluate_steps` steps,
        and at the end of the run. It is False for step 0. Raises ZeroDivisionError for a later step
        if an epoch has none.
        """
        if step <= 0:
            return False
        interval = self.evaluate_steps
        if interval is None:
            interval = self.steps_per_epoch * self.evaluate_every
        return step % interval == 0 or step == self.steps

    def headers(self, after: int, replica: int = 0) -> Iterator[tuple[Header, slice]]:
        """Yield (header, rows) of every message after a step, for one replica, without a stop.

        after: the newest finished step, or 0. rows: positions in the epoch's order for a training
        batch, indices of the held-out split for an evaluation batch. A run that resumes where an
        evaluation is due begins with it. Of several replicas, the first one evaluates. The last
        message of the run has Flag.SAVE_AFTER, and all of a step but its last have Flag.MORE.
        """
        if self.is_evaluation_due(after) and replica == 0:
            yield from self.evaluation_headers(after)
        for step in range(after + 1, self.steps + 1):
            start = (step - 1) % self.steps_per_epoch * self.batch
            rows = slice(start, min(start + self.batch, self.train_size))
            yield from self._step_headers(step, rows, replica)
            if self.is_evaluation_due(step) and replica == 0:
                yield from self.evaluation_headers(step)

    def _step_headers(self, step: int, rows: slice, replica: int) -> Iterator[tuple[Header, slice]]:
        """Yield (header, rows) of a replica's messages of one step; the last one ends the step."""
        # As many messages as `accumulate`, unless one would have fewer than two rows a replica.
        samples = rows.stop - rows.start
        parts = max(1, min(self.accumulate, samples // (2 * self.widest)))
        for part in range(parts):
            part_rows = replica_rows(samples, part, parts)
            batch = part_rows.stop - part_rows.start
            local_rows = replica_rows(batch, replica, self.replicas)
            header = Header(
                kind=Kind.TRAIN,
                step=step,
                epoch=self.epoch(step),
                count=local_rows.stop - local_rows.start,
                flags=self._step_flags(step, is_last_part=part == parts - 1),
                part=part,
                samples=samples,
                batch=batch,
            )
            start = rows.start + part_rows.start
            yield header, slice(start + local_rows.start, start + local_rows.stop)

    def _step_flags(self, step: int, is_last_part: bool) -> int:
        if not is_last_part:
            return Flag.MORE
        if step == self.steps:
            return Flag.SAVE_AFTER
        return Flag.NONE

    def evaluation_headers(self, step: int) -> Iterator[tuple[Header, slice]]:
        """Yield (header, rows) of one evaluation's messages, held-out images first.

        Then come the test images. rows: indices in their split. A split without images has no
        message. The last message of each split has Flag.END_EVAL. The iteration raises ValueError
        if `batch` is below accumulate * widest.
        """
        # So many rows fit every edge between first replicas.
        batch = self.evaluation_batch or self.batch // self.accumulate // self.widest
        for kind, size in ((Kind.VALIDATION, self.validation_size), (Kind.TEST, self.test_size)):
            for start in range(0, size, batch):
                stop = min(start + batch, size)
                flags = Flag.NONE
                if stop == size:
                    flags = Flag.END_EVAL
                header = Header(kind, step, self.epoch(step), stop - start, flags)
                yield header, slice(start, stop)


def build_step_schedule(config: Resolved, dataset: Dataset) -> StepSchedule:
    """Return the step schedule of a configuration for a data set. It may have no steps."""
    validation_size = 0
    if dataset.validation is not None:
        validation_size = len(dataset.validation)
    evaluate_every, evaluate_steps = 1, None
    if isinstance(config.run.evaluate_every, int):
        evaluate_every = config.run.evaluate_every
    else:  # `N steps`
        evaluate_steps = int(config.run.evaluate_every.split()[0])
    return StepSchedule(
        train_size=len(dataset.train),
        test_size=len(dataset.test),
        batch=config.data.batch_size,
        epochs=config.optim.epochs,
        max_steps=config.optim.max_steps,
        drop_last=config.data.drop_last,
        validation_size=validation_size,
        evaluate_every=evaluate_every,
        evaluate_steps=evaluate_steps,
        accumulate=config.optim.accumulate,
        replicas=config.replicas[0],
        widest=max(config.replicas),
        evaluation_batch=config.evaluation_batch,
    )

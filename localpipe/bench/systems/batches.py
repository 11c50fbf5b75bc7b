"""The batches of every system: the images that localpipe's first stage gets, in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from localpipe import data
from localpipe.bench.systems.step_timer import CPU
from localpipe.config.resolved import Resolved
from localpipe.data.batches import BatchReader
from localpipe.data.dataset import Dataset, limit_classes
from localpipe.pipeline.channels.channel import Inbox
from localpipe.pipeline.channels.message import Header
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from localpipe.pipeline.workers.device import Upload
from localpipe.pipeline.workers.source import BatchSource
from localpipe.pipeline.workers.steps import StepSchedule

_ENDLESS = 10**6  # epochs
_NEVER_S = float("inf")


class Batches:
    """Batches that a thread reads ahead without an end, for systems that train the whole network.

    part (r, n): only rows r*B/n .. (r+1)*B/n of every batch of B images, where n divides B. Raises
    UserError if the data set cannot be loaded.
    """

    def __init__(
        self, config: Resolved, device: torch.device = CPU, part: tuple[int, int] = (0, 1)
    ) -> None:
        dataset = _load(config)
        self._inputs = config.inputs.name
        steps = endless_schedule(config, len(dataset.train))
        self._schedule = LearningRateSchedule(config.optim, steps.steps_per_epoch)
        rows = _split_rows(steps, *part)
        on_gpu = device.type == "cuda"
        source = BatchSource(dataset, rows, config.run.seed, _NEVER_S, pin_memory=on_gpu)
        self._inbox: Inbox = source
        if on_gpu:
            self._inbox = Upload(source, device)

    def next(self) -> tuple[Tensor, Tensor, float]:
        """Return inputs, as uint8 images (B, C, H, W), targets, and the learning rate of the step.

        With a part (r, n), both have B/n rows. They are on the device. The call waits for the
        thread, and raises what the reading of images raises.
        """
        message = self._inbox.receive()
        rate = self._schedule.rate(message.header.step)
        return message.fields[self._inputs], message.fields["target"], rate


class Targets:
    """The targets of the same batches, for a worker that needs no inputs.

    It has no thread. Raises UserError if the data set cannot be loaded.
    """

    def __init__(self, config: Resolved, device: torch.device = CPU) -> None:
        dataset = _load(config)
        self._device = device
        self._train, self._is_soft = dataset.train, dataset.soft_classes is not None
        self._reader = BatchReader(dataset, config.run.seed)
        steps = endless_schedule(config, len(dataset.train))
        self._rows = steps.headers(0)
        self._schedule = LearningRateSchedule(config.optim, steps.steps_per_epoch)

    def next(self) -> tuple[Tensor, float]:
        """Return targets (B, ...) on the device, a copy, and the learning rate of the step."""
        header, rows = next(self._rows)
        index = self._reader.order(header.epoch)[rows]
        labels = self._train.labels
        if labels is None or self._is_soft:
            target = self._reader.read_train(header.epoch, rows)["target"]
        else:
            target = torch.from_numpy(labels[index])
        return target.to(self._device), self._schedule.rate(header.step)


def _load(config: Resolved) -> Dataset:
    """Return the data set with the targets that the task takes."""
    dataset = data.load(config.data, config.run.seed)
    return limit_classes(dataset, config.task, config.model.num_classes)


def endless_schedule(
    config: Resolved, train_size: int, replicas: tuple[int, ...] = (1,), messages: int = 1
) -> StepSchedule:
    """Return a schedule of whole batches without an end (a million epochs) and without evaluation.

    replicas: the numbers of replicas of every stage, where the system has stages. The first stage's
    divides the batches. messages: of one batch, where the system accumulates their gradients.
    train_size: images, at least one batch.
    """
    return StepSchedule(
        train_size,
        test_size=0,
        batch=config.data.batch_size,
        epochs=_ENDLESS,
        drop_last=True,
        accumulate=messages,
        replicas=replicas[0],
        widest=max(replicas),
    )


def _split_rows(steps: StepSchedule, part: int, parts: int) -> Iterator[tuple[Header, slice]]:
    """Yield every message of a schedule, reduced to one of equal parts of its rows."""
    size = steps.batch // parts
    for header, rows in steps.headers(0):
        first = rows.start + part * size
        yield replace(header, count=size), slice(first, first + size)

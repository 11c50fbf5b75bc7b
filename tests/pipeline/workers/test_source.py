"""The step schedule of a run, a pure function, and the source that makes its messages."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest
import torch

from localpipe.config.keys import Data
from localpipe.config.load import parse, update
from localpipe.data.augment import augment_batch, read_batch
from localpipe.data.batches import AT_ONCE
from localpipe.data.dataset import epoch_order
from localpipe.data.images import Images
from localpipe.errors import RunError
from localpipe.pipeline.channels.message import Flag, Header, Kind, Message
from localpipe.pipeline.workers.source import BatchSource
from localpipe.pipeline.workers.steps import StepSchedule, build_step_schedule
from localpipe.plan.resolve_here import resolve_here
from tests.harness import ImageDataset, load_images

# --- Course


@pytest.mark.parametrize(
    ("images", "batch", "drop_last", "steps", "dropped"),
    [
        (50_000, 1024, False, 49, 0),  # CIFAR-10
        (73_257, 1024, False, 72, 0),  # SVHN
        (5_000, 128, False, 40, 0),  # STL-10
        (50_000, 1024, True, 48, 0),
        (12, 4, False, 3, 0),
        (14, 4, False, 4, 0),
        (13, 4, False, 3, 1),
        (13, 4, True, 3, 0),
        (3, 4, False, 1, 0),
        (3, 4, True, 0, 0),
        (1, 4, False, 0, 1),
    ],
)
def test_epoch_keeps_a_shorter_last_batch_but_not_a_single_image(
    images: int, batch: int, drop_last: bool, steps: int, dropped: int
) -> None:
    found = StepSchedule(images, 10, batch, epochs=3, drop_last=drop_last)
    assert (found.steps_per_epoch, found.dropped_samples, found.steps) == (
        steps,
        dropped,
        3 * steps,
    )


@pytest.mark.parametrize(("max_steps", "steps"), [(None, 12), (1, 1), (11, 11), (12, 12), (99, 12)])
def test_max_steps_stops_early_and_never_later(max_steps: int | None, steps: int) -> None:
    assert StepSchedule(14, 10, 4, epochs=3, max_steps=max_steps).steps == steps


def lines_of(found: StepSchedule, after: int = 0) -> list[tuple[str, int, int, int, int, int]]:
    """Return (kind, step, epoch, first row, last row + 1, flags) of every message."""
    return [
        (header.kind.name, header.step, header.epoch, rows.start, rows.stop, int(header.flags))
        for header, rows in found.headers(after)
    ]


SAVE, END = Flag.SAVE_AFTER, Flag.END_EVAL


def test_headers_evaluate_at_each_epochs_end_and_save_at_the_last_step() -> None:
    assert lines_of(StepSchedule(7, 5, 3, epochs=2)) == [
        ("TRAIN", 1, 1, 0, 3, 0),
        ("TRAIN", 2, 1, 3, 6, 0),
        ("TEST", 2, 1, 0, 3, 0),
        ("TEST", 2, 1, 3, 5, END),
        ("TRAIN", 3, 2, 0, 3, 0),
        ("TRAIN", 4, 2, 3, 6, SAVE),
        ("TEST", 4, 2, 0, 3, 0),
        ("TEST", 4, 2, 3, 5, END),
    ]


def test_evaluation_messages_may_have_a_batch_of_their_own() -> None:
    found = StepSchedule(4, 5, 4, epochs=1, widest=2, evaluation_batch=3)
    assert [count for kind, *_, count in kinds_and_counts(found) if kind is Kind.TEST] == [3, 2]


def kinds_and_counts(schedule: StepSchedule) -> list[tuple[Kind, int]]:
    return [(header.kind, header.count) for header, _ in schedule.headers(0)]


def test_headers_count_the_rows_of_a_shorter_batch() -> None:
    headers = [header for header, _ in StepSchedule(8, 4, 3, epochs=1).headers(0)]
    assert [(header.kind, header.count) for header in headers] == [
        (Kind.TRAIN, 3),
        (Kind.TRAIN, 3),
        (Kind.TRAIN, 2),
        (Kind.TEST, 3),
        (Kind.TEST, 1),
    ]


def test_held_out_images_are_judged_before_the_test() -> None:
    evaluation = [
        line
        for line in lines_of(StepSchedule(4, 3, 4, epochs=1, validation_size=5))
        if line[0] != "TRAIN"
    ]
    assert evaluation == [
        ("VALIDATION", 1, 1, 0, 4, 0),
        ("VALIDATION", 1, 1, 4, 5, END),
        ("TEST", 1, 1, 0, 3, END),
    ]


def test_stop_within_an_epoch_evaluates_and_saves_after_the_last_step() -> None:
    assert lines_of(StepSchedule(12, 3, 4, epochs=5, max_steps=4))[-3:] == [
        ("TEST", 3, 1, 0, 3, END),
        ("TRAIN", 4, 2, 0, 4, SAVE),
        ("TEST", 4, 2, 0, 3, END),
    ]


@pytest.mark.parametrize("after", range(8))
def test_resumed_course_goes_on_where_the_whole_one_was(after: int) -> None:
    found = StepSchedule(11, 5, 4, epochs=3, max_steps=8, validation_size=3)
    whole = lines_of(found)
    last = max(
        (i for i, line in enumerate(whole) if line[0] == "TRAIN" and line[1] <= after), default=-1
    )
    assert lines_of(found, after) == whole[last + 1 :]


def test_resume_where_an_evaluation_is_due_begins_with_it() -> None:
    found = StepSchedule(12, 5, 4, epochs=2)
    assert lines_of(found, 3)[0] == ("TEST", 3, 1, 0, 4, 0)
    assert lines_of(found, 2)[0][:2] == ("TRAIN", 3)
    assert [line[:2] for line in lines_of(found, 6)] == [("TEST", 6), ("TEST", 6)]


def test_evaluations_may_be_rarer_than_epochs_and_one_follows_the_last_step() -> None:
    found = StepSchedule(12, 3, 4, epochs=5, evaluate_every=2)
    assert [step for step in range(16) if found.is_evaluation_due(step)] == [6, 12, 15]


def test_evaluations_may_follow_steps() -> None:
    found = StepSchedule(12, 3, 4, epochs=3, evaluate_every=2, evaluate_steps=4)
    assert [step for step in range(10) if found.is_evaluation_due(step)] == [4, 8, 9]
    assert lines_of(found, 8)[0] == ("TEST", 8, 3, 0, 3, END)


def test_a_run_of_steps_goes_through_as_many_epochs_as_they_make() -> None:
    found = StepSchedule(12, 3, 4, epochs=None, max_steps=8)
    assert (found.steps, found.last_epoch) == (8, 3)
    assert [step for step in range(9) if found.is_evaluation_due(step)] == [3, 6, 8]
    assert StepSchedule(1, 3, 4, epochs=None, max_steps=8).steps == 0


def test_evaluation_is_never_due_before_the_first_step() -> None:
    assert lines_of(StepSchedule(12, 5, 4, epochs=2))[0][0] == "TRAIN"


def test_course_follows_from_configuration_and_data_set() -> None:
    given = parse(
        {
            "data": {
                "name": "synthetic",
                "samples": 40,
                "image_size": 8,
                "batch_size": 8,
                "validation": 6,
            },
            "optim": {"epochs": 3, "max_steps": 7},
        },
        "test",
    )
    dataset = load_images(given.data, 0)
    config = resolve_here(given, dataset)
    assert build_step_schedule(config, dataset) == StepSchedule(34, 10, 8, 3, 7, False, 6)
    every = update(config, {"run.evaluate_every": "5 steps", "optim.epochs": None})
    expected = StepSchedule(34, 10, 8, None, 7, False, 6, evaluate_steps=5)
    assert build_step_schedule(every, dataset) == expected
    without = dataclasses.replace(dataset, validation=None)
    assert build_step_schedule(config, without).validation_size == 0


# --- Loader


def synthetic(
    augment: Literal["none", "crop_flip"] = "crop_flip", seed: int = 0, **keys: Any
) -> ImageDataset:
    return load_images(
        Data(name="synthetic", samples=38, image_size=8, augment=augment, **keys), seed
    )


def loader(
    dataset: ImageDataset,
    batch: int = 8,
    after: int = 0,
    seed: int = 0,
    save_every_s: float = math.inf,
    **keys: Any,
) -> BatchSource:
    held_out = len(dataset.validation) if dataset.validation else 0
    found = StepSchedule(
        len(dataset.train),
        len(dataset.test),
        batch,
        epochs=3,
        validation_size=held_out,
    )
    return BatchSource(
        dataset, found.headers(after), seed, save_every_s, start=(after, found.epoch(after)), **keys
    )


def all_of(inbox: BatchSource) -> list[Message]:
    """Return every message up to the stop."""
    messages = [inbox.receive()]
    while not messages[-1].header.flags & Flag.STOP:
        messages.append(inbox.receive())
    return messages


def epoch_of(messages: list[Message], epoch: int, name: str = "image") -> torch.Tensor:
    """Return the training images or targets of an epoch in their order."""
    return torch.cat(
        [
            m.fields[name]
            for m in messages
            if m.header.kind is Kind.TRAIN and m.header.epoch == epoch
        ]
    )


def same(some: list[Message], others: list[Message]) -> bool:
    return len(some) == len(others) and all(
        a.header == b.header
        and a.fields.keys() == b.fields.keys()
        and all(torch.equal(a.fields[name], b.fields[name]) for name in a.fields)
        for a, b in zip(some, others, strict=True)
    )


def test_loader_gives_uint8_images_and_int64_targets_of_the_count_in_the_header() -> None:
    for message in all_of(loader(synthetic()))[:-1]:
        image, target = message.fields["image"], message.fields["target"]
        assert image.dtype is torch.uint8 and image.shape == (message.header.count, 3, 8, 8)
        assert target.dtype is torch.int64 and target.shape == (message.header.count,)
        assert image.is_contiguous()


def test_an_epoch_is_the_augmented_training_images_in_the_order_of_seed_and_epoch() -> None:
    dataset = synthetic()
    messages = all_of(loader(dataset, seed=5))
    for epoch in (1, 2, 3):
        order = epoch_order(38, 5, epoch)
        assert torch.equal(
            epoch_of(messages, epoch, "target"), torch.from_numpy(dataset.train.labels[order])
        )
        images = torch.from_numpy(augment_batch(dataset, order, 5, epoch))
        assert torch.equal(epoch_of(messages, epoch), images)


def test_images_do_not_depend_on_the_batch_they_come_in() -> None:
    small, large = (all_of(loader(synthetic(), batch=batch)) for batch in (4, 19))
    for epoch in (1, 2, 3):
        assert torch.equal(epoch_of(small, epoch), epoch_of(large, epoch))


def test_two_loaders_agree_and_another_seed_or_epoch_does_not() -> None:
    messages = all_of(loader(synthetic()))
    assert same(messages, all_of(loader(synthetic())))
    assert not torch.equal(epoch_of(messages, 1), epoch_of(all_of(loader(synthetic(), seed=1)), 1))
    assert not torch.equal(epoch_of(messages, 1), epoch_of(messages, 2))


@pytest.mark.parametrize("after", [1, 4, 5, 7, 15])
def test_loader_resumed_at_a_step_gives_what_an_undisturbed_one_gives_from_there(
    after: int,
) -> None:
    whole = all_of(loader(synthetic(validation=3)))
    last = max(
        i for i, m in enumerate(whole) if m.header.kind is Kind.TRAIN and m.header.step <= after
    )
    assert same(all_of(loader(synthetic(validation=3), after=after)), whole[last + 1 :])


def test_evaluation_images_come_as_they_are_and_in_order() -> None:
    dataset = synthetic(validation=3)
    messages = [m for m in all_of(loader(dataset, batch=4)) if m.header.epoch == 1]
    for kind, split in ((Kind.TEST, dataset.test), (Kind.VALIDATION, dataset.validation)):
        assert split is not None
        images = torch.cat([m.fields["image"] for m in messages if m.header.kind is kind])
        targets = torch.cat([m.fields["target"] for m in messages if m.header.kind is kind])
        assert torch.equal(images, torch.from_numpy(read_batch(split, np.arange(len(split)))))
        assert torch.equal(targets, torch.from_numpy(split.labels))


def test_course_that_is_run_through_ends_with_a_stop_alone() -> None:
    messages = all_of(loader(synthetic()))
    assert messages[-1] == Message(Header(Kind.EMPTY, 15, 3, 0, Flag.STOP), {})
    assert messages[-2].header.kind is Kind.TEST and messages[-2].header.flags == Flag.END_EVAL
    assert [m.header.step for m in messages if m.header.flags & Flag.SAVE_AFTER] == [15]


def test_request_to_stop_ends_with_a_mark_to_save_and_a_stop() -> None:
    asked = threading.Event()
    inbox = loader(synthetic(), stop_requested=asked.is_set)
    assert [inbox.receive().header.step for _ in range(2)] == [1, 2]
    asked.set()
    assert all_of(inbox) == [
        Message(Header(Kind.EMPTY, 2, 1, 0, Flag.SAVE_AFTER), {}),
        Message(Header(Kind.EMPTY, 2, 1, 0, Flag.STOP), {}),
    ]


def test_request_to_stop_within_an_evaluation_saves_the_step_it_follows() -> None:
    asked = threading.Event()
    inbox = loader(synthetic(), stop_requested=asked.is_set)
    while inbox.receive().header.kind is Kind.TRAIN:
        pass
    asked.set()
    assert [(m.header.step, m.header.flags) for m in all_of(inbox)] == [
        (5, Flag.SAVE_AFTER),
        (5, Flag.STOP),
    ]


def test_request_to_stop_before_the_first_message_of_a_resume_names_the_step_resumed() -> None:
    messages = all_of(loader(synthetic(), after=7, stop_requested=lambda: True))
    assert [(m.header.step, m.header.flags) for m in messages] == [
        (7, Flag.SAVE_AFTER),
        (7, Flag.STOP),
    ]


def test_training_batches_are_marked_to_save_when_the_time_has_come() -> None:
    every = all_of(loader(synthetic(), save_every_s=0))
    for message in every:
        assert bool(message.header.flags & Flag.SAVE_AFTER) == (message.header.kind is Kind.TRAIN)


def test_no_batch_but_the_last_is_marked_to_save_before_the_time_has_come() -> None:
    saved = [
        m.header.step
        for m in all_of(loader(synthetic(), save_every_s=1e6))
        if m.header.flags & Flag.SAVE_AFTER
    ]
    assert saved == [15]


class Broken:
    """Images that cannot be read from some index on."""

    def __init__(self, images: Images, good: int) -> None:
        self._images, self._good = images, good

    def __len__(self) -> int:
        return len(self._images)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self._images.shape

    def read(self, index: np.ndarray) -> np.ndarray:
        if (index >= self._good).any():
            raise RunError("data: cannot read 7.png")
        return self._images.read(index)

    def read_crops(self, index: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        raise AssertionError("no images are cropped")


def test_broken_image_is_told_by_the_receive_that_would_have_given_it() -> None:
    dataset = synthetic("none")
    broken = dataclasses.replace(
        dataset, test=dataclasses.replace(dataset.test, images=Broken(dataset.test.images, 8))
    )
    inbox = loader(broken)
    for _ in range(6):  # five training batches and the first of the test
        inbox.receive()
    with pytest.raises(RunError, match="cannot read 7.png"):
        inbox.receive()


# --- Several messages of a step


def parts_of(found: StepSchedule, after: int = 0) -> list[tuple[str, int, int, int, int, int, int]]:
    """Return (kind, step, part, first row, last row + 1, samples of the step, flags) of each."""
    return [
        (
            header.kind.name,
            header.step,
            header.part,
            rows.start,
            rows.stop,
            header.samples,
            int(header.flags),
        )
        for header, rows in found.headers(after)
    ]


def test_an_evaluation_needs_no_images_to_train_on() -> None:
    found = list(StepSchedule(8, 4, 32, epochs=1, drop_last=True).evaluation_headers(5))
    assert [(header.step, header.epoch) for header, _ in found] == [(5, 5)]


def test_a_step_of_several_messages_is_evaluated_and_saved_behind_its_last_one() -> None:
    more = Flag.MORE
    assert parts_of(StepSchedule(19, 5, 12, epochs=1, accumulate=3)) == [
        ("TRAIN", 1, 0, 0, 4, 12, more),
        ("TRAIN", 1, 1, 4, 8, 12, more),
        ("TRAIN", 1, 2, 8, 12, 12, 0),
        ("TRAIN", 2, 0, 12, 14, 7, more),
        ("TRAIN", 2, 1, 14, 16, 7, more),
        ("TRAIN", 2, 2, 16, 19, 7, SAVE),
        ("TEST", 2, 0, 0, 4, 0, 0),
        ("TEST", 2, 0, 4, 5, 0, END),
    ]


@pytest.mark.parametrize(
    ("rows", "messages", "widest"),
    [(3, 2, 1), (3, 5, 1), (4, 4, 1), (5, 7, 1), (8, 2, 1), (8, 4, 2), (11, 3, 3), (16, 2, 4)],
)
def test_any_remainder_divides_into_messages_of_two_rows_a_replica_at_least_that_fit(
    rows: int, messages: int, widest: int
) -> None:
    for size in range(2 * widest, rows * messages + 1):
        found = list(
            StepSchedule(
                size, 0, rows * messages, epochs=1, accumulate=messages, widest=widest
            ).headers(0)
        )
        counts = [header.count for header, _ in found]
        assert sum(counts) == size and max(counts) - min(counts) <= 1
        assert min(counts) >= 2 * widest and max(counts) <= rows
        assert sum(header.weight for header, _ in found) == pytest.approx(1)
        assert [header.ends_step for header, _ in found] == [False] * (len(found) - 1) + [True]


def several(after: int = 0, **keys: Any) -> BatchSource:
    dataset = synthetic()
    found = StepSchedule(38, 4, 8, epochs=2, accumulate=2)
    return BatchSource(
        dataset, found.headers(after), 0, 0.0, start=(after, found.epoch(after)), **keys
    )


def test_images_do_not_depend_on_the_messages_of_a_step() -> None:
    assert torch.equal(epoch_of(all_of(several()), 1), epoch_of(all_of(loader(synthetic())), 1))


def test_no_mark_to_save_stands_within_a_step() -> None:
    marked = [m.header for m in all_of(several()) if m.header.flags & Flag.SAVE_AFTER]
    assert [(header.step, header.part) for header in marked] == [(step, 1) for step in range(1, 11)]


def test_request_to_stop_lets_a_step_come_to_its_end() -> None:
    asked = threading.Event()
    inbox = several(stop_requested=asked.is_set)
    assert inbox.receive().header.part == 0
    asked.set()
    found = [(m.header.kind, m.header.step, m.header.part, m.header.flags) for m in all_of(inbox)]
    assert found == [
        (Kind.TRAIN, 1, 1, Flag.SAVE_AFTER),
        (Kind.EMPTY, 1, 0, Flag.SAVE_AFTER),
        (Kind.EMPTY, 1, 0, Flag.STOP),
    ]


def test_the_loader_makes_several_messages_in_a_row_and_only_when_few_are_left() -> None:
    made: list[int] = []

    def schedule() -> Iterator[tuple[Header, slice]]:
        for step in range(1, 100):
            made.append(step)
            yield Header(Kind.TRAIN, step, 1, 2), slice(0, 2)

    def settled(most: int) -> bool:
        deadline = time.monotonic() + 30
        while len(made) < most and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)  # it does not go on
        return len(made) == most

    found = BatchSource(synthetic(), schedule(), 0, float("inf"))
    assert settled(AT_ONCE + 1)  # and the one that begins the next row
    for taken in range(2 * AT_ONCE):
        assert found.receive().header.step == taken + 1
        assert settled((taken // AT_ONCE + 2) * AT_ONCE + 1)

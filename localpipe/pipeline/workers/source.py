"""The first stage's inbox: batches in their order, and the flags to save and to stop."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from localpipe.data.batches import BatchReader, ReadAhead
from localpipe.data.dataset import Dataset
from localpipe.data.samples import Request, SplitName
from localpipe.pipeline.channels.message import Flag, Header, Kind, Message

_SPLITS: Mapping[Kind, SplitName] = {
    Kind.TRAIN: "train",
    Kind.TEST: "test",
    Kind.VALIDATION: "validation",
}


def never_stop() -> bool:
    """Return False: nobody requests a stop."""
    return False


def has_no_past(number: int) -> int | None:
    """Return None: no message was received before by a process that is gone."""
    return None


def _keep_own_flags(flags: int) -> int:
    return flags


class BatchSource:
    """Reads the messages of a schedule ahead, in a thread; decides when to save and when to stop.

    schedule: the header and rows of every message. save_every_s: seconds between checkpoints.
    stop_requested: called between steps, and true stops before the next one. start: the step, and
    its epoch, after which the schedule begins. agree: of several replicas, the first one decides;
    it takes this replica's flags and returns the first one's. It is called once for every step and
    once at the end. pin_memory: put batches into pinned memory, for a GPU. past_flags: returns the
    flags that a message has had, by its position in the schedule, and None for one that nobody has
    had: a process that goes on in place of another one decides nothing again. The thread starts at
    construction.
    """

    def __init__(
        self,
        dataset: Dataset,
        schedule: Iterator[tuple[Header, slice]],
        seed: int,
        save_every_s: float,
        stop_requested: Callable[[], bool] = never_stop,
        start: tuple[int, int] = (0, 0),
        agree: Callable[[int], int] = _keep_own_flags,
        pin_memory: bool = False,
        past_flags: Callable[[int], int | None] = has_no_past,
    ) -> None:
        self._past_flags = past_flags
        self._number = 0  # of the next message in the schedule
        self._save_every_s, self._stop_requested, self._agree = save_every_s, stop_requested, agree
        self._last_save = time.monotonic()
        step, epoch = start
        self._last = Header(Kind.EMPTY, step, epoch, 0)  # of the messages that were received
        self._step_flags: int = Flag.NONE  # for the last message of the current step
        self._closing: list[Header] = []
        self._reader = BatchReader(dataset, seed, pin_memory)
        self._messages = ReadAhead(self._read_messages(schedule))

    def receive(self) -> Message:
        """Wait for the next message.

        Its fields are new tensors: `image` (B, C, H, W) uint8 and `target` (B,) int64. At the end
        of the schedule comes one EMPTY message with Flag.STOP. A requested stop gives one with
        SAVE_AFTER before it. Do not call it after the STOP. A due checkpoint sets SAVE_AFTER on the
        last message of its step. Errors of reading a batch pass through: RunError for a broken
        image.
        """
        if self._closing:
            return Message(self._closing.pop(0), {})
        message = self._messages.take()
        past_flags = self._past_flags(self._number)
        self._number += 1
        if message is not None and past_flags is not None:
            self._last = replace(message.header, flags=past_flags)
            return Message(self._last, message.fields)
        flags = self._decide_flags(message)
        if flags & Flag.STOP:
            self._closing = self._closing_headers(flags)
            return self.receive()

        # The flag to save is set on the last message of a step that has several.
        assert message is not None, "the end of a schedule is a stop"
        header = message.header
        self._last = header
        self._step_flags |= flags
        if self._step_flags and header.kind is Kind.TRAIN and header.ends_step:
            header = replace(header, flags=header.flags | self._step_flags)
            self._step_flags = Flag.NONE
        if header.flags & Flag.SAVE_AFTER:
            self._last_save = time.monotonic()
        return Message(header, message.fields)

    def _decide_flags(self, message: Message | None) -> int:
        """Return whether to stop before a message, and whether to save.

        The save is at once if it stops, and else at the end of the step that the message begins.
        None stands for the end of the schedule, where the last step is saved already.
        """
        if message is None:
            return self._agree(Flag.STOP)
        if self._last.ends_step and self._stop_requested():
            return self._agree(Flag.STOP | Flag.SAVE_AFTER)
        if message.header.kind is Kind.TRAIN and message.header.part == 0:
            if time.monotonic() - self._last_save >= self._save_every_s:
                return self._agree(Flag.SAVE_AFTER)
            return self._agree(Flag.NONE)
        return Flag.NONE

    def _closing_headers(self, flags: int) -> list[Header]:
        """Return the headers of the last messages: to save, if the flags say so, and to stop."""
        stop = replace(
            self._last, kind=Kind.EMPTY, count=0, flags=Flag.STOP, part=0, samples=0, batch=0
        )
        if flags & Flag.SAVE_AFTER:
            return [replace(stop, flags=Flag.SAVE_AFTER), stop]
        return [stop]

    def _read_messages(self, schedule: Iterator[tuple[Header, slice]]) -> Iterator[Message]:
        # A loader may take requests far ahead of the messages.
        coming, current = itertools.tee(schedule)
        requests = (Request(_SPLITS[header.kind], header.epoch, rows) for header, rows in coming)
        batches = self._reader.iterate(requests)
        for (header, _), fields in zip(current, batches, strict=True):
            yield Message(header, fields)

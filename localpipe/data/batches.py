"""Batches made ahead of time in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")
AT_ONCE = 4  # messages that are made in a row


class ReadAhead(threading.Thread, Generic[T]):
    """Runs a generator of messages in a thread of its own, a few ahead of what is taken.

    Handing over takes no lock of Python's, so that it costs the stage a few microseconds. The thread makes several messages in
    a row: while it works, it and the stage take the interpreter from each other.
    """

    def __init__(self, messages: Iterator[T]) -> None:
        super().__init__(name="loader", daemon=True)
        self._messages = messages
        self._made: SimpleQueue[T | BaseException | None] = SimpleQueue()
        self._wanted: SimpleQueue[None] = SimpleQueue()  # one for every `AT_ONCE` messages
        self._taken = 0
        self._wanted.put(None)
        self.start()

    def take(self) -> T | None:
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

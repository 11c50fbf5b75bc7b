"""What a stage and its loader processes exchange: JSON over a socket, and arrays in shared memory.

Arrays lie in anonymous files in memory (memfd), which both processes map. They are not in the
system's folder for shared memory, which a container may limit to 64 KiB. Nothing is pickled.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Content = dict[str, Any]
Arrays = Mapping[str, NDArray[Any]]
SLOTS = 3  # requests of a loader process that are not answered, or whose answer is not read
_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 64
_PROGRESS = struct.Struct("<qqq")  # a place in `_PLACES`, an index, and when it was begun
_PLACES = ("call", "train", "test", "validation")


class Wire:
    """One end of a socket between a process and a loader process."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, content: Content, file: int | None = None) -> None:
        """Send JSON, and the number of an open file. The file stays open here.

        Raises OSError if the other process has ended.
        """
        text = json.dumps(content).encode()
        files = [] if file is None else [file]
        socket.send_fds(self._socket, [_LENGTH.pack(len(text))], files)
        self._socket.sendall(text)

    def receive(self, timeout_s: float | None = None) -> tuple[Content, int | None]:
        """Wait for what `send` sent: the content, and the number of the file here, or None.

        Raises TimeoutError if nothing has come after `timeout_s`, and EOFError if the other process
        has ended.
        """
        self._socket.settimeout(timeout_s)
        try:
            head, files, _, _ = socket.recv_fds(self._socket, _LENGTH.size, 1)
        except ConnectionError:
            head, files = b"", []
        self._socket.settimeout(None)
        if len(head) < _LENGTH.size:
            raise EOFError
        content: Content = json.loads(self._read(*_LENGTH.unpack(head)))
        return content, files[0] if files else None

    def close(self) -> None:
        """Close this end, so that the other process reads the end of the file."""
        self._socket.close()

    def _read(self, size: int) -> bytes:
        text = bytearray()
        while len(text) < size:
            part = self._socket.recv(size - len(text))
            if not part:
                raise EOFError
            text += part
        return bytes(text)


@dataclass(frozen=True)
class ArrayFormat:
    """The shape and the dtype of an array, by numpy's name of it."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """The bytes of the array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def of_batch(self, count: int) -> ArrayFormat:
        """Return the format of `count` such arrays as one."""
        return ArrayFormat((count, *self.shape), self.dtype)


class ArrayWriter:
    """Shared memory for the arrays of SLOTS answers, which are written in turn, again and again.

    New memory would cost more than the copy that the other process makes.
    """

    def __init__(self) -> None:
        self._turn = -1
        self._memory: list[mmap.mmap | None] = [None] * SLOTS
        self._formats: Mapping[str, ArrayFormat] = {}
        self._file: int | None = None

    def allocate(self, formats: Mapping[str, ArrayFormat]) -> Arrays:
        """Return arrays of any values, to be written for the next answer.

        Those of SLOTS answers before are written over. Raises OSError where memory does not
        suffice.
        """
        self._turn = (self._turn + 1) % SLOTS
        self._formats = formats
        size = max(1, _place(formats)[1])
        memory = self._memory[self._turn]
        if memory is None or size > len(memory):
            self._file = os.memfd_create("localpipe")
            os.ftruncate(self._file, size)
            memory = self._memory[self._turn] = mmap.mmap(self._file, size)
        return _view(memory, formats)

    def send(self, wire: Wire, content: Content) -> None:
        """Send an answer with the arrays that were allocated last."""
        arrays = {name: [form.shape, form.dtype] for name, form in self._formats.items()}
        wire.send({**content, "slot": self._turn, "arrays": arrays}, self._file)
        if self._file is not None:
            os.close(self._file)
            self._file = None


class ArrayReader:
    """The other end of an ArrayWriter."""

    def __init__(self) -> None:
        self._memory: dict[int, mmap.mmap] = {}

    def read(self, content: Content, file: int | None) -> dict[str, Tensor]:
        """Return copies of the arrays of an answer, and close its file."""
        slot = content["slot"]
        if file is not None:
            self._memory[slot] = mmap.mmap(file, 0)
            os.close(file)
        formats = {}
        for name, (shape, dtype) in content["arrays"].items():
            formats[name] = ArrayFormat(tuple(shape), dtype)
        if not formats:
            return {}
        views = _view(self._memory[slot], formats)
        return {name: torch.from_numpy(view).clone() for name, view in views.items()}


def _view(memory: mmap.mmap, formats: Mapping[str, ArrayFormat]) -> Arrays:
    """Return the arrays that lie in memory."""
    offsets, _ = _place(formats)
    arrays = {}
    for name, form in formats.items():
        flat = np.frombuffer(memory, form.dtype, math.prod(form.shape), offsets[name])
        arrays[name] = flat.reshape(form.shape)
    return arrays


def _place(formats: Mapping[str, ArrayFormat]) -> tuple[dict[str, int], int]:
    """Return the offset of every array in shared memory, and the size of all."""
    offsets, end = {}, 0
    for name, form in formats.items():
        offsets[name] = end
        end += -(-form.size // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


class Progress:
    """What a loader process reads now, and since when, in memory that both processes see.

    file: the number of an open file of `Progress.SIZE` bytes. It may be closed afterwards.
    """

    SIZE = _PROGRESS.size

    def __init__(self, file: int) -> None:
        self._memory = mmap.mmap(file, self.SIZE)

    @contextmanager
    def mark(self, place: str, index: int = 0) -> Iterator[None]:
        """Enter a context in which an item is read. place: its split, or `call` for no item."""
        _PROGRESS.pack_into(self._memory, 0, _PLACES.index(place), index, time.monotonic_ns())
        yield
        _PROGRESS.pack_into(self._memory, 0, 0, 0, 0)

    def read(self) -> tuple[str, int, float] | None:
        """Return the split, the index and for how many seconds it is read, None for nothing."""
        place, index, since = _PROGRESS.unpack_from(self._memory, 0)
        if since == 0:
            return None
        return _PLACES[place], index, (time.monotonic_ns() - since) / 1e9

"""What a stage and its loader processes exchange: JSON over a socket, and arrays in shared memory.

A batch is one anonymous file in memory (memfd), which both processes map. It does not lie in the
folder for shared memory of the system, which a container may limit to 64 KiB. Nothing is pickled.
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
from numpy.typing import NDArray

Content = dict[str, Any]
Arrays = Mapping[str, NDArray[Any]]
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


def allocate_arrays(formats: Mapping[str, ArrayFormat]) -> tuple[int, Arrays]:
    """Return an open file in memory, and new arrays of zeros that lie in it.

    The caller closes the file. The memory lives as long as an array of it, here or in the process
    that opens it. Raises OSError where memory does not suffice.
    """
    file = os.memfd_create("localpipe")
    try:
        os.ftruncate(file, max(1, _place(formats)[1]))
        return file, open_arrays(file, formats)
    except BaseException:
        os.close(file)
        raise


def open_arrays(file: int, formats: Mapping[str, ArrayFormat]) -> Arrays:
    """Return the arrays of a file that `allocate_arrays` made, as they are. They may be changed."""
    offsets, size = _place(formats)
    memory = mmap.mmap(file, max(1, size))
    arrays = {}
    for name, form in formats.items():
        count = math.prod(form.shape)
        flat = np.frombuffer(memory, form.dtype, count, offsets[name])
        arrays[name] = flat.reshape(form.shape)
    return arrays


def _place(formats: Mapping[str, ArrayFormat]) -> tuple[dict[str, int], int]:
    """Return the offset of every array in its file, and the size of the file."""
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

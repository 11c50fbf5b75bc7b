"""The queues of the emulated streams, as Python functions enter them."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

FAILED_STATUS = 86  # of a process in which a function has failed inside a stream

_Call = ctypes.CFUNCTYPE(None, ctypes.c_long)


class Queue:
    """Puts functions into streams. The threads of the streams call them back by a number."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcudart.so.13")
        self._library.emulated_is_capturing.argtypes = [ctypes.c_void_p, ctypes.c_int]
        self._library.emulated_enqueue.argtypes = [
            ctypes.c_void_p,
            ctypes.c_int,
            ctypes.c_long,
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_char_p,
        ]
        self._numbers = itertools.count(1)
        self._functions: dict[int, tuple[Callable[[], object], bool]] = {}
        self._callback = _Call(self._run)
        self._library.emulated_set_python(self._callback)
        # Read at the first use, because a process that is forked has settings of its own.
        self._checks_races: bool | None = None

    def put(
        self,
        function: Callable[[], object],
        device: torch.device,
        reads: Iterable[object] = (),
        writes: Iterable[object] = (),
        label: bytes = b"a function",
    ) -> None:
        """Put a function into the current stream of a device. A graph may call it many times.

        reads, writes: what it uses, for the race checker. Objects that are no tensors are ignored.
        """
        index = torch.cuda.current_device() if device.index is None else device.index
        stream = torch.cuda.current_stream(index).cuda_stream
        number = next(self._numbers)
        is_captured = bool(self._library.emulated_is_capturing(stream, index))
        self._functions[number] = function, is_captured
        spans: list[tuple[int, int, int]] = []
        if self._checks_races is None:
            self._checks_races = os.environ.get("EMULATED_GPU_RACES", "0") != "0"
        if self._checks_races:
            spans = [(*byte_span(tensor), 0) for tensor in _with_elements(reads)]
            spans += [(*byte_span(tensor), 1) for tensor in _with_elements(writes)]
        count = len(spans)
        begins = (ctypes.c_size_t * count)(*(span[0] for span in spans))
        ends = (ctypes.c_size_t * count)(*(span[1] for span in spans))
        is_write = (ctypes.c_ubyte * count)(*(span[2] for span in spans))
        self._library.emulated_enqueue(stream, index, number, count, begins, ends, is_write, label)

    def _run(self, number: int) -> None:
        function, stays = self._functions[number]
        if not stays:
            del self._functions[number]
        try:
            with torch.no_grad():
                function()
        except BaseException:
            sys.stderr.write(f"[emulated gpu] a kernel has failed\n{traceback.format_exc()}")
            sys.stderr.flush()
            os._exit(FAILED_STATUS)


def _with_elements(values: Iterable[object]) -> Iterable[Tensor]:
    return (value for value in values if isinstance(value, Tensor) and value.numel())


def byte_span(tensor: Tensor) -> tuple[int, int]:
    """Return the first address of a tensor with elements, and the first one after it."""
    begin = tensor.data_ptr()
    last = 0
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        last += (size - 1) * abs(stride)
    return begin, begin + (last + 1) * tensor.element_size()

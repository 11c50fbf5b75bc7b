"""Random numbers: a seed and an offset that moves with every draw, also in graphs, as CUDA's do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from tests.emulated_gpu.kernels.queue import Queue

_DRAW = 4  # how far one operation moves the offset
_SEEDS = 1 << 62


class RandomNumbers:
    """The generators of CPU functions, from the states of torch's CUDA generators.

    Within a graph the state is that of the launch. A graph's draws differ from launch to launch.
    """

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._captured_draws = 0
        self._draws_of_graph: dict[int, int] = {}
        self._launch_state: dict[int, tuple[int, int]] = {}  # by the thread of a stream

    def draw(self, device: torch.device) -> Callable[[], torch.Generator]:
        """Return what makes the CPU generator of one operation, and move the device's own on."""
        if torch.cuda.is_current_stream_capturing():
            place = self._captured_draws
            self._captured_draws += _DRAW
            return lambda: _generator(*self._launch_state[threading.get_native_id()], place)
        own = _own_generator(device)
        seed, offset = own.initial_seed(), own.get_offset()
        own.set_offset(offset + _DRAW)
        return lambda: _generator(seed, offset, 0)

    def follow_graphs(self) -> None:
        """Let torch's graphs tell when they are captured and launched."""
        graph: Any = torch.cuda.CUDAGraph
        replay, begin, end = graph.replay, graph.capture_begin, graph.capture_end

        def capture_begin(self_: Any, *args: Any, **kwargs: Any) -> Any:
            self._captured_draws = 0
            return begin(self_, *args, **kwargs)

        def capture_end(self_: Any, *args: Any, **kwargs: Any) -> Any:
            self._draws_of_graph[id(self_)] = self._captured_draws
            return end(self_, *args, **kwargs)

        def replay_with_state(self_: Any) -> None:
            device = torch.device("cuda", torch.cuda.current_device())
            own = _own_generator(device)
            state = own.initial_seed(), own.get_offset()
            self._queue.put(lambda: self._set_launch_state(state), device)
            replay(self_)
            own.set_offset(state[1] + self._draws_of_graph[id(self_)])

        graph.capture_begin, graph.capture_end = capture_begin, capture_end
        graph.replay = replay_with_state

    def _set_launch_state(self, state: tuple[int, int]) -> None:
        # Python's own locals of a thread end with every call from a thread of C++.
        self._launch_state[threading.get_native_id()] = state


def _own_generator(device: torch.device) -> Any:
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


def _generator(seed: int, offset: int, place: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1000003 + offset + place) % _SEEDS)

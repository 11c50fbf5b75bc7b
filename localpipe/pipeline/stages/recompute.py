"""Activation checkpointing: only a block's input is saved, and the backward pass runs it again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from localpipe.pipeline.stages.blocks import Activation
from localpipe.seeds import HostState


def checkpoint_block(block: nn.Module, x: Tensor, *companions: Tensor) -> Any:
    """Return block(x, *companions). Autograd saves only these inputs until the backward pass.

    The second run draws the same random numbers, from torch, numpy and Python. It finds the block's
    buffers as the first run found them, and leaves them as they are when it begins. So running
    means move once a step, and a block may read a buffer that it moves. The block gets a copy of x,
    since its first layer may write in place and the second run needs x again. No block writes into
    companions. Errors of the block pass through.
    """

    def run_block(x: Tensor, *companions: Tensor) -> Activation:
        output: Activation = block(x.clone(), *companions)
        return output

    def make_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        rerun = _Rerun(block)
        return rerun.watch_first_run(), rerun

    return checkpoint(run_block, x, *companions, use_reentrant=False, context_fn=make_contexts)


class _Rerun(AbstractContextManager[None]):
    """The context of every further run of a block. It is made before the first one.

    Inside it, the block has copies of its buffers, with the values that the first run found, and
    numpy and Python draw what they drew then. torch's own generators are restored by torch.
    """

    def __init__(self, block: nn.Module) -> None:
        # Where the block keeps its buffers: a module's table, and the name there.
        self._places = [
            (module._buffers, name) for module in block.modules() for name in module._buffers
        ]
        # None where the first run drew nothing from numpy and Python: setting them takes longer
        # than looking at them.
        self._generators: HostState | None = HostState()
        self._found = self._current_buffers()
        self._versions = [_version(buffer) for buffer in self._found]
        self._first: Sequence[Tensor | None] = _copy_all(self._found)

    @contextmanager
    def watch_first_run(self) -> Iterator[None]:
        """Enter the context of the first run. After it, what has not moved is forgotten."""
        yield
        if self._generators is not None and self._generators.is_current():
            self._generators = None
        first: list[Tensor | None] = []
        for index, buffer in enumerate(self._current_buffers()):
            is_same = buffer is self._found[index]
            # The kernels of batch normalisation move running statistics without a new version. In
            # training they do not read them, so a second run may find them moved.
            if is_same and _version(buffer) == self._versions[index]:
                first.append(None)
            else:
                first.append(self._first[index])
        self._first = first

    def __enter__(self) -> None:
        self._now = self._current_buffers()
        sources = []
        for first, now in zip(self._first, self._now, strict=True):
            sources.append(now if first is None else first)
        self._set_buffers(_copy_all(sources))
        if self._generators is not None:
            self._generators_now = HostState()
            self._generators.restore()

    def __exit__(self, *_: object) -> None:
        self._set_buffers(self._now)
        if self._generators is not None:
            self._generators_now.restore()

    def _current_buffers(self) -> list[Tensor | None]:
        return [table.get(name) for table, name in self._places]

    def _set_buffers(self, buffers: Sequence[Tensor | None]) -> None:
        for (table, name), buffer in zip(self._places, buffers, strict=True):
            table[name] = buffer


def _version(buffer: Tensor | None) -> int:
    """Return torch's count of the writes into a buffer."""
    return 0 if buffer is None else buffer._version


def _copy_all(buffers: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return copies. A buffer that is there twice has one copy, there twice."""
    copies: dict[int, Tensor | None] = {id(None): None}
    for buffer in buffers:
        if buffer is not None and id(buffer) not in copies:
            copies[id(buffer)] = buffer.detach().clone()
    return [copies[id(buffer)] for buffer in buffers]

"""Activation checkpointing: only a block's input is saved, and the backward pass runs it again."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def checkpoint_block(block: nn.Module, x: Tensor) -> Tensor:
    """Return block(x), (B, ...). Autograd saves only x until the backward pass.

    The second run draws the same random numbers. It leaves the block's buffers unchanged, so
    running means move once a step. The block gets a copy of x, since its first layer may write in
    place and the second run needs x again. Errors of the block pass through.
    """

    def run_block(x: Tensor) -> Tensor:
        output: Tensor = block(x.clone())
        return output

    def make_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _BufferGuard(block)

    output: Tensor = checkpoint(run_block, x, use_reentrant=False, context_fn=make_contexts)
    return output


class _BufferGuard(AbstractContextManager[None]):
    """Restores a block's buffers at its exit. Every backward pass through the block enters it."""

    def __init__(self, block: nn.Module) -> None:
        self._buffers = [buffer.detach() for buffer in block.buffers()]

    def __enter__(self) -> None:
        self._values = [buffer.clone() for buffer in self._buffers]

    def __exit__(self, *_: object) -> None:
        for buffer, value in zip(self._buffers, self._values, strict=True):
            buffer.copy_(value)

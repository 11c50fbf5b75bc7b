"""Activation checkpointing: keep a block's input, and run the block again when its backward pass comes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """Return block(x), (B, ...), of which autograd holds x alone until the backward pass.

    The second run draws the same random numbers and leaves the block's buffers as they are: running means move once a step.
    The block gets a copy, since its first layer may write in place and the input is needed again.
    """

    def run(x: Tensor) -> Tensor:
        out: Tensor = block(x.clone())
        return out

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _Untouched(block)

    out: Tensor = checkpoint(run, x, use_reentrant=False, context_fn=contexts)
    return out


class _Untouched(AbstractContextManager[None]):
    """Puts a block's buffers back; entered again by every backward pass that comes through."""

    def __init__(self, block: nn.Module) -> None:
        self._buffers = [buffer.detach() for buffer in block.buffers()]

    def __enter__(self) -> None:
        self._before = [buffer.clone() for buffer in self._buffers]

    def __exit__(self, *_: object) -> None:
        for buffer, value in zip(self._buffers, self._before, strict=True):
            buffer.copy_(value)

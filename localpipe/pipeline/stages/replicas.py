"""The replicas of one stage: data parallelism inside a stage. Each holds its rows of every batch.

Every replica's loss is the mean over its own rows, and its gradient is weighted by its share of the batch, so that the sum
over replicas is the gradient of the whole batch's mean loss. Whatever a collective puts into a loss keeps to this
convention: what flows back is divided by the share that will weigh it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from localpipe.pipeline.channels.channel import guard
from localpipe.pipeline.channels.message import replica_rows


class Replicas:
    """One replica of a stage among `count`; alone, every method is the identity.

    `tensors` and `words` are process groups of the replicas in their order, for what lies on the device and on the host;
    `waiting` marks the time spent on the others.
    """

    def __init__(
        self,
        index: int = 0,
        count: int = 1,
        tensors: Any = None,
        words: Any = None,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.index, self.count = index, count
        self._tensors, self._words, self._waiting = tensors, words, waiting
        self._rows = 0  # of the message at hand, over all replicas
        self._shares: dict[tuple[int, torch.device], Tensor] = {}
        self._behind: Any = None  # an event behind the last collective on a GPU

    def begin(self, rows: int) -> None:
        """Say how many rows the message at hand has over all replicas."""
        self._rows = rows

    def share(self) -> float:
        """Return this replica's share of the message at hand."""
        return self._own(self.index) / self._rows if self.count > 1 else 1.0

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Add the gradients of all replicas in one flat all-reduce.

        Which gradients exist follows from the configuration, the same in every replica.
        """
        if self.count == 1:
            return
        present = [p.grad for p in parameters if p.grad is not None]
        if not present:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in present])
        self.sum_(flat)
        places = flat.split([gradient.numel() for gradient in present])
        for gradient, place in zip(present, places, strict=True):
            gradient.copy_(place.view_as(gradient))

    def sum_(self, tensor: Tensor) -> None:
        """Add a tensor over all replicas, in place; every replica ends with the same bits."""
        self._together(lambda: self._tensors.allreduce([tensor]))
        self._mark(tensor)

    def shares(self, device: torch.device) -> Tensor:
        """Return every replica's share of the message at hand, (replicas,), fp32. The few there are stay on the device."""
        key = self._rows, device
        if key not in self._shares:
            values = (
                [self._own(index) / self._rows for index in range(self.count)]
                if self.count > 1
                else [1.0]
            )
            self._shares[key] = torch.tensor(values, device=device)
        return self._shares[key]

    def stacked(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all replicas, (replicas, *shape), differentiable."""
        if self.count == 1:
            return tensor[None]
        rows = [
            tensor if index == self.index else torch.zeros_like(tensor)
            for index in range(self.count)
        ]
        out: Tensor = _Sum.apply(torch.stack(rows), self, self.share())
        return out

    def gathered(self, tensor: Tensor) -> Tensor:
        """Return the rows of all replicas in their order, differentiable, twice where need be. tensor: (own rows, ...)."""
        if self.count == 1:
            return tensor
        if not tensor.requires_grad:
            return self.gather(tensor)
        mine, others = self.rows(), [0, 0] * (tensor.dim() - 1)
        padded = F.pad(tensor, [*others, mine.start, self._rows - mine.stop])
        out: Tensor = _Sum.apply(padded, self, self.share())
        return out

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the rows of all replicas without gradient. Replicas differ by a row at most, which is padded."""
        most = max(self._own(index) for index in range(self.count))
        padded = tensor.new_zeros((most, *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in range(self.count)]
        self._together(lambda: self._tensors.allgather([parts], [padded]))
        self._mark(padded)
        return torch.cat([part[: self._own(index)] for index, part in enumerate(parts)])

    def first_says(self, word: int) -> int:
        """Return the first replica's word."""
        if self.count == 1:
            return word
        told = torch.tensor([word])
        self._together(lambda: self._words.broadcast(told, 0))
        return int(told)

    def queued(self) -> bool:
        """Return whether a collective is still in the device's queue; asked by the watcher's thread."""
        with suppress(RuntimeError):  # a device that failed is the main thread's to tell
            return self._behind is not None and not self._behind.query()
        return False

    def rows(self) -> slice:
        """Return one's own rows of the message at hand."""
        return replica_rows(self._rows, self.index, self.count)

    def _together(self, collective: Callable[[], Any]) -> None:
        with self._waiting():
            guard("another replica of the stage", lambda: collective().wait())

    def _mark(self, tensor: Tensor) -> None:
        if tensor.is_cuda:
            self._behind = self._behind or torch.cuda.Event()
            self._behind.record()

    def _own(self, index: int) -> int:
        rows = replica_rows(self._rows, index, self.count)
        return int(rows.stop - rows.start)


class _Sum(torch.autograd.Function):
    """The sum over replicas. Every replica's loss depends on it, weighted by its share."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, replicas: Replicas, weight: float) -> Tensor:
        ctx.replicas, ctx.weight = replicas, weight
        out = tensor.detach().clone()
        replicas.sum_(out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        back = _Sum.apply(gradient.contiguous() * ctx.weight, ctx.replicas, ctx.weight)
        return back / ctx.weight, None, None

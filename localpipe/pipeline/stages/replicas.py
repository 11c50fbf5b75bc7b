"""The replicas of one stage: data parallelism inside a stage. Each holds its rows of every batch.

Every replica's loss is the mean over its own rows. Its gradient is weighted by its part of the
batch, so that the sum over replicas is the gradient of the whole batch's mean loss. A collective
inside a loss follows this convention: it divides its gradient by the weight that is applied later.
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
    """One replica of a stage among `count`. With one replica nothing is communicated.

    `device_group` and `host_group` are process groups of the replicas in their order, for tensors
    on the device and for numbers on the host. One replica needs none. `mark_waiting` makes the
    context of every collective, which marks the time as waiting.

    Every replica must call the collectives in the same order, with equal shapes and dtypes. They
    raise NeighbourLostError if another replica is lost.
    """

    def __init__(
        self,
        index: int = 0,
        count: int = 1,
        device_group: Any = None,
        host_group: Any = None,
        mark_waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.index = index
        self.count = count
        self._device_group = device_group
        self._host_group = host_group
        self._mark_waiting = mark_waiting
        self._total_rows = 0  # of the current message, over all replicas
        self._weights: dict[tuple[int, torch.device], Tensor] = {}
        self._last_collective: Any = None  # an event after the last collective on a GPU

    def begin_message(self, total_rows: int) -> None:
        """Set the number of rows that the current message has over all replicas.

        With several replicas, call it before `weight`, `weights`, `stack` and `gathered`.
        """
        self._total_rows = total_rows

    def weight(self) -> float:
        """Return this replica's part of the current message's rows, 0..1. One replica has 1.0.

        Raises ZeroDivisionError with several replicas before `begin_message`.
        """
        return self._weight_of(self.index)

    def weights(self, device: torch.device) -> Tensor:
        """Return every replica's part of the current message's rows, (replicas,), fp32.

        The few different results stay on the device and are returned again, so do not change them.
        Raises ZeroDivisionError with several replicas before `begin_message`.
        """
        key = self._total_rows, device
        if key not in self._weights:
            weights = [self._weight_of(index) for index in range(self.count)]
            self._weights[key] = torch.tensor(weights, device=device)
        return self._weights[key]

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Add the gradients of all replicas into `grad`, in place, in one flat all-reduce.

        Parameters whose grad is None are left out. Which gradients exist depends on the
        configuration only, so every replica has the same. With one replica it does nothing.
        """
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self.sum_(flat)
        sums = flat.split([gradient.numel() for gradient in gradients])
        for gradient, total in zip(gradients, sums, strict=True):
            gradient.copy_(total.view_as(gradient))

    def sum_(self, tensor: Tensor) -> None:
        """Add a tensor over all replicas, in place. Every replica gets the same bits.

        It is for several replicas: without a device group it raises AttributeError.
        """
        self._run_collective(lambda: self._device_group.allreduce([tensor]))
        self._record_collective(tensor)

    def stack(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all replicas, (replicas, *shape), differentiable, also twice.

        One replica gets tensor[None], without a copy.
        """
        if self.count == 1:
            return tensor[None]
        rows = [torch.zeros_like(tensor)] * self.count
        rows[self.index] = tensor
        output: Tensor = _ReplicaSum.apply(torch.stack(rows), self, self.weight())
        return output

    def gathered(self, tensor: Tensor) -> Tensor:
        """Return the rows of all replicas in their order, (total rows, ...).

        Differentiable, also twice. tensor: (own rows, ...), with this replica's rows of the current
        message. It requires grad on all replicas or on none. One replica gets the same tensor back.
        """
        if self.count == 1:
            return tensor
        if not tensor.requires_grad:
            return self._gather_rows(tensor)
        rows = self._rows_of(self.index)
        no_padding = [0, 0] * (tensor.dim() - 1)
        padded = F.pad(tensor, [*no_padding, rows.start, self._total_rows - rows.stop])
        output: Tensor = _ReplicaSum.apply(padded, self, self.weight())
        return output

    def broadcast_first(self, number: int) -> int:
        """Return the first replica's number, in every replica. It is an int64.

        One replica gets its own back.
        """
        if self.count == 1:
            return number
        tensor = torch.tensor([number])
        self._run_collective(lambda: self._host_group.broadcast(tensor, 0))
        return int(tensor)

    def has_pending_collective(self) -> bool:
        """Return whether a collective is still in the device's queue. On the CPU it is False.

        The watchdog's thread calls it. It never raises for a failed device, but returns False.
        """
        # The main thread reports a failed device.
        with suppress(RuntimeError):
            return self._last_collective is not None and not self._last_collective.query()
        return False

    def _gather_rows(self, tensor: Tensor) -> Tensor:
        """Return the rows of all replicas without gradient.

        The numbers of rows differ by one at most. The shorter tensors are padded.
        """
        counts = [self._count_rows(index) for index in range(self.count)]
        padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        parts = [torch.empty_like(padded) for _ in counts]
        self._run_collective(lambda: self._device_group.allgather([parts], [padded]))
        self._record_collective(padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def _run_collective(self, start: Callable[[], Any]) -> None:
        with self._mark_waiting():
            guard("another replica of the stage", lambda: start().wait())

    def _record_collective(self, tensor: Tensor) -> None:
        if tensor.is_cuda:
            self._last_collective = self._last_collective or torch.cuda.Event()
            self._last_collective.record()

    def _rows_of(self, index: int) -> slice:
        return replica_rows(self._total_rows, index, self.count)

    def _count_rows(self, index: int) -> int:
        rows = self._rows_of(index)
        return int(rows.stop - rows.start)

    def _weight_of(self, index: int) -> float:
        if self.count == 1:
            return 1.0
        return self._count_rows(index) / self._total_rows


class _ReplicaSum(torch.autograd.Function):
    """The sum over replicas. Every replica's loss depends on it, by the replica's weight."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, replicas: Replicas, weight: float) -> Tensor:
        ctx.replicas = replicas
        ctx.weight = weight
        output = tensor.detach().clone()
        replicas.sum_(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weighted = gradients[0].contiguous() * ctx.weight
        total = _ReplicaSum.apply(weighted, ctx.replicas, ctx.weight)
        return total / ctx.weight, None, None

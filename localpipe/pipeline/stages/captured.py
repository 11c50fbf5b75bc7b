"""A stage's step with few kernel launches: two CUDA graphs, or its networks through torch.compile.

    forward ── h ──▶ (send) ── loss, backward, update
    graph 1                    graph 2

A step depends on nothing but its message, so all of it can be captured. Batches of another size and
evaluations run eagerly, on the same weights. Captured runs give one result for any number of
processes, and so do eager runs. The two results may differ.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from localpipe.config.resolved import Resolved
from localpipe.pipeline.channels.message import Kind, Message
from localpipe.pipeline.channels.streams import take_stream
from localpipe.pipeline.stages.blocks import Activation
from localpipe.pipeline.stages.optimizer import set_rate
from localpipe.pipeline.stages.stage import Stage

_WARM_UP = 3  # steps that are undone: libraries choose kernels and allocate in their first


def stage_class(config: Resolved) -> type[Stage]:
    """Return the class of the stages that a configuration trains with, by `run.capture`.

    `none`: Stage, `graphs`: CapturedStage, `compile`: CompiledStage.
    """
    return {"none": Stage, "graphs": CapturedStage, "compile": CompiledStage}[config.run.capture]


class CompiledStage(Stage):
    """A stage whose blocks and objective are compiled, for full training batches.

    A batch is full if it has as many rows as the plan's received schema. Evaluations and shorter
    batches run eagerly.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._compiled_blocks: Callable[..., Activation] = torch.compile(self.blocks, dynamic=False)
        self._compiled_objective: Callable[..., Tensor] = torch.compile(
            self.objective, dynamic=False
        )

    def _run_blocks(
        self, x: Tensor, companions: tuple[Tensor, ...], is_training: bool
    ) -> Activation:
        if is_training and self._is_full(x):
            return self._compiled_blocks(x, *companions)
        return super()._run_blocks(x, companions, is_training)

    def _run_objective(self, h: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        if self._is_full(h):
            return self._compiled_objective(h, dict(fields))
        return super()._run_objective(h, fields)

    def _is_full(self, x: Tensor) -> bool:
        return len(x) == self.plan.receives.batch


@dataclass(frozen=True)
class _Graphs:
    """Two graphs and the tensors they read and write, at fixed addresses."""

    message: Message
    forward: torch.cuda.CUDAGraph
    h: Tensor
    merged: Tensor | None
    companions: tuple[Tensor, ...]
    update: torch.cuda.CUDAGraph
    loss: Tensor


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of warm-ups and captures, which the stages of a process do in turn."""
    return take_stream(device)


class CapturedStage(Stage):
    """A stage whose full training batches replay two CUDA graphs.

    For a CUDA device, one replica and one message a step, without reconciliation. The three calls
    `forward`, `local_loss` and `update` stay, in the same order. A state must be loaded before the
    first full training batch, because the graphs keep the addresses of the optimizer's tensors.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._graphs: _Graphs | None = None
        # The graphs of the current message, or None where it runs eagerly.
        self._active_graphs: _Graphs | None = None

    def forward(self, message: Message) -> Tensor:
        """Return h of a message. A training message with the full number of rows replays a graph.

        The first such message captures both graphs before, at the cost of some undone steps. Its h
        is then detached and lies in fixed memory. The next replay overwrites it. Any other message
        runs eagerly, as in `Stage`.
        """
        header = message.header
        if header.kind is not Kind.TRAIN or header.count != self.plan.receives.batch:
            self._active_graphs = None
            return super().forward(message)
        if self._graphs is None:
            self._graphs = self._capture(message)
        graphs = self._active_graphs = self._graphs
        for name, tensor in graphs.message.fields.items():
            tensor.copy_(message.fields[name], non_blocking=True)
        self.boundary = self._boundaries[True]
        self._seed_random_stream(header)
        graphs.forward.replay()
        self.boundary.merged, self.companions = graphs.merged, graphs.companions
        return graphs.h

    def local_loss(self, message: Message, h: Tensor) -> Tensor:
        """Return the tensor that holds the loss after the update, detached.

        Its value is stale before the update. The next replay overwrites it. After an eager
        `forward` it is the loss of `Stage`, with its graph.
        """
        if self._active_graphs is None:
            return super().local_loss(message, h)
        return self._active_graphs.loss

    def update(self, loss: Tensor, message: Message, rate: float) -> None:
        """Replay loss, backward pass and update, at `rate`. `loss` and `message` are not read.

        After an eager `forward` it is the update of `Stage`.
        """
        if self._active_graphs is None:
            super().update(loss, message, rate)
            return
        if self.optimizer is not None:
            set_rate(self.optimizer, rate)
        self._active_graphs.update.replay()

    def _capture(self, message: Message) -> _Graphs:
        """Capture both graphs in one memory pool.

        Weights, buffers and optimizer state end as they were before.
        """
        self._set_mode(True)
        fields = {name: tensor.clone() for name, tensor in message.fields.items()}
        static_message = Message(message.header, fields)
        self._warm_up(static_message)
        pool = torch.cuda.graph_pool_handle()
        forward, update = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Other threads of the process, a loader or a watchdog, may call CUDA meanwhile.
        capture = partial(
            torch.cuda.graph,
            pool=pool,
            stream=_capture_stream(self.device),
            capture_error_mode="thread_local",
        )
        with capture(forward):
            h = self._compute(static_message, True)
        with capture(update):
            loss = self._run_update(static_message, h)
        # Detached, so that no node of the captured backward pass outlives it: eager steps make
        # their own.
        merged = self.boundary.merged
        companions = tuple(tensor.detach() for tensor in self.companions)
        return _Graphs(
            static_message, forward, h.detach(), merged, companions, update, loss.detach()
        )

    def _run_update(self, message: Message, h: Tensor) -> Tensor:
        loss = super().local_loss(message, h)
        if self._update is not None:
            self._scale_loss(loss).backward()
            self._update.run(self._scaler)
        return loss

    def _warm_up(self, message: Message) -> None:
        """Run a few steps on another stream, as CUDA's capture requires, and undo them."""
        buffer = io.BytesIO()
        torch.save(self.state(), buffer)
        stream = _capture_stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._clear_gradients()
                self._run_update(message, self._compute(message, True))
        torch.cuda.current_stream().wait_stream(stream)
        self._clear_gradients()
        buffer.seek(0)
        self._restore_state(torch.load(buffer, map_location="cpu", weights_only=True))

    def _restore_state(self, state: Mapping[str, Any]) -> None:
        optimizer_state = self.optimizer.state if self.optimizer is not None else {}
        if optimizer_state and not state["optimizer"]["state"]:
            # Before a first step: the optimizer's state exists already, and must be zero.
            for tensors in optimizer_state.values():
                for tensor in tensors.values():
                    if isinstance(tensor, Tensor):
                        tensor.zero_()
            state = {
                **state,
                "optimizer": self.optimizer.state_dict() if self.optimizer is not None else None,
            }
        self.load_state(state)

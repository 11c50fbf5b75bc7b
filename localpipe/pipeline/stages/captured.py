"""A stage's step without its launches: two CUDA graphs of eager code, or its networks through torch.compile.

    forward ── h ──▶ (send) ── loss, backward, update
    graph 1                    graph 2

A step depends on nothing but its message, so all of it can be captured. Batches of another size and evaluations run eagerly,
on the same weights. Captured and eager runs each are one result for any number of processes, and need not be the same one.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from localpipe.config.resolved import Resolved
from localpipe.pipeline.channels.message import Kind, Message
from localpipe.pipeline.stages.optimizer import set_rate
from localpipe.pipeline.stages.stage import Stage

_WARM_UP = 3  # steps that are taken back: libraries choose kernels and allocate in their first


def stage_class(config: Resolved) -> type[Stage]:
    """Return the class of the stages that a configuration trains with."""
    return {"none": Stage, "graphs": CapturedStage, "compile": CompiledStage}[config.run.capture]


class CompiledStage(Stage):
    """A stage whose blocks and objective are compiled, for full training batches."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._compiled_blocks: Callable[..., Tensor] = torch.compile(self.blocks, dynamic=False)
        self._compiled_objective: Callable[..., Tensor] = torch.compile(
            self.objective, dynamic=False
        )

    def _through(self, x: Tensor, training: bool) -> Tensor:
        return (
            self._compiled_blocks(x)
            if training and self._is_full(x)
            else super()._through(x, training)
        )

    def _loss(self, h: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        return (
            self._compiled_objective(h, dict(fields))
            if self._is_full(h)
            else super()._loss(h, fields)
        )

    def _is_full(self, x: Tensor) -> bool:
        return len(x) == self.plan.receives.batch


@dataclass(frozen=True)
class _Graphs:
    """Two graphs and the tensors they read and write, at fixed addresses."""

    message: Message
    forward: torch.cuda.CUDAGraph
    h: Tensor
    merged: Tensor | None
    update: torch.cuda.CUDAGraph
    loss: Tensor


class CapturedStage(Stage):
    """A stage whose full training batches replay two CUDA graphs; the same three calls, in the same order."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._graphs: _Graphs | None = None
        self._replayed: _Graphs | None = (
            None  # what this message goes through, None where it runs eagerly
        )

    def forward(self, message: Message) -> Tensor:
        """Copy a message in and replay the forward pass; the first one captures."""
        header = message.header
        if header.kind is not Kind.TRAIN or header.count != self.plan.receives.batch:
            self._replayed = None
            return super().forward(message)
        if self._graphs is None:
            self._graphs = self._captured(message)
        graphs = self._replayed = self._graphs
        for name, tensor in graphs.message.fields.items():
            tensor.copy_(message.fields[name], non_blocking=True)
        self._seed(header)
        graphs.forward.replay()
        self._merged = graphs.merged
        return graphs.h

    def local_loss(self, message: Message, h: Tensor) -> Tensor:
        """Return where the loss will be behind the update."""
        return super().local_loss(message, h) if self._replayed is None else self._replayed.loss

    def update(self, loss: Tensor, message: Message, rate: float) -> None:
        """Replay loss, backward pass and update."""
        if self._replayed is None:
            super().update(loss, message, rate)
            return
        if self.optimizer is not None:
            set_rate(self.optimizer, rate)
        self._replayed.update.replay()

    def _captured(self, message: Message) -> _Graphs:
        """Capture both graphs in one memory pool; weights, buffers and optimizer are then as they were."""
        self._set_mode(True)
        held = Message(
            message.header, {name: tensor.clone() for name, tensor in message.fields.items()}
        )
        self._warm_up(held)
        pool = torch.cuda.graph_pool_handle()
        forward, update = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Other threads of the process, a loader or a watchdog, may call CUDA meanwhile.
        with torch.cuda.graph(forward, pool=pool, capture_error_mode="thread_local"):
            h = self._compute(held, True)
        with torch.cuda.graph(update, pool=pool, capture_error_mode="thread_local"):
            loss = self._learn(held, h)
        # Detached, so that no node of the captured backward pass outlives it: eager steps make their own.
        return _Graphs(held, forward, h.detach(), self._merged, update, loss.detach())

    def _learn(self, message: Message, h: Tensor) -> Tensor:
        loss = super().local_loss(message, h)
        if self.optimizer is not None:
            self._scaled(loss).backward()
            self._step(self.optimizer)
        return loss

    def _warm_up(self, message: Message) -> None:
        """Run a few steps on another stream, as CUDA's capture asks for, and take them back."""
        before = io.BytesIO()
        torch.save(self.state(), before)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._forget_gradients()
                self._learn(message, self._compute(message, True))
        torch.cuda.current_stream().wait_stream(side)
        self._forget_gradients()
        before.seek(0)
        self._take_back(torch.load(before, map_location="cpu", weights_only=True))

    def _take_back(self, state: Mapping[str, Any]) -> None:
        made = self.optimizer.state if self.optimizer is not None else {}
        if (
            made and not state["optimizer"]["state"]
        ):  # a first step: what it would make is there already, and zero
            for tensors in made.values():
                for tensor in tensors.values():
                    if isinstance(tensor, Tensor):
                        tensor.zero_()
            state = {
                **state,
                "optimizer": self.optimizer.state_dict() if self.optimizer is not None else None,
            }
        self.load_state(state)

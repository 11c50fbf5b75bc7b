"""What a system of the benchmark is, and what all of them share: the batches, the entry, the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from localpipe import data
from localpipe.config.resolved import Resolved
from localpipe.data.dataset import epoch_order
from localpipe.networks.blueprint import Blueprint
from localpipe.pipeline.channels.channel import Inbox
from localpipe.pipeline.channels.message import Header
from localpipe.pipeline.stages.boundary import Normalise
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from localpipe.pipeline.stages.precision import autocast_context
from localpipe.pipeline.stages.stage_plan import build_blueprint
from localpipe.pipeline.workers.device import Upload
from localpipe.pipeline.workers.phase import SpanKeeper
from localpipe.pipeline.workers.source import BatchSource
from localpipe.pipeline.workers.steps import StepSchedule

_ENDLESS = 10**6  # epochs
CPU = torch.device("cpu")
Cut = tuple[tuple[int, int], ...]  # (first, last) block of every stage


@dataclass(frozen=True)
class SystemRequest:
    """What the launcher asks of a system: its name, and for a pipeline of micro-batches how many and the cut."""

    system: str
    micro_batches: int | None = None
    cut: Cut | None = None

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> SystemRequest:
        cut = values["cut"]
        return SystemRequest(
            values["system"],
            values["micro_batches"],
            cut and tuple((first, last) for first, last in cut),
        )


class System(Protocol):
    """One worker's part of a system. Every worker of it steps at the same time."""

    clock: StepTimer

    def warm(self) -> None:
        """Step until kernels, caches and queues are filled."""

    def step(self) -> None:
        """Train on one batch of the whole system's size."""

    def weights(self) -> dict[str, Tensor]:
        """Return the parameters and buffers that this worker trains, under their names in the whole network."""

    def close(self) -> None:
        """Let go of groups and threads."""


class StepTimer:
    """Seconds of the steps since it was last read, by what they were spent on.

    None where a system cannot tell, as the host of a GPU; `receive` of a system that cannot tell receiving from sending holds
    both.
    """

    def __init__(self, device: torch.device = CPU) -> None:
        zero = 0.0 if device.type == "cpu" else None
        self.busy, self.receive, self.send = zero, zero, zero
        self._cpu = time.process_time()
        self._trace: SpanKeeper | None = None
        self._step = 0

    def read(self) -> dict[str, float | None]:
        """Return the seconds and start again; `cpu` is what the process's threads used together."""
        now = time.process_time()
        spent = {
            "busy": self.busy,
            "receive": self.receive,
            "send": self.send,
            "cpu": now - self._cpu,
        }
        self._cpu = now
        self.busy, self.receive, self.send = (
            None if s is None else 0.0 for s in (self.busy, self.receive, self.send)
        )
        return spent

    def trace(self, trace: SpanKeeper | None) -> None:
        """Keep the spans of the steps from now on, or stop it."""
        self._trace, self._step = trace, 0

    def begin_step(self) -> None:
        """Number the spans that follow."""
        self._step += 1

    def work(
        self, call: Callable[..., Any], stage: int = 0, phase: str = "update"
    ) -> Callable[..., Any]:
        """Return the call with its time counted as busy, and kept as a stage's phase where a timeline is asked for."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.monotonic()
            result = call(*args, **kwargs)
            end = time.monotonic()
            if self.busy is not None:
                self.busy += end - begin
            if self._trace is not None:
                self._trace.add(stage, phase, self._step, begin, end)
            return result

        return timed


class Batches:
    """The batches that localpipe's first stage gets: the same images in the same order, made ahead in a thread.

    share (r, n): rows r*B/n .. (r+1)*B/n of every batch.
    """

    def __init__(
        self, config: Resolved, device: torch.device = CPU, share: tuple[int, int] = (0, 1)
    ) -> None:
        dataset = data.load(config.data, config.run.seed)
        course = endless_schedule(config, len(dataset.train.labels))
        self._schedule = LearningRateSchedule(config.optim, course.steps_per_epoch)
        pinned = device.type == "cuda"
        loader = BatchSource(
            dataset, _shared(course, *share), config.run.seed, float("inf"), pinned=pinned
        )
        self._loader: Inbox = Upload(loader, device) if pinned else loader

    def next(self) -> tuple[Tensor, Tensor, float]:
        """Return uint8 images (B, C, H, W), targets (B,), and the learning rate."""
        message = self._loader.receive()
        return (
            message.fields["image"],
            message.fields["target"],
            self._schedule.rate(message.header.step),
        )


class Targets:
    """The targets of the same batches, for a worker that needs no images."""

    def __init__(self, config: Resolved, device: torch.device = CPU) -> None:
        self._device = device
        dataset = data.load(config.data, config.run.seed)
        self._labels, self._seed = dataset.train.labels, config.run.seed
        course = endless_schedule(config, len(self._labels))
        self._rows = course.headers(0)
        self._schedule = LearningRateSchedule(config.optim, course.steps_per_epoch)
        self._epoch = 0

    def next(self) -> tuple[Tensor, float]:
        """Return targets (B,) and the learning rate."""
        header, rows = next(self._rows)
        if header.epoch != self._epoch:
            self._epoch = header.epoch
            self._order = epoch_order(len(self._labels), self._seed, header.epoch)
        target = torch.from_numpy(self._labels[self._order[rows]]).to(self._device)
        return target, self._schedule.rate(header.step)


def endless_schedule(config: Resolved, train_size: int) -> StepSchedule:
    """Return an endless course of whole batches."""
    return StepSchedule(train_size, 0, config.data.batch_size, _ENDLESS, drop_last=True)


def _shared(course: StepSchedule, part: int, parts: int) -> Iterator[tuple[Header, slice]]:
    size = course.batch // parts
    for header, rows in course.headers(0):
        first = rows.start + part * size
        yield replace(header, count=size), slice(first, first + size)


class Part(nn.Module):
    """Consecutive blocks of the whole network with the weights that localpipe gives them, the tail behind the last.

    Takes and gives contiguous fp32 tensors, and computes in the configuration's precision and memory format. With more than
    one of `segments` (Chen et al. 2016, arXiv 1604.06174) only what enters a segment is kept for the backward pass, which
    computes the rest again; batch normalisation counts such a batch twice in its running statistics.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        first: int,
        last: int,
        config: Resolved,
        device: torch.device = CPU,
    ) -> None:
        super().__init__()
        tail = [len(blueprint.blocks)] if last == len(blueprint.blocks) - 1 else []
        wanted = [*range(first, last + 1), *tail]
        meta = device.type == "meta"
        self.blocks = nn.Sequential(
            *(blueprint.build_meta(wanted) if meta else blueprint.build(wanted, config.run.seed))
        )
        self.segments, self.reentrant = 1, False
        self._prefixes = [blueprint.parts[i].prefix for i in wanted]
        self._arithmetic = autocast_context(config, device)
        self._device = device
        self._format = torch.channels_last if config.run.channels_last else torch.contiguous_format
        self.to(device, memory_format=self._format)  # type: ignore[call-overload]  # four-dimensional weights only
        self._copies = False

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone() if self._copies else x
        with self._arithmetic():
            x = x.contiguous(memory_format=self._format) if x.dim() == 4 else x
            h: Tensor = self._checkpointed(x) if self.segments > 1 else self.blocks(x)
        return h.float().contiguous()

    def _checkpointed(self, x: Tensor) -> Tensor:
        keeps = not self.reentrant  # the random state, which plans on the meta device have none of
        h: Tensor = checkpoint_sequential(
            self.blocks, self.segments, x, use_reentrant=self.reentrant, preserve_rng_state=keeps
        )
        return h

    def spare_input(self, shape: tuple[int, ...]) -> None:
        """Copy what comes in from now on, if the first block writes in place: a peer's input is a leaf of autograd."""
        leaf = torch.zeros(2, *shape, device=self._device, requires_grad=True)
        try:
            self.blocks[0].eval()(leaf)
        except RuntimeError as error:
            if "in-place" not in str(error):
                raise
            self._copies = True
        finally:
            self.blocks[0].train()

    def weights(self) -> dict[str, Tensor]:
        """Return parameters and buffers under their names in the whole network."""
        named: dict[str, Tensor] = {}
        for prefix, block in zip(self._prefixes, self.blocks, strict=True):
            named.update({prefix + name: value for name, value in block.state_dict().items()})
        return named


def build_entry(config: Resolved) -> Normalise:
    """Return the layer that turns uint8 images into what the first block sees."""
    return Normalise(config.data.mean, config.data.std)


def network_of(config: Resolved) -> Blueprint:
    """Return the blueprint of a resolved configuration."""
    return build_blueprint(config)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next update."""
    for group in optimizer.param_groups:
        group["lr"] = rate

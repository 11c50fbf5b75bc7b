"""A process that measures a profile; all of them time the same piece at the same time. `profile.measure` starts it."""

from __future__ import annotations

import itertools
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from localpipe.config.load import parse_resolved, update
from localpipe.config.resolved import Resolved
from localpipe.fields import Field
from localpipe.pipeline.channels.message import Header, Kind, Message
from localpipe.pipeline.launch.process import prepare_process
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from localpipe.pipeline.stages.optimizer import build_optimizer
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_blueprint
from localpipe.pipeline.workers.device import device_time_s, select_device
from localpipe.pipeline.workers.loop import RunnerContext, StageRunner
from localpipe.pipeline.workers.mesh import Mesh, join_mesh
from localpipe.pipeline.workers.phase import PhaseTimer
from localpipe.plan.pieces import Pieces
from localpipe.plan.profile import PROFILE_KEY, REQUEST_KEY, Profile, profile_facts

BUDGET_S = 1.5  # of one piece, once it has run `_LEAST` times
_LEAST, _MOST, _WARM_UP = 5, 50, 2
_COPIED_BYTES = 2**23
_EVICTING_BYTES = 2**23  # more than a core's own cache
Step = Callable[[], float]  # one step of a piece; returns its seconds


def main() -> int:
    """Measure with the others; the first one leaves the profile in the store."""
    place = join_mesh()
    asked = json.loads(place.store.get(REQUEST_KEY))
    config = parse_resolved(asked["config"], "resolved configuration")
    prepare_process(config)
    select_device(config.run.device, place.local_rank)
    found = _profile(place, config, asked["stage_counts"])
    if place.rank == 0:
        place.store.set(PROFILE_KEY, found.to_json())
    place.barrier("end")
    os._exit(0)


class PieceTimer:
    """Times pieces, each once, together with the other processes."""

    def __init__(self, place: Mesh) -> None:
        self._place = place
        self._known: dict[str, float] = {}

    def time(self, key: str, make: Callable[[], Step]) -> float:
        """Return the median seconds of the step that `make` returns, the mean over all processes."""
        if key not in self._known:
            step, place = make(), self._place
            for _ in range(_WARM_UP):
                step()
            name = f"piece/{len(self._known)}"
            place.barrier(name)
            place.store.set(f"{name}/{place.rank}", str(statistics.median(_repeated(step))))
            place.barrier(f"{name}/timed")
            times = [float(place.store.get(f"{name}/{rank}")) for rank in range(place.world)]
            self._known[key] = statistics.mean(times)
        return self._known[key]


def _repeated(step: Step) -> list[float]:
    """Return the seconds of each of some repeats, within the budget: all processes stop at about the same time."""
    times: list[float] = []
    large = torch.zeros(_EVICTING_BYTES, dtype=torch.uint8)
    began = device_time_s()
    while len(times) < _LEAST or (len(times) < _MOST and device_time_s() - began < BUDGET_S):
        large.zero_()  # caches as a piece finds them in a stage, where others have used them since
        times.append(step())
    return times


def _profile(place: Mesh, config: Resolved, stage_counts: list[int]) -> Profile:
    steps, clock = PieceSteps(config, config.run.device), PieceTimer(place)
    pieces = steps.whole
    blocks = pieces.blocks
    unmeasured = float("nan")

    def lead(stage: int, first: int) -> float:
        if (stage == 0) != (first == 0) or stage > first:
            return unmeasured
        return clock.time(pieces.lead_key(stage, first), lambda: steps.lead(stage, first))

    def block(index: int) -> float:
        if index == 0:
            return unmeasured
        return clock.time(pieces.block_key(index), lambda: steps.block(index))

    def loss(stage: int, stages: int, last: int) -> float:
        if not stage <= last <= blocks - stages + stage:
            return unmeasured
        return clock.time(
            pieces.loss_key(stage, stages, last), lambda: steps.loss(stage, stages, last)
        )

    deepest = max(stage_counts)
    values: dict[str, Any] = {
        **profile_facts(config),
        "blocks": [part.name for part in pieces.blueprint.blocks],
        "image": pieces.blueprint.image,
        "torch": torch.__version__,
        "workers": place.world,
        "lead_s": [[lead(stage, first) for first in range(blocks)] for stage in range(deepest)],
        "block_s": [block(index) for index in range(blocks)],
        "loss_s": {
            str(count): [
                [loss(stage, count, last) for last in range(blocks)] for stage in range(count - 1)
            ]
            for count in stage_counts
        },
        "tail_s": clock.time(
            "tail", lambda: steps.loss(min(1, blocks - 1), min(2, blocks), blocks - 1)
        ),
        "copy_s_per_byte": clock.time("copy", lambda: _copy(config.run.device)) / _COPIED_BYTES,
        "turn_s": clock.time("turn", steps.turn),
    }
    return Profile.from_json(json.dumps(values))


class PieceSteps:
    """Makes the step of each kind of piece. Stages are built without reconciliation; `twice` goes back as it does."""

    def __init__(self, config: Resolved, device: str) -> None:
        self._optim, self._device = config.optim, device
        self._twice = config.reconciles
        plain = update(config, {"method.reconcile": {"distance": "none"}})
        self.whole = Pieces(build_blueprint(config), config)
        self._leads = Pieces(self.whole.blueprint, plain)
        alone = update(plain, {"method.context": {"mode": "none"}})
        self._blocks = Pieces(self.whole.blueprint, alone)

    def lead(self, stage: int, first: int) -> Step:
        """Return the step of a stage's entry and first block, under a gradient that comes from above."""
        return self._step(
            self._leads.lead(stage, first, self._device), self._twice and stage > 0, self._twice
        )

    def block(self, index: int) -> Step:
        """Return the step of a block behind another one of its stage: its input's gradient is asked for."""
        return self._step(self._blocks.lead(1, index, self._device), True, self._twice)

    def loss(self, stage: int, stages: int, last: int) -> Step:
        """Return the step of a local loss, or of the network's own head, down to the stage's raw output."""
        place = self.whole.loss(stage, stages, last, self._device)
        message, twice = make_message(place), self._twice and stage > 0
        h = torch.randn(place.plan.receives.batch, *place.plan.output_shape, device=self._device)
        optimizer = build_optimizer(self._optim, place.objective.parameters())

        def step() -> float:
            leaf = h.detach().requires_grad_()
            begin = device_time_s()
            loss = place.local_loss(message, leaf)
            if place.sends_gradient:
                place.boundary_gradient(loss, leaf)
            _propagate(loss, leaf, torch.ones_like(loss), twice)
            _update(optimizer)
            return device_time_s() - begin

        return step

    def turn(self) -> Step:
        """Return the step of what a worker does around a stage's computing: take a message, keep its books."""
        stage, pulse = self.whole.lead(0, 0, self._device), PhaseTimer()
        tools = RunnerContext(
            LearningRateSchedule(self._optim, steps_per_epoch=1), pulse, None, None
        )
        seat = StageRunner(stage, RepeatedMessage(make_message(stage)), None, tools)

        def step() -> float:
            begin = device_time_s()
            seat.turn()
            return device_time_s() - begin - pulse.compute_s

        return step

    def _step(self, stage: Stage, into: bool, twice: bool) -> Step:
        message, steps = make_message(stage), itertools.count(1)
        modules = [stage.blocks] if stage.adapter is None else [stage.adapter, stage.blocks]
        optimizer = build_optimizer(
            self._optim, [p for module in modules for p in module.parameters()]
        )

        gradient = torch.ones(
            stage.plan.receives.batch, *stage.plan.output_shape, device=self._device
        )

        def step() -> float:
            x = message.fields[stage.plan.input]
            leaf = x.detach().requires_grad_() if into else None
            # A block may write into its input, which no leaf allows; in a stage nobody copies it, so the clock waits.
            came_in = x if leaf is None else leaf.clone()
            header = replace(
                message.header, step=next(steps)
            )  # what is drawn at random is drawn anew
            begin = device_time_s()
            h = stage.forward(Message(header, {**message.fields, stage.plan.input: came_in}))
            _propagate(h, leaf, gradient, twice)
            _update(optimizer)
            return device_time_s() - begin

        return step


class RepeatedMessage:
    """An inbox that gives the same message in every step."""

    def __init__(self, message: Message) -> None:
        self._message, self._steps = message, itertools.count(1)

    def receive(self) -> Message:
        return replace(self._message, header=replace(self._message.header, step=next(self._steps)))


def _classes(config: Resolved) -> int:
    return config.model.num_classes


def _copy(where: str) -> Step:
    source, target = (torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device=where) for _ in range(2))

    def step() -> float:
        begin = device_time_s()
        target.copy_(source)
        return device_time_s() - begin

    return step


def _propagate(output: Tensor, leaf: Tensor | None, gradient: Tensor, twice: bool) -> None:
    """Go back through a piece; twice, as reconciled gradients do."""
    if not output.requires_grad:
        return
    if twice and leaf is not None:
        (first,) = torch.autograd.grad(output, leaf, gradient, create_graph=True)
        if first.requires_grad:
            torch.autograd.backward([output, first], [gradient, torch.ones_like(first)])
            return
    output.backward(gradient)


def _update(optimizer: torch.optim.Optimizer | None) -> None:
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def make_message(stage: Stage) -> Message:
    """Return a training message of the right shapes: noise, a gray image, class 0 and 1."""
    plan = stage.plan
    batch = plan.receives.batch
    return Message(
        Header(Kind.TRAIN, 1, 1, batch),
        {f.name: _filled(f, batch).to(stage.device) for f in plan.receives.fields},
    )


def _filled(field: Field, batch: int) -> Tensor:
    if field.dtype == "float32":
        return torch.randn(batch, *field.shape)
    if field.dtype == "uint8":
        return torch.full((batch, *field.shape), 127, dtype=torch.uint8)
    return (
        torch.arange(batch)
        .remainder(2)
        .view(batch, *[1] * len(field.shape))
        .expand(batch, *field.shape)
        .clone()
    )

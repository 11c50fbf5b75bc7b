"""The process that measures a profile; all of them time the same piece at the same time.

`plan.measure` starts it.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from localpipe.config.load import parse_resolved, update
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.fields import Field
from localpipe.pipeline.channels.message import Header, Kind, Message
from localpipe.pipeline.launch.process import prepare_process
from localpipe.pipeline.stages.batch_norm import TwiceBatchNorm, replace_batch_norms
from localpipe.pipeline.stages.codecs import CODECS
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from localpipe.pipeline.stages.optimizer import Update, build_update
from localpipe.pipeline.stages.probe import Probe
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_blueprint
from localpipe.pipeline.workers.device import device_time_s, select_worker_device
from localpipe.pipeline.workers.loop import RunnerContext, StageRunner
from localpipe.pipeline.workers.mesh import Mesh, join_mesh
from localpipe.pipeline.workers.phase import PhaseTimer
from localpipe.plan.pieces import Pieces
from localpipe.plan.profile import (
    PROFILE_KEY,
    REFUSED_KEY,
    REQUEST_KEY,
    SECONDS,
    Profile,
    profile_facts,
)
from localpipe.tasks.layout import arrange
from localpipe.tasks.task import example_target

BUDGET_S = 1.5  # of one piece, once it has run `_MIN_REPEATS` times
_MIN_REPEATS, _MAX_REPEATS, _WARM_UP_REPEATS = 5, 50, 2
_COPIED_BYTES = 2**23
_CODED_BYTES, _CODED_ROWS = 2**22, 64  # of fp32
_EVICTING_BYTES = 2**23  # more than a core's own cache
_NOT_MEASURED = float("nan")

Step = Callable[[], float]  # runs one step of a piece and returns its seconds


def main() -> int:
    """Measure with the others. Rank 0 leaves the profile in the store. The process ends here.

    A UserError is left in the store, with status 2.
    """
    mesh = join_mesh()
    try:
        _measure(mesh)
    except UserError as error:
        mesh.store.set(REFUSED_KEY, str(error))
        os._exit(2)
    os._exit(0)


def _measure(mesh: Mesh) -> None:
    request = json.loads(mesh.store.get(REQUEST_KEY))
    config = parse_resolved(request["config"], "resolved configuration")
    prepare_process(config, mesh.rank)
    select_worker_device(config, mesh.rank, mesh.local_rank)
    profile = _measure_profile(mesh, config, request["stage_counts"])
    if config.workers_differ:
        profile = _join_profiles(mesh, profile)
    if mesh.rank == 0:
        mesh.store.set(PROFILE_KEY, profile.to_json())
    mesh.barrier("end")


def _join_profiles(mesh: Mesh, profile: Profile) -> Profile:
    """Return the profile with the seconds of every worker in `each`. All workers call it."""
    mesh.store.set(f"{PROFILE_KEY}/{mesh.rank}", profile.to_json())
    seconds_by_rank = []
    for rank in range(mesh.world):
        other = Profile.from_json(mesh.store.get(f"{PROFILE_KEY}/{rank}").decode())
        seconds_by_rank.append({name: getattr(other, name) for name in SECONDS})
    return replace(profile, each=tuple(seconds_by_rank))


class PieceTimer:
    """Times pieces, each once, together with the other processes.

    All processes must time the same keys in the same order, because barriers count the pieces.
    per_process: give each process its own seconds, where workers differ.
    """

    def __init__(self, mesh: Mesh, per_process: bool = False) -> None:
        self._mesh, self._per_process = mesh, per_process
        # A core that another process shares loses whole slices of time, which the median of short
        # steps does not see.
        self._average = statistics.mean if per_process else statistics.median
        self._seconds: dict[str, float] = {}

    def time(self, key: str, make: Callable[[], Step]) -> float:
        """Return the seconds of the step that `make` returns.

        They are the mean over processes of their medians, or the mean of this process's own.

        The step runs 2 times to warm up, then 5 to 50 times within 1.5 s. For a key that was timed
        before, `make` is not called and the first result is returned.
        """
        if key not in self._seconds:
            self._seconds[key] = self._time_together(make())
        return self._seconds[key]

    def _time_together(self, step: Step) -> float:
        for _ in range(_WARM_UP_REPEATS):
            step()
        # Every process starts after the first barrier, and reads all times after the second.
        mesh, name = self._mesh, f"piece/{len(self._seconds)}"
        mesh.barrier(name)
        mesh.store.set(f"{name}/{mesh.rank}", str(self._average(_time_repeats(step))))
        mesh.barrier(f"{name}/timed")
        if self._per_process:
            return float(mesh.store.get(f"{name}/{mesh.rank}"))
        times = [float(mesh.store.get(f"{name}/{rank}")) for rank in range(mesh.world)]
        return statistics.mean(times)


def _time_repeats(step: Step) -> list[float]:
    """Return the seconds of repeated steps within the budget.

    All processes stop at about the same time.
    """
    times: list[float] = []
    large = torch.zeros(_EVICTING_BYTES, dtype=torch.uint8)
    start = device_time_s()
    while len(times) < _MAX_REPEATS:
        if len(times) >= _MIN_REPEATS and device_time_s() - start >= BUDGET_S:
            break
        large.zero_()  # leaves the caches as a piece finds them in a stage, after other pieces
        times.append(step())
    return times


def _measure_profile(mesh: Mesh, config: Resolved, stage_counts: list[int]) -> Profile:
    pieces = _MeasuredPieces(
        PieceSteps(config, config.run.device), PieceTimer(mesh, config.workers_differ)
    )
    blocks = range(pieces.count)

    # Every process measures in this order: the timer's barriers count the pieces.
    lead_s = []
    for stage in range(max(stage_counts)):
        lead_s.append([pieces.lead_s(stage, first) for first in blocks])
    block_s = [pieces.block_s(index) for index in blocks]
    loss_s = {}
    for stages in stage_counts:
        rows = []
        for stage in range(stages - 1):
            rows.append([pieces.loss_s(stage, stages, last) for last in blocks])
        loss_s[str(stages)] = rows

    values: dict[str, Any] = {
        **profile_facts(config),
        "blocks": [part.name for part in pieces.blueprint.blocks],
        "image": pieces.blueprint.sample,
        "torch": torch.__version__,
        "workers": mesh.world,
        "lead_s": lead_s,
        "block_s": block_s,
        "loss_s": loss_s,
        "tail_s": pieces.tail_s(),
        "copy_s_per_byte": pieces.copy_s(config.run.device) / _COPIED_BYTES,
        "turn_s": pieces.turn_s(),
    }
    if config.pipeline.wire_dtype != "fp32":
        encode_s, decode_s = pieces.codec_s(config)
        values["encode_s_per_byte"] = encode_s / _CODED_BYTES
        values["decode_s_per_byte"] = decode_s / _CODED_BYTES
    return Profile.from_json(json.dumps(values))


class _MeasuredPieces:
    """The seconds of every piece of a network; NaN for what cannot be a piece of a stage."""

    def __init__(self, steps: PieceSteps, timer: PieceTimer) -> None:
        self._steps, self._timer, self._pieces = steps, timer, steps.pieces
        self.blueprint, self.count = self._pieces.blueprint, self._pieces.blocks

    def lead_s(self, stage: int, first: int) -> float:
        """Return the seconds of block `first` with the entry of a stage."""
        if (stage == 0) != (first == 0) or stage > first:
            return _NOT_MEASURED
        key = self._pieces.lead_key(stage, first)
        return self._timer.time(key, lambda: self._steps.lead(stage, first))

    def block_s(self, index: int) -> float:
        """Return the seconds of a block after another block of its stage."""
        if index == 0:
            return _NOT_MEASURED
        return self._timer.time(self._pieces.block_key(index), lambda: self._steps.block(index))

    def loss_s(self, stage: int, stages: int, last: int) -> float:
        """Return the seconds of the local loss of a stage after block `last`."""
        if not stage <= last <= self.count - stages + stage:
            return _NOT_MEASURED
        key = self._pieces.loss_key(stage, stages, last)
        return self._timer.time(key, lambda: self._steps.loss(stage, stages, last))

    def tail_s(self) -> float:
        """Return the seconds of the network's own head and loss."""
        last = self.count - 1
        stage, stages = min(1, last), min(2, self.count)
        return self._timer.time("tail", lambda: self._steps.loss(stage, stages, last))

    def copy_s(self, device: str) -> float:
        """Return the seconds of one copy of a large tensor."""
        return self._timer.time("copy", lambda: _make_copy_step(device))

    def codec_s(self, config: Resolved) -> tuple[float, float]:
        """Return the seconds in which the codec encodes and decodes a message."""
        encode, decode = _make_codec_steps(config.pipeline.wire_dtype, config.run.device)
        encode_s = self._timer.time("encode", lambda: encode)
        return encode_s, self._timer.time("decode", lambda: decode)

    def turn_s(self) -> float:
        """Return the seconds of a stage's turn beside computing."""
        return self._timer.time("turn", self._steps.turn)


class PieceSteps:
    """Makes the step of each kind of piece, on the device.

    Every step has a new stage and one message of noise, which it trains on as often as a step has
    messages, before one update. Stages are built without reconciliation. But where the
    configuration reconciles, a step has a double backward pass, as a reconciled stage has.
    """

    def __init__(self, config: Resolved, device: str) -> None:
        self._optim, self._device = config.optim, device
        self._double_backward = config.reconciles
        self._messages = config.optim.accumulate
        self._with_probes = config.run.probe == "linear"
        self.pieces = Pieces(build_blueprint(config), config)
        plain = update(config, {"method.reconcile": {"distance": "none"}})
        without_context = update(plain, {"method.context": {"mode": "none"}})
        self._leads = Pieces(self.pieces.blueprint, plain)
        self._blocks = Pieces(self.pieces.blueprint, without_context)

    def lead(self, stage: int, first: int) -> Step:
        """Return the step of a stage's entry and block `first`, under a gradient at its output.

        It runs forward, backward and update, and returns their seconds.
        """
        piece = self._leads.lead(stage, first, self._device)
        needs_input_gradient = self._double_backward and stage > 0
        return self._make_block_step(piece, needs_input_gradient)

    def block(self, index: int) -> Step:
        """Return the step of a block after another block of its stage.

        index: from 1. It runs forward, backward and update, and returns their seconds.
        """
        piece = self._blocks.lead(1, index, self._device)
        return self._make_block_step(piece, needs_input_gradient=True)

    def loss(self, stage: int, stages: int, last: int) -> Step:
        """Return the step of a local loss, or of the network's own head, down to the raw output.

        It is that of stage `stage` of `stages`, the head for the last one, after block `last`. It
        runs forward, backward and update, and the step of the stage's probe where it has one. It
        returns their seconds.
        """
        piece = self.pieces.loss(stage, stages, last, self._device)
        plan = piece.plan
        message = make_message(piece)
        if plan.is_last and plan.gives.companions:
            # The network's head takes companions, which a forward pass makes.
            piece.forward(message)
            piece.companions = tuple(tensor.detach() for tensor in piece.companions)
        h = _draw_output(piece)
        update = build_update(self._optim, piece.objective.parameters())
        double_backward = self._double_backward and stage > 0
        probe = None
        if self._with_probes:
            shape = plan.gives.standard_shape
            probe = Probe(shape, piece.task, piece.seed, stage, piece.device)

        def step() -> float:
            start = device_time_s()
            for _ in range(self._messages):
                leaf = h.detach().requires_grad_()
                loss = piece.local_loss(message, leaf)
                if piece.sends_gradient:
                    piece.boundary_gradient(loss, leaf)
                _propagate(loss, leaf, torch.ones_like(loss), double_backward)
                if probe is not None:
                    probe.learn(piece.to_standard(h), message.fields["target"])
            _run_update(update)
            return device_time_s() - start

        return step

    def turn(self) -> Step:
        """Return the step of what a worker does around a stage's computing: message and records.

        It trains stage 0 of one block on one message, and returns the turn's seconds without those
        of computing. On a device, which computes after the host has enqueued, these are the
        device's.
        """
        stage = self.pieces.lead(0, 0, self._device)
        schedule = LearningRateSchedule(self._optim, steps_per_epoch=1)
        context = RunnerContext(schedule, PhaseTimer(), None, None)
        runner = StageRunner(stage, RepeatedMessage(make_message(stage)), None, context)

        def step() -> float:
            busy_s = runner.meter.busy_s
            start = device_time_s()
            runner.turn()
            turn_s = device_time_s() - start
            runner.stopwatch.settle()
            return turn_s - (runner.meter.busy_s - busy_s)

        return step

    def _make_block_step(self, stage: Stage, needs_input_gradient: bool) -> Step:
        plan = stage.plan
        message, numbers = make_message(stage), itertools.count(1)
        modules: list[nn.Module] = [stage.blocks]
        if stage.adapter is not None:
            modules.insert(0, stage.adapter)
        double_backward = self._double_backward and needs_input_gradient
        if double_backward:
            for module in modules:
                replace_batch_norms(module, TwiceBatchNorm)
        update = build_update(self._optim, nn.ModuleList(modules).parameters())
        gradient = torch.ones(plan.receives.batch, *plan.output_shape, device=self._device)

        def pass_message() -> float:
            x = message.fields[plan.input]
            leaf = None
            if needs_input_gradient:
                # A block may write into its input, which no leaf allows. In a stage nobody copies
                # it, so the clock starts after this copy.
                leaf = x.detach().requires_grad_()
                x = leaf.clone()
            header = replace(message.header, step=next(numbers))  # a random stream of its own
            start = device_time_s()
            with _attention_context(double_backward):
                h = stage.forward(Message(header, {**message.fields, plan.input: x}))
            _propagate(h, leaf, gradient, double_backward)
            return device_time_s() - start

        def step() -> float:
            passes_s = sum(pass_message() for _ in range(self._messages))
            start = device_time_s()
            _run_update(update)
            return passes_s + device_time_s() - start

        return step


class RepeatedMessage:
    """An inbox that gives the same message in every step."""

    def __init__(self, message: Message) -> None:
        self._message, self._numbers = message, itertools.count(1)

    def receive(self) -> Message:
        """Return the message under the next step's number, from 1. Tensors are not copied."""
        header = replace(self._message.header, step=next(self._numbers))
        return replace(self._message, header=header)


def _make_copy_step(device: str) -> Step:
    """Return the step that copies a large tensor."""
    source = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def step() -> float:
        start = device_time_s()
        target.copy_(source)
        return device_time_s() - start

    return step


def _make_codec_steps(name: str, device: str) -> tuple[Step, Step]:
    """Return the steps that encode and decode a message of noise."""
    codec = CODECS[name]
    numbers = _CODED_BYTES // (4 * _CODED_ROWS)
    field = Field("h.0", (numbers,), "float32")
    x = torch.randn(_CODED_ROWS, numbers, device=device)
    coded = codec.encode(field, x)

    def encode() -> float:
        start = device_time_s()
        codec.encode(field, x)
        return device_time_s() - start

    def decode() -> float:
        start = device_time_s()
        codec.decode(field, coded)
        return device_time_s() - start

    return encode, decode


def _attention_context(double_backward: bool) -> AbstractContextManager[object]:
    """Return the context of a stage's attention: fused kernels have no double backward."""
    if double_backward:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def _propagate(
    output: Tensor, leaf: Tensor | None, gradient: Tensor, double_backward: bool
) -> None:
    """Run the backward pass of a piece, and a double one as reconciled gradients need it."""
    if not output.requires_grad:
        return
    if double_backward and leaf is not None:
        (first,) = torch.autograd.grad(output, leaf, gradient, create_graph=True)
        if first.requires_grad:
            torch.autograd.backward([output, first], [gradient, torch.ones_like(first)])
            return
    output.backward(gradient)


def _run_update(update: Update | None) -> None:
    if update is not None:
        update.run()
        update.optimizer.zero_grad(set_to_none=True)


def make_message(stage: Stage) -> Message:
    """Return a training message of the right shapes: noise, gray images, classes 0 and 1.

    It has every field that the stage receives, (B, *shape) on the stage's device. Noise is random
    in every call.
    """
    batch = stage.plan.receives.batch
    fields = {}
    for field in stage.plan.receives.fields:
        fields[field.name] = _make_noise(field, batch).to(stage.device)
    fields["target"] = example_target(stage.task, batch, stage.device)
    return Message(Header(Kind.TRAIN, 1, 1, batch), fields)


def _draw_output(stage: Stage) -> Tensor:
    """Return noise of the shape and the order of a stage's output, on the stage's device."""
    gives = stage.plan.gives
    h = torch.randn(stage.plan.receives.batch, *gives.shape, device=stage.device)
    return arrange(h, gives.order)


def _make_noise(field: Field, batch: int) -> Tensor:
    """Return values of a field, (B, *shape) in its order: noise, gray, zeros or a full mask."""
    return arrange(_make_contiguous_noise(field, batch), field.order)


def _make_contiguous_noise(field: Field, batch: int) -> Tensor:
    shape = (batch, *field.shape)
    if field.dtype == "float32":
        return torch.randn(shape)
    if field.dtype in ("float16", "bfloat16"):
        return torch.randn(shape).to(getattr(torch, field.dtype))
    if field.dtype == "int8":
        return torch.randint(-127, 128, shape, dtype=torch.int8)
    if field.dtype == "bool":
        return torch.ones(shape, dtype=torch.bool)
    if field.dtype == "uint8":
        return torch.full(shape, 127, dtype=torch.uint8)
    return torch.zeros(shape, dtype=torch.int64)

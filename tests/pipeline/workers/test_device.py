"""A worker on a GPU, as far as no GPU is needed: its stopwatch, its waits, and its errors."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from localpipe import config as configs
from localpipe import data
from localpipe.bench.launch import describe_machine
from localpipe.config.load import to_dict, update
from localpipe.environment import SHARED_GPU
from localpipe.errors import CrashError, NeighbourLostError, RunError, UserError
from localpipe.fields import Field, Schema
from localpipe.pipeline.channels import streams
from localpipe.pipeline.channels.channel import MemoryChannel, guard
from localpipe.pipeline.channels.message import Header, Kind
from localpipe.pipeline.channels.streams import take_stream
from localpipe.pipeline.stages.learning_rate import LearningRateSchedule
from localpipe.pipeline.stages.replicas import Replicas
from localpipe.pipeline.stages.stage import Stage, train_step
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.workers import device as device_module
from localpipe.pipeline.workers import loop, phase
from localpipe.pipeline.workers.device import (
    EMULATED_GPU,
    Stopwatch,
    check_devices,
    check_own_device,
    describe_memory_error,
    emulated_key,
    gpu_name,
)
from localpipe.pipeline.workers.loop import RunnerContext, StageRunner, Worker
from localpipe.pipeline.workers.meter import FIRST_STEPS
from localpipe.pipeline.workers.phase import PhaseTimer
from localpipe.plan import measure_worker
from localpipe.plan.measure_worker import PieceSteps, RepeatedMessage, make_message
from localpipe.plan.resolve_here import resolve_here
from tests.harness import settings


class Event:
    """An event of a device that has nothing else to do: it passes when the host records it."""

    passed = True

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.monotonic()

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        """Return at once."""

    def elapsed_time(self, other: Event) -> float:
        return 1000 * (other.at - self.at)


class Device:
    """A device and a host with clocks of their own, which only move when one of them works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host_s = self.device_s = 0.0
        device = self

        class Mark(Event):
            def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
                assert enable_timing and blocking, "a host that polls takes a core"

            def record(self) -> None:
                self.at = max(device.host_s, device.device_s)

            def synchronize(self) -> None:
                device.host_s = max(device.host_s, self.at)

        monkeypatch.setattr(torch.cuda, "Event", Mark)
        clock = SimpleNamespace(monotonic=lambda: self.host_s)
        for module in (device_module, loop, phase):
            monkeypatch.setattr(module, "time", clock)

    def launch(self, seconds: float) -> None:
        """Enqueue kernels, which takes the host a moment."""
        self.host_s += 0.001
        self.device_s = max(self.host_s, self.device_s) + seconds

    def runs_steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let a step of any stage take a second of the device, and a moment of the host."""

        def train_on_device(*arguments: Any) -> Any:
            self.launch(1.0)
            return train_step(*arguments)

        monkeypatch.setattr(loop, "train_step", train_on_device)


def test_a_stopwatch_leaves_out_the_wait_for_another_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    turns: list[tuple[float, float]] = []
    watch = Stopwatch(torch.device("cuda"))
    with watch.pause():  # before a turn has begun, as in an evaluation
        device.host_s += 7
    watch.begin()
    device.launch(0.5)
    with watch.pause():
        device.host_s += 3
    device.launch(0.25)
    watch.finish(9.0, lambda *turn: turns.append(turn))
    assert turns == []
    watch.settle()
    watch.settle()
    (end, compute_s) = turns.pop()
    assert compute_s == pytest.approx(0.75, abs=0.01)
    assert end == pytest.approx(7 + 3 + 0.25, abs=0.01)
    Stopwatch(torch.device("cpu")).finish(9.0, lambda *turn: turns.append(turn))
    assert turns == [(device.host_s, 9.0)]


def test_a_host_is_two_turns_ahead_of_its_device_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    ends: list[float] = []
    watch = Stopwatch(torch.device("cuda"))
    for turn in range(1, 9):
        watch.begin()
        device.launch(1.0)
        watch.finish(0.0, lambda end, _: ends.append(end))
        assert len(ends) == max(0, turn - 2)
        assert device.device_s - device.host_s <= 2.0
    watch.settle()
    assert ends == pytest.approx([1, 2, 3, 4, 5, 6, 7, 8], abs=0.01)


def test_the_figures_of_a_run_on_a_device_are_the_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path)
    blueprint, plans = build_plans(config)
    stage = Stage(plans[0], blueprint, config)
    records: list[dict[str, Any]] = []
    recorder = SimpleNamespace(write=lambda kind, **values: records.append(values))
    rates = LearningRateSchedule(config.optim, 1)
    context = RunnerContext(rates, PhaseTimer(), recorder, None, log_every=4)
    message = make_message(stage)
    device = Device(monkeypatch)
    device.runs_steps(monkeypatch)
    runner = StageRunner(stage, RepeatedMessage(message), None, context)
    runner.stopwatch = Stopwatch(torch.device("cuda"))
    for _ in range(12):
        runner.turn()
    runner.settle()
    samples = message.header.count
    assert [record["step"] for record in records] == [4, 8, 12]
    for record in records:
        assert record["samples_per_s"] == pytest.approx(samples, rel=0.01)
        assert record["busy"] == pytest.approx(1.0, rel=0.01)
    assert runner.throughput.steps == 12 - FIRST_STEPS
    assert runner.throughput.wall_s == pytest.approx(12 - FIRST_STEPS, rel=0.01)
    assert runner.throughput.compute_s == pytest.approx(12 - FIRST_STEPS, rel=0.01)


def test_a_measured_turn_holds_no_time_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = PieceSteps(settings(tmp_path), "cpu")
    device = Device(monkeypatch)
    device.runs_steps(monkeypatch)

    def synchronised_s() -> float:
        device.host_s = max(device.host_s, device.device_s)
        return device.host_s

    monkeypatch.setattr(loop, "Stopwatch", lambda _: Stopwatch(torch.device("cuda")))
    monkeypatch.setattr(measure_worker, "device_time_s", synchronised_s)
    turn = steps.turn()
    turn()
    assert turn() < 0.1


class Late:
    """An outbox whose reader is slow."""

    def send(self, *message: Any) -> None:
        time.sleep(0.3)

    def close(self) -> None:
        """Nothing is left."""


def test_a_stage_that_waits_to_send_is_not_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    config = settings(tmp_path, pipeline={"stages": 2})
    blueprint, plans = build_plans(config)
    stage = Stage(plans[0], blueprint, config)
    context = RunnerContext(LearningRateSchedule(config.optim, 1), PhaseTimer(), None, None)
    runner = StageRunner(stage, RepeatedMessage(make_message(stage)), Late(), context)
    runner.turn()  # the first one builds kernels
    runner.stopwatch, runner.meter.busy_s = Stopwatch(torch.device("cuda")), 0.0
    runner.turn()
    runner.settle()
    assert 0 < runner.meter.busy_s < 0.3


def test_a_worker_whose_collective_is_still_queued_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    replicas, timer = Replicas(), PhaseTimer(phase="forward")
    timer.has_pending_collective = replicas.has_pending_collective
    assert not timer.is_waiting
    replicas._record_collective(FakeCuda())  # type: ignore[arg-type]
    monkeypatch.setattr(Event, "passed", False)
    assert timer.is_waiting
    timer.phase = "record"  # there it would hang for another reason
    assert not timer.is_waiting
    monkeypatch.setattr(Event, "passed", True)
    timer.phase = "forward"
    assert not timer.is_waiting
    timer.phase = "receive"
    assert timer.is_waiting


class FakeCuda:
    """Stands for a tensor on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(
    "error", [torch.AcceleratorError("assert"), torch.OutOfMemoryError("full")]
)
def test_an_error_of_the_own_device_is_no_lost_neighbour(error: RuntimeError) -> None:
    def fails(raised: RuntimeError) -> Any:
        raise raised

    with pytest.raises(type(error)):
        guard("stage 1", lambda: fails(error))
    with pytest.raises(NeighbourLostError, match="lost stage 1: reset by peer"):
        guard("stage 1", lambda: fails(RuntimeError("reset by peer\nmore")))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
        RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried\nmore"),
    ],
)
def test_memory_that_does_not_suffice_is_one_line(error: Exception) -> None:
    class Fails:
        def turn(self) -> bool:
            raise error

    with pytest.raises(RunError, match=r"memory does not suffice \(.*\); lower") as caught:
        Worker([Fails()], PhaseTimer()).run()  # type: ignore[list-item]
    assert not isinstance(caught.value, CrashError) and "more)" not in str(caught.value)


def test_another_error_is_not_one_of_memory() -> None:
    assert describe_memory_error(RuntimeError("shapes differ")) is None


def test_every_piece_is_measured_on_the_device_of_its_stage(tmp_path: Path) -> None:
    method = {"objective": {"name": "infopro"}, "context": {"mode": "R1E"}}
    steps = PieceSteps(settings(tmp_path, method=method), "meta")
    for step in (
        steps.lead(0, 0),
        steps.lead(1, 1),
        steps.block(1),
        steps.loss(0, 4, 0),
        steps.turn(),
    ):
        step()


def fake_uuids(monkeypatch: pytest.MonkeyPatch, uuids: dict[int | None, str]) -> None:
    """Let devices have these UUIDs by their indices, on a machine that shows one device."""

    def properties(device: torch.device) -> Any:
        return SimpleNamespace(uuid=uuids[device.index])

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv(SHARED_GPU, raising=False)


def test_workers_with_one_visible_gpu_each_are_told_apart_by_uuids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = torch.device("cuda", 0)
    check = partial(check_own_device, world=2, device=device, backend_name="nccl")
    # Rank 0 of another launcher cannot count the devices of the others.
    fake_uuids(monkeypatch, {0: "GPU-a"})
    check_devices("cuda", "nccl", None)
    with pytest.raises(UserError, match="2 workers for 1 CUDA device; set pipeline.processes"):
        check_devices("cuda", "nccl", 2)

    store = dist.HashStore()
    store.set("device/1", "GPU-b")
    check(store, 0)
    store.set("device/1", "GPU-a")
    with pytest.raises(UserError, match="ranks 0 and 1 both use GPU GPU-a, expected one GPU for"):
        check(store, 0)
    monkeypatch.setenv(SHARED_GPU, "1")
    check(store, 0)


def test_torchrun_does_not_count_the_devices_of_rank_0(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_uuids(monkeypatch, {0: "GPU-a", None: "GPU-a"})
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    sections = to_dict(settings(tmp_path))
    sections["run"]["device"] = "cuda"
    sections["pipeline"] = {"stages": 2, "backend": "nccl"}
    given = configs.parse(sections, "test")
    dataset = data.load(given.data, given.run.seed)
    assert resolve_here(given, dataset, world=2).pipeline.processes == 2
    with pytest.raises(UserError, match="2 workers for 1 CUDA device"):
        resolve_here(update(given, {"pipeline.processes": 2}), dataset)


def test_figures_of_the_emulated_gpu_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["NVIDIA H200"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: names[0])
    assert gpu_name("cpu") is None and emulated_key(gpu_name("cpu")) == {}
    assert emulated_key(gpu_name("cuda")) == {}
    names[0] = EMULATED_GPU
    assert emulated_key(gpu_name("cuda")) == {"emulated": True}
    config = update(settings(tmp_path), {"run.device": "cuda"})
    assert describe_machine(config)["emulated"] is True


class Handle:
    """Stands for a stream of torch's pool, which has two."""

    made = 0

    def __init__(self, device: Any) -> None:
        self.cuda_stream = Handle.made % 2
        Handle.made += 1


def test_nobody_gets_a_stream_that_another_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Stream", Handle)
    monkeypatch.setattr(streams, "_taken", {})
    device = torch.device("cuda", 0)
    Handle(device)  # another library's
    assert {take_stream(device).cuda_stream, take_stream(device).cuda_stream} == {0, 1}
    with pytest.raises(RunError, match="more than the 32 streams"):
        take_stream(device)


def test_stages_of_one_process_leave_pinned_headers_alone() -> None:
    """The host runs ahead: it would write a header whose last copy is still queued."""
    header = Header(Kind.TRAIN, 7, 1, 2)
    channel = MemoryChannel(Schema((Field("h.0", (3,), "float32"),), 2), 1)
    channel.send(header, {"h.0": torch.ones(2, 3)})
    message = channel.receive()
    assert message.header is header and message.fields["h.0"].sum() == 6
    assert not any(bool(slot.header_bytes.any()) for slot in channel._ring)

"""Running sums, speed, the lines of metrics.jsonl, and the digest of the weights."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from localpipe.errors import RunError
from localpipe.files import write_output
from localpipe.pipeline.stages.weights import weight_lines, weights_digest
from localpipe.pipeline.workers.meter import (
    FIRST_STEPS,
    Meter,
    RecordWindow,
    Throughput,
    _Arrival,
)
from localpipe.runs.records import Recorder, append_record, begin_records, read_records

# --- Meter


def metered(*losses: float, samples: int = 4, first: int = 1) -> Meter:
    meter = Meter()
    for step, loss in enumerate(losses, start=first):
        meter.add(step, torch.tensor(loss), samples)
    return meter


def test_mean_loss_weighs_by_samples() -> None:
    meter = metered(2.0, samples=6)
    meter.add(2, torch.tensor(5.0), 2)
    assert meter.mean_loss() == (2.0 * 6 + 5.0 * 2) / 8


def test_meter_has_no_mean_before_the_first_step() -> None:
    assert Meter().mean_loss() is None


def test_restart_begins_a_new_mean_and_keeps_the_whole_epoch_until_then() -> None:
    meter = metered(1.0, 3.0)
    meter.restart()
    assert meter.mean_loss() == 2.0
    meter.add(3, torch.tensor(7.0), 4)
    assert meter.mean_loss() == 7.0


def test_state_of_a_meter_round_trips_through_json() -> None:
    meter = metered(1.0, 3.0)
    meter.restart()
    meter.add(3, torch.tensor(5.0), 4)
    meter.busy_s = 1.5
    copy = Meter()
    copy.load_state(json.loads(json.dumps(meter.state())))
    for each in (meter, copy):
        each.add(4, torch.tensor(8.0), 8)
    assert copy.mean_loss() == meter.mean_loss() == 7.0
    assert copy.busy_s == 1.5


def test_whole_epoch_is_part_of_the_state() -> None:
    meter = metered(1.0, 3.0)
    meter.restart()
    copy = Meter()
    copy.load_state(meter.state())
    assert copy.mean_loss() == 2.0


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_loss_that_is_not_finite_is_told_one_step_later(loss: float) -> None:
    meter = metered(1.0)
    meter.add(2, torch.tensor(loss), 4)
    with pytest.raises(
        RunError, match=f"the local loss of step 2 is {loss}; start a new run with a lower"
    ):
        meter.add(3, torch.tensor(1.0), 4)


def test_loss_that_is_not_finite_is_told_before_a_checkpoint_or_the_end() -> None:
    for look in (Meter.settle, Meter.state, Meter.mean_loss, Meter.restart):
        with pytest.raises(RunError, match="step 1 is nan"):
            look(metered(float("nan")))


def test_meter_holds_no_graph() -> None:
    meter, weight = Meter(), torch.ones(1, requires_grad=True)
    meter.add(1, (weight * 2).sum(), 4)
    (arrival,) = meter._pending
    assert isinstance(arrival, _Arrival) and not arrival.loss.requires_grad


class Flight:
    """An event of a device. It passes when something waits for it, or when a test sets `passed`."""

    def __init__(self) -> None:
        self.passed = self.waited = False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.passed = self.waited = True


@pytest.fixture
def flights(monkeypatch: pytest.MonkeyPatch) -> list[Flight]:
    """Make every loss one that is on its way from a device; return their events."""
    found: list[Flight] = []

    def sent(step: int, loss: Tensor, samples: int) -> _Arrival:
        found.append(Flight())
        return _Arrival(step, loss, samples, found[-1])  # type: ignore[arg-type]

    monkeypatch.setattr("localpipe.pipeline.workers.meter._start_copy", sent)
    return found


def test_a_loss_on_its_way_is_never_waited_for_by_a_step(flights: list[Flight]) -> None:
    meter = metered(1.0, 2.0)
    losses: list[float | None] = []
    meter.report(losses.append)
    meter.add(3, torch.tensor(float("nan")), 4)
    flights[0].passed = True
    meter.add(4, torch.tensor(5.0), 4)
    assert losses == [] and meter.samples == 4
    flights[1].passed = flights[2].passed = True
    with pytest.raises(RunError, match="step 3 is nan"):
        meter.add(5, torch.tensor(5.0), 4)
    assert losses == [1.5] and not any(flight.waited for flight in flights)


def test_settling_waits_for_every_loss_and_tells_what_is_due(flights: list[Flight]) -> None:
    meter = metered(1.0, 2.0)
    losses: list[float | None] = []
    meter.report(losses.append)
    meter.add(3, torch.tensor(9.0), 4)
    assert meter.mean_loss() == 4.0
    assert losses == [1.5] and all(flight.waited for flight in flights)


def test_what_is_told_is_the_mean_since_it_was_last_told_weighed_by_samples() -> None:
    meter = metered(2.0, samples=6)
    losses: list[float | None] = []
    meter.add(2, torch.tensor(5.0), 2)
    meter.report(losses.append)
    assert losses == [(2.0 * 6 + 5.0 * 2) / 8], "nothing is in flight on the CPU"
    meter.restart()
    meter.add(3, torch.tensor(7.0), 4)
    meter.report(losses.append)
    assert losses[1:] == [7.0]


# --- Pace


def test_pace_leaves_the_first_steps_out() -> None:
    throughput = Throughput()
    for step in range(FIRST_STEPS):
        throughput.step(end=float(step), compute_s=0.5, samples=4)
    assert FIRST_STEPS == 5 and (throughput.steps, throughput.samples, throughput.wall_s) == (
        0,
        0,
        0,
    )
    throughput.step(end=7.0, compute_s=0.5, samples=3)
    throughput.step(end=9.5, compute_s=0.25, samples=4)
    assert (throughput.steps, throughput.samples, throughput.wall_s, throughput.compute_s) == (
        2,
        7,
        5.5,
        0.75,
    )


def test_pace_leaves_out_what_stands_between_two_steps() -> None:
    throughput = Throughput()
    for step in range(FIRST_STEPS + 1):
        throughput.step(end=float(step), compute_s=0.5, samples=4)
    throughput.interrupt()
    throughput.step(end=100.0, compute_s=0.5, samples=4)  # an evaluation lies before it
    assert (throughput.steps, throughput.wall_s) == (1, 1.0)
    throughput.step(end=102.0, compute_s=0.5, samples=4)
    assert (throughput.steps, throughput.samples, throughput.wall_s) == (2, 8, 3.0)


def test_waits_of_a_host_while_its_device_computes_are_not_waits_of_the_stage() -> None:
    window = RecordWindow(start=10.0)
    window.add({"receive": 0.9, "send": 0.3}, 0.8, samples=4)
    assert window.result(end=11.0) == {
        "samples_per_s": 4.0,
        "busy": 0.8,
        "receive_wait": 0.15,
        "send_wait": 0.05,
    }
    assert window.result(end=13.0)["receive_wait"] == 0.3


# --- Lines


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_are_appended_one_a_line_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [
        {"kind": "train", "step": 1, "loss": 0.5},
        {"kind": "eval", "step": 1, "accuracy": None},
    ]
    for record in records:
        append_record(path, record)
    assert list(read_records(path)) == records == lines(path)


def test_file_that_is_not_there_has_no_records(tmp_path: Path) -> None:
    assert list(read_records(tmp_path / "metrics.jsonl")) == []


@pytest.mark.parametrize("torn", ['{"kind": "train", "st', '{"kind": "train", "step": 2}'])
def test_last_line_that_was_never_finished_is_left_out(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    append_record(path, {"kind": "train", "step": 1})
    with open(path, "a") as file:
        file.write(torn)
    assert list(read_records(path)) == [{"kind": "train", "step": 1}]


def test_record_that_cannot_be_written_is_an_error_of_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match="metrics: cannot write .*gone.*the same command begins anew"
    ):
        append_record(tmp_path / "gone" / "metrics.jsonl", {"kind": "train"})


def test_record_that_a_full_disk_cuts_short_leaves_no_half_line(tmp_path: Path) -> None:
    path, records = (
        tmp_path / "metrics.jsonl",
        [{"kind": "train", "step": step} for step in range(3)],
    )
    append_record(path, records[0])
    old, limit = (
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limit[1]))
    try:
        with pytest.raises(RunError, match="cannot write .*No space left"):
            append_record(path, records[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, old)
    append_record(path, records[2])
    assert lines(path) == [records[0], records[2]]


def test_recorder_counts_wall_time_from_the_first_session(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    Recorder(path, started=time.time() - 50, elapsed_s=1000).write("train", step=3, stage=1)
    (record,) = read_records(path)
    assert (record["kind"], record["step"], record["stage"]) == ("train", 3, 1)
    assert 1050 <= record["wall_s"] < 2000


def begun(
    folder: Path, records: list[dict[str, Any]], step: int, redo: bool = False
) -> tuple[float, list[Any]]:
    path = folder / "metrics.jsonl"
    for record in records:
        append_record(path, record)
    elapsed = begin_records(path, {"torch": "2"}, step, lambda at: not (redo and at == step))
    return elapsed, lines(path)


def test_new_file_begins_with_its_schema(tmp_path: Path) -> None:
    elapsed, found = begun(tmp_path, [], 0)
    assert elapsed == 0.0
    assert found == [{"schema": 1, "kind": "start", "torch": "2", "resumed_at": None}]


RECORDS = [
    {"schema": 1, "kind": "start", "torch": "1", "resumed_at": None},
    {"kind": "train", "step": 1, "wall_s": 1.0},
    {"kind": "train", "step": 2, "wall_s": 2.0},
    {"kind": "eval", "step": 2, "wall_s": 3.0},
    {"kind": "checkpoint", "step": 2, "wall_s": 4.0},
    {"kind": "train", "step": 3, "wall_s": 5.0},
    {"kind": "eval", "step": 3, "wall_s": 6.0},
]


def test_resume_cuts_off_what_came_after_its_step_and_counts_what_it_keeps(tmp_path: Path) -> None:
    elapsed, found = begun(tmp_path, RECORDS, 2)
    assert elapsed == 4.0
    assert found == [{"schema": 1, "kind": "start", "torch": "2", "resumed_at": 2}, *RECORDS[1:5]]


def test_resume_that_evaluates_again_cuts_off_that_evaluation(tmp_path: Path) -> None:
    _, found = begun(tmp_path, RECORDS, 2, redo=True)
    assert found[1:] == [RECORDS[1], RECORDS[2], RECORDS[4]]


def test_records_out_of_order_are_cut_by_their_step(tmp_path: Path) -> None:
    _, found = begun(tmp_path, [RECORDS[5], RECORDS[1]], 2)
    assert found[1:] == [RECORDS[1]]


def test_resume_drops_a_torn_last_line_and_later_lines_stand_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_record(path, RECORDS[1])
    with open(path, "a") as file:
        file.write('{"kind": "train", "st')
    begin_records(path, {}, 1, lambda at: True)
    append_record(path, RECORDS[2])
    assert lines(path)[1:] == [RECORDS[1], RECORDS[2]]


def test_whole_file_is_replaced_or_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_output(path, "old")
    write_output(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["summary.json"]
    folder = tmp_path / "folder"
    (folder / "inside").mkdir(parents=True)
    with pytest.raises(RunError, match="cannot write .*folder"):
        write_output(folder, "text")
    assert sorted(os.listdir(tmp_path)) == ["folder", "summary.json"]  # no half-written file stays


# --- Digest

WEIGHTS = {
    "layer1.0.weight": torch.arange(6, dtype=torch.float32).view(2, 3) / 7,
    "layer1.0.bias": torch.tensor([1.5, -0.0, float("nan")]),
    "bn.num_batches_tracked": torch.tensor(3),
    "aux.0.half": torch.tensor([[0.5], [2.0]], dtype=torch.bfloat16),
    "layer1-0": torch.zeros(0, dtype=torch.uint8),
}


def digest(weights: dict[str, Tensor]) -> str:
    return weights_digest(weight_lines(weights))


def by_hand(weights: dict[str, Tensor]) -> str:
    """Return the documented digest.

    It is the SHA-256 of the lines `name dtype shape sha256(bytes)` in byte order of name.
    """
    text = ""
    for name in sorted(weights, key=str.encode):
        tensor = weights[name]
        content = bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
        dtype = str(tensor.dtype).split(".")[1]
        text += f"{name} {dtype} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()}\n"
    return hashlib.sha256(text.encode()).hexdigest()


def test_digest_is_the_documented_one() -> None:
    assert digest(WEIGHTS) == by_hand(WEIGHTS)
    line = weight_lines({"bn.n": torch.tensor(3)})[0]
    content = hashlib.sha256((3).to_bytes(8, "little")).hexdigest()
    assert line == f"bn.n int64 [] {content}"


def test_digest_does_not_depend_on_the_order_or_on_who_hosts_what() -> None:
    backwards = dict(reversed(WEIGHTS.items()))
    parts = [weight_lines({name: tensor}) for name, tensor in backwards.items()]
    assert (
        digest(backwards)
        == weights_digest([line for part in parts for line in part])
        == digest(WEIGHTS)
    )


def test_digest_does_not_depend_on_the_memory_format() -> None:
    image = torch.randn(2, 3, 4, 5)
    assert digest({"w": image.to(memory_format=torch.channels_last)}) == digest({"w": image})
    assert digest({"w": torch.arange(12.0).view(3, 4).T}) == digest(
        {"w": torch.arange(12.0).view(3, 4).T.clone()}
    )


@pytest.mark.parametrize(
    "change",
    [
        {"layer1.0.weight": WEIGHTS["layer1.0.weight"].view(3, 2)},
        {"layer1.0.weight": WEIGHTS["layer1.0.weight"].view(torch.int32)},
        {"layer1.0.weight": WEIGHTS["layer1.0.weight"].nextafter(torch.tensor(9.0))},
        {"layer1.0.bias": torch.tensor([1.5, 0.0, float("nan")])},
        {"bn.num_batches_tracked": torch.tensor(4)},
        {"bn.num_batches_tracked": torch.tensor([3])},
        {"another": torch.tensor(0)},
    ],
    ids=["shape", "dtype", "last bit", "sign of zero", "buffer", "dimension", "one more"],
)
def test_digest_differs_with_every_bit_shape_and_dtype(change: dict[str, Tensor]) -> None:
    assert digest({**WEIGHTS, **change}) != digest(WEIGHTS)


def test_digest_differs_with_a_name() -> None:
    renamed = {name.replace("layer1", "layer2"): tensor for name, tensor in WEIGHTS.items()}
    assert digest(renamed) != digest(WEIGHTS)
    a, b = torch.tensor(1), torch.tensor(2)
    assert digest({"a": a, "b": b}) != digest({"a": b, "b": a})

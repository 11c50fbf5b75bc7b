"""One trace of all workers on one clock: its spans, how parts are joined, what a run leaves."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from localpipe.pipeline.workers.mesh import Mesh
from localpipe.pipeline.workers.phase import PhaseTimer
from localpipe.runs.clock import ClockOffset, compare_clocks
from localpipe.runs.records import read_records
from localpipe.runs.trace import Trace, merge_traces, trace_rows
from tests.cli.test_cli import TINY, command, summary
from tests.torture.kills import Started


def parts(run_dir: Path, *clocks: ClockOffset | None) -> None:
    """Write a part for every clock.

    Rank r hosts stage r and computes in second 1 to 2 of its own clock.
    """
    for rank, clock_offset in enumerate(clocks):
        kept = Trace()
        kept.add(rank, "receive", 7, 0.0, 1.0)
        kept.add(rank, "forward", 7, 1.0, 2.0)
        kept.write(run_dir, rank, clock_offset)


def merged(run_dir: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run_dir / "trace.json").read_text())
    return loaded


def test_a_pulse_without_a_trace_keeps_no_span() -> None:
    timer = PhaseTimer()
    timer.begin_turn(0)
    timer.enter("forward")
    assert timer.trace is None and set(timer.spans) == {"receive"}


def test_a_span_carries_the_stage_and_the_step_that_it_ended_in() -> None:
    kept = Trace()
    timer = PhaseTimer(trace=kept)
    timer.begin_turn(2)
    timer.step = 5  # known when the message has come
    timer.enter("forward")
    timer.begin_turn(3, "data")
    found = [(span.stage, span.phase, span.step) for span in kept._spans]
    assert found == [(0, "start", 0), (2, "receive", 5), (2, "forward", 5)]
    assert all(
        a.end == b.begin for a, b in zip(list(kept._spans), list(kept._spans)[1:], strict=False)
    )


def test_the_buffer_keeps_the_latest_spans_and_counts_what_it_dropped(tmp_path: Path) -> None:
    kept = Trace(max_spans=3)
    for step in range(5):
        kept.add(0, "update", step, float(step), step + 0.5)
    kept.write(tmp_path, 0, ClockOffset())
    assert merge_traces(tmp_path)
    assert [e["args"]["step"] for e in merged(tmp_path)["traceEvents"] if e["ph"] == "X"] == [
        2,
        3,
        4,
    ]
    assert merged(tmp_path)["otherData"]["workers"][0]["dropped"] == 2


def test_parts_are_joined_on_the_clock_of_rank_0_and_removed(tmp_path: Path) -> None:
    parts(tmp_path, ClockOffset(), ClockOffset(offset_s=0.5, error_s=0.001))
    assert merge_traces(tmp_path)
    trace = merged(tmp_path)
    events = trace["traceEvents"]
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == [
        "stage 0 (rank 0)",
        "stage 1 (rank 1)",
    ]
    spans = [
        (e["pid"], e["name"], e["cat"], e["ts"], e["dur"], e["args"]["step"])
        for e in events
        if e["ph"] == "X"
    ]
    assert spans == [
        (0, "receive", "wait", 0.0, 1e6, 7),
        (0, "forward", "compute", 1e6, 1e6, 7),
        (1, "receive", "wait", 0.5e6, 1e6, 7),
        (1, "forward", "compute", 1.5e6, 1e6, 7),
    ]
    assert trace["schema"] == 1 and os.listdir(tmp_path) == ["trace.json"]


def test_a_worker_whose_clock_was_never_compared_or_that_died_writing_is_left_out(
    tmp_path: Path,
) -> None:
    parts(tmp_path, ClockOffset(), None)
    (tmp_path / ".trace.json.rank_2").write_text('{"rank": 2, "spa')
    assert merge_traces(tmp_path)
    assert [row.rank for row in trace_rows(merged(tmp_path))] == [0]
    assert [worker["rank"] for worker in merged(tmp_path)["otherData"]["workers"]] == [0, 1]
    assert os.listdir(tmp_path) == ["trace.json"]


def test_no_parts_leave_an_earlier_trace_alone(tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text("earlier")
    assert not merge_traces(tmp_path)
    assert (tmp_path / "trace.json").read_text() == "earlier"


def test_rows_read_back_what_was_written(tmp_path: Path) -> None:
    parts(tmp_path, ClockOffset(), ClockOffset())
    merge_traces(tmp_path)
    first, second = trace_rows(merged(tmp_path))
    assert (first.stage, first.rank, second.stage, second.rank) == (0, 0, 1, 1)
    assert [(s.phase, s.step, s.begin, s.end) for s in first.spans] == [
        ("receive", 7, 0.0, 1.0),
        ("forward", 7, 1.0, 2.0),
    ]


def test_a_trace_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Trace().write(tmp_path / "gone", 1, ClockOffset())
    assert "no trace of rank 1" in capsys.readouterr().err


# --- Clocks


def test_clocks_of_two_hosts_are_compared_within_half_a_round_trip() -> None:
    store = dist.HashStore()
    ahead = 1234.5
    offsets: dict[int, ClockOffset] = {}

    def rank(number: int, offset: float) -> None:
        mesh = Mesh(number, 3, store, local=False)
        offsets[number] = compare_clocks(mesh, lambda: time.monotonic() + offset)

    threads = [
        threading.Thread(target=rank, args=each) for each in ((0, 0.0), (1, -ahead), (2, ahead))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert offsets[0] == ClockOffset()
    assert (
        abs(offsets[1].offset_s - ahead) <= offsets[1].error_s
        and abs(offsets[2].offset_s + ahead) <= offsets[2].error_s
    )


def test_workers_of_one_machine_ask_nobody() -> None:
    assert compare_clocks(Mesh(1, 2, dist.HashStore(), local=True)) == ClockOffset()


# --- Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run in two processes with a trace, and in one process without."""
    folder = tmp_path_factory.mktemp("runs")
    for name, words in (("traced", ["run.trace=true"]), ("plain", ["pipeline.processes=1"])):
        command(
            "train",
            "configs/demo.yaml",
            *TINY,
            f"run.dir={folder / name}",
            "optim.epochs=1",
            *words,
        )
    return folder / "traced", folder / "plain"


def test_a_trace_changes_no_weight(runs: tuple[Path, Path]) -> None:
    traced, plain = map(summary, runs)
    assert traced["weights_sha256"] == plain["weights_sha256"]
    assert (runs[0] / "trace.json").exists() and not (runs[1] / "trace.json").exists()


def test_every_stage_has_every_phase_of_every_step(runs: tuple[Path, Path]) -> None:
    rows = trace_rows(merged(runs[0]))
    assert [(row.stage, row.rank) for row in rows] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    for row in rows:
        waits = "data" if row.stage == 0 else "receive"
        for phase in (
            waits,
            "forward",
            "loss",
            "update",
            "record",
            *(["send"] if row.stage < 3 else []),
        ):
            assert {span.step for span in row.spans if span.phase == phase} >= set(range(1, 8)), (
                row.stage,
                phase,
            )
        assert {"eval", "save"} <= {span.phase for span in row.spans}


def test_a_worker_does_one_thing_at_a_time_and_a_message_comes_after_it_was_sent(
    runs: tuple[Path, Path],
) -> None:
    rows = trace_rows(merged(runs[0]))
    for rank in (0, 1):
        spans = sorted((s.begin, s.end) for row in rows if row.rank == rank for s in row.spans)
        assert all(a[1] <= b[0] + 1e-6 for a, b in zip(spans, spans[1:], strict=False))
    for sender, receiver in zip(rows, rows[1:], strict=False):
        for step in range(1, 8):
            sent = next(s.begin for s in sender.spans if s.phase == "send" and s.step == step)
            assert sent < next(
                s.begin for s in receiver.spans if s.phase == "forward" and s.step == step
            )


def test_a_run_that_is_asked_to_stop_leaves_its_trace(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with Started(run_dir, run__trace=True, optim__epochs=1000) as started:
        assert started.until(
            lambda: any(r["kind"] == "train" for r in read_records(run_dir / "metrics.jsonl"))
        )
        started.process.send_signal(signal.SIGTERM)
        assert started.wait() != 0
    rows = trace_rows(merged(run_dir))
    assert {row.rank for row in rows} == {0, 1} and all(
        "update" in {s.phase for s in row.spans} for row in rows
    )
    assert not list(run_dir.glob(".trace*"))

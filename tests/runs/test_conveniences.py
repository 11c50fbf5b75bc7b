"""Conveniences never end a run: standard output, trackers, the live view, names in a table."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.errors import LiveError
from rich.table import Table

from localpipe import config as configs
from localpipe import output
from localpipe.cli import main
from localpipe.output import TolerantStream, make_console, open_closed_streams, say, show_progress
from localpipe.pipeline.workers.steps import StepSchedule
from localpipe.runs.collector import Collector
from localpipe.runs.directory import RunDirectory
from localpipe.runs.prepare import prepare
from localpipe.runs.progress import View
from localpipe.runs.records import append_record
from localpipe.runs.trackers import ForgivingTracker, build_trackers
from tests import harness
from tests.harness import settings

SMALL = (
    "data.name=synthetic", "data.image_size=8", "data.samples=32", "data.batch_size=16",
    "model.name=tests.sample_networks:small", "pipeline.stages=2", "pipeline.processes=1",
    "optim.epochs=1", "run.threads=1", "run.device=cpu",
)  # fmt: skip
SCHEDULE = StepSchedule(train_size=64, test_size=64, batch=64, epochs=2)
RECORD = {"kind": "train", "step": 1, "stage": 0, "loss": 0.5, "wall_s": 1.0}


def small(run_dir: Path) -> list[str]:
    return ["train", "demo", *SMALL, f"run.dir={run_dir}"]


class Broken(io.StringIO):
    """A stream whose file system is full."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- Standard output


def test_a_run_whose_standard_output_is_full_or_unread_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    given = configs.load("demo", [*SMALL, f"run.dir={run_dir}"])
    monkeypatch.setattr(sys, "stdout", Broken())
    assert harness.train(given) == 0
    assert RunDirectory(run_dir).summary() is not None
    lines = [line for line in capsys.readouterr().err.splitlines() if "localpipe:" in line]
    expected = "standard output cannot be written: No space left on device; no more is printed"
    assert lines == [f"localpipe: {expected}"]


def test_a_command_without_standard_output_ends_as_with_one(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "localpipe", *small(tmp_path / "run")]
    result = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *words], stderr=subprocess.PIPE, text=True, timeout=200
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert RunDirectory(tmp_path / "run").summary() is not None


def test_a_closed_stream_is_opened_before_a_file_gets_its_number() -> None:
    code = (
        "import os, sys; os.close(1); sys.stdout = None\n"
        "from localpipe.output import open_closed_streams\n"
        "open_closed_streams(); print('lost')\n"
        "file = os.open('/dev/null', os.O_RDONLY)\n"
        "sys.exit(os.readlink('/proc/self/fd/1') != '/dev/null' or file < 3)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    open_closed_streams()  # nothing is closed here: nothing changes


def test_a_lost_stream_is_noted_once_and_its_text_is_thrown_away(tmp_path: Path) -> None:
    notes: list[str] = []
    with open("/dev/full", "w", encoding="utf-8") as full:
        stream = TolerantStream(lambda: full, notes.append)
        for _ in range(3):
            assert stream.write("text") == 4
            stream.flush()
        assert not stream.isatty() and stream.encoding == "utf-8"
    assert notes == ["No space left on device"]
    closed = io.StringIO()
    closed.close()
    stream = TolerantStream(lambda: closed, notes.append)
    stream.write("text")
    stream.flush()
    assert len(notes) == 2 and not TolerantStream(lambda: None).isatty()


def test_a_sign_that_the_encoding_lacks_is_a_question_mark() -> None:
    buffer = io.BytesIO()
    ascii_only = io.TextIOWrapper(buffer, "ascii")
    TolerantStream(lambda: ascii_only).write("5 µs")
    ascii_only.flush()
    assert buffer.getvalue() == b"5 ?s"


def test_a_command_whose_output_has_no_room_is_one_line_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Broken())
    assert main(["configs", "demo"]) == 1
    assert capsys.readouterr().err == (
        "localpipe: standard output cannot be written: No space left on device; free space\n"
    )


# --- Names with square brackets and colons


@pytest.mark.parametrize("name", ["[red]x", "a[/]b", "[/bold]", ":smile: x", "[x]"])
def test_a_path_is_printed_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title=name)
    table.add_column("a" * 30)
    table.add_row(name)
    console = make_console(80)
    console.print(table)
    console.print(name)
    assert capsys.readouterr().out.count(name) == 3


def test_a_run_in_a_folder_with_brackets_shows_its_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "a[/b]"
    given = configs.load("demo", [*SMALL, f"run.dir={run_dir}"])
    assert harness.train(given) == 0
    assert main(["eval", str(run_dir), "--trust"]) == 0
    assert main(["compare", str(run_dir)]) == 0
    assert "a[/b]" in "".join(capsys.readouterr().out.split("\n"))


# --- Terminals


def terminal(monkeypatch: pytest.MonkeyPatch, kind: str) -> Console:
    monkeypatch.setenv("TERM", kind)
    return Console(width=80, height=40, file=io.StringIO(), force_terminal=True)


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("localpipe.runs.progress._INTERVAL_S", 0.0)
    console = terminal(monkeypatch, "dumb")
    config = settings(tmp_path / "run", pipeline={"stages": 1})
    view = View(config, SCHEDULE, console)
    view.add({**RECORD, "epoch": 1, "busy": 0.5})
    view.refresh()
    view.close()
    assert isinstance(console.file, io.StringIO) and console.file.getvalue() == ""
    assert capsys.readouterr().out.startswith("step 1/")


def test_a_second_live_view_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise LiveError("Only one live display may be active at once")

    console = terminal(monkeypatch, "xterm")
    monkeypatch.setattr("rich.live.Live.start", refuse)
    view = View(settings(tmp_path / "run", pipeline={"stages": 1}), SCHEDULE, console)
    view.close()
    expected = "localpipe: no live view: Only one live display may be active at once\n"
    assert capsys.readouterr().err == expected


def test_progress_on_a_dumb_terminal_has_no_control_characters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "dumb")
    show_progress("building gpipe")
    assert screen.getvalue() == "building gpipe\n"


# --- Trackers


def test_a_tracker_that_cannot_be_imported_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    trackers = build_trackers(tmp_path, 0, "mine", {})
    for tracker in trackers:
        tracker.add(RECORD)
        tracker.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in lines] == [" no TensorBoard", " no Weights & Biases"]
    assert all(line.endswith("; the run goes on without it") for line in lines)


def test_a_tracker_whose_folder_is_a_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").write_text("")
    (tracker,) = build_trackers(tmp_path, 0, None, {})
    tracker.add(RECORD)
    tracker.close()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_tracker_that_fails_later_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []

    class Failing:
        def add(self, record: Any) -> None:
            calls.append("add")
            raise RuntimeError

        def close(self) -> None:
            calls.append("close")

    tracker = ForgivingTracker("it", Failing)
    tracker.add(RECORD)
    tracker.add(RECORD)
    tracker.close()
    assert calls == ["add"]
    expected = "localpipe: no more it: RuntimeError; the run goes on without it\n"
    assert capsys.readouterr().err == expected


def test_the_last_records_reach_the_trackers_whatever_the_end(tmp_path: Path) -> None:
    given = configs.load("demo", [*SMALL, f"run.dir={tmp_path / 'run'}"])
    prepared = prepare(given)
    collector = Collector(prepared)
    seen: list[Any] = []

    class Seeing:
        def add(self, record: Any) -> None:
            seen.append(record)

        def close(self) -> None:
            seen.append("closed")

    collector._trackers = [Seeing()]
    append_record(tmp_path / "run" / "metrics.jsonl", {**RECORD, "epoch": 1})
    collector.close()  # as after a stop or a failure, too
    collector.close()
    prepared.lock.close()
    assert [value if value == "closed" else value["kind"] for value in seen][-2:] == [
        "train", "closed"
    ]  # fmt: skip


# --- Pictures


def test_a_report_is_drawn_whatever_back_end_a_notebook_has_set(tmp_path: Path) -> None:
    given = configs.load("demo", [*SMALL, f"run.dir={tmp_path / 'run'}"])
    harness.train(given)
    for backend in ("module://matplotlib_inline.backend_inline", "no such back end"):
        result = subprocess.run(
            [sys.executable, "-m", "localpipe", "report", str(tmp_path / "run")],
            env={**os.environ, "MPLBACKEND": backend},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "report.html").exists()


def test_say_prints_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    say("a line")
    output.warn("another")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("a line\n", "another\n")

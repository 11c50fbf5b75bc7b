"""The live view: one screen on a terminal, plain lines without one, and no invented numbers."""

from __future__ import annotations

import io
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from localpipe.errors import UserError
from localpipe.pipeline.workers.steps import StepSchedule
from localpipe.plan.formats import format_duration
from localpipe.runs import progress
from localpipe.runs.progress import View
from localpipe.runs.trackers import (
    WeightsAndBiases,
    build_trackers,
    check_wandb,
    scalars,
)
from tests.harness import settings

SCHEDULE = StepSchedule(train_size=640, test_size=64, batch=64, epochs=10)  # 100 steps


def record(stage: int, step: int, wall_s: float, **more: Any) -> dict[str, Any]:
    shares = {"busy": 0.5, "receive_wait": 0.25, "send_wait": 0.25, "samples_per_s": 320.0}
    values = {
        "loss": 0.1234 + stage,
        "peak_memory_bytes": 2**30,
        **shares,
        "wall_s": wall_s,
        **more,
    }
    return {"kind": "train", "epoch": 2, "stage": stage, "step": step, **values}


def a_view(tmp_path: Path, width: int = 80, processes: int = 4) -> tuple[View, Console]:
    console = Console(
        width=width, height=40, file=io.StringIO(), force_terminal=False, color_system=None
    )
    return View(
        settings(tmp_path / "run", pipeline={"processes": processes}), SCHEDULE, console
    ), console


def screen(shown: View, console: Console) -> str:
    console.print(shown.build_screen())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def filled(tmp_path: Path, width: int) -> tuple[View, str]:
    """Return the view of four stages after steps 10 and 20, a second a step.

    Stage 1 is two steps ahead of stage 2.
    """
    shown, console = a_view(tmp_path, width)
    for step in (10, 20):
        for stage, late in ((0, 0.0), (1, 0.0), (2, 2.0), (3, 2.5)):
            shown.add(record(stage, step, step + late))
    accuracies = (0.5, None, 0.75, 0.875)
    for stage, accuracy in enumerate(accuracies):
        shown.add(
            {
                "kind": "eval",
                "split": "test",
                "epoch": 2,
                "step": 20,
                "stage": stage,
                "accuracy": accuracy,
                "loss": 9.9,
            }
        )
    return shown, screen(shown, console)


def cells(text: str, stage: int) -> list[str]:
    """Return the cells of a stage's row."""
    (line,) = (line for line in text.splitlines() if re.match(rf" *{stage}  ", line))
    return re.split(r"\s{2,}", line.strip())


@pytest.mark.parametrize("width", [80, 120])
def test_the_screen_fits_the_terminal_and_cuts_nothing_off(tmp_path: Path, width: int) -> None:
    _, text = filled(tmp_path, width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    assert (
        "step 20/100" in text
        and "epoch 2/10" in text
        and "320 samples/s" in text
        and "80 s left" in text
    )


def test_a_row_has_loss_exit_shares_queue_and_memory(tmp_path: Path) -> None:
    _, text = filled(tmp_path, 80)
    assert cells(text, 1) == [
        "1",
        "20",
        "1.1234",
        "-",
        "█████████░░░░▒▒▒▒",
        "50 %",
        "2.0",
        "1,024 MiB",
    ]
    assert (
        cells(text, 3)[3] == "87.5 %" and cells(text, 3)[-2] == "-"
    )  # nothing follows the last stage
    _, text = filled(tmp_path / "wide", 120)
    assert cells(text, 2) == [
        "2", "2", "20", "2.1234", "75.0 %", "█████████░░░░▒▒▒▒",
        "50 %", "25 %", "25 %", "320", "0.5", "1,024 MiB",
    ]  # fmt: skip


def test_stages_of_one_worker_have_no_queue_between_them(tmp_path: Path) -> None:
    shown, console = a_view(tmp_path, processes=2)
    for step in (10, 20):
        for stage in range(4):
            shown.add(record(stage, step, step + stage))
    text = screen(shown, console)
    assert [cells(text, stage)[-2] for stage in range(4)] == ["-", "1.0", "-", "-"]


def test_nothing_is_shown_where_nothing_is_known(tmp_path: Path) -> None:
    shown, console = a_view(tmp_path)
    text = screen(shown, console)
    assert all(
        cells(text, stage) == [str(stage), "0", "-", "-", "-", "-", "-"] for stage in range(4)
    )
    assert "time left unknown" in text
    assert shown.build_line() == "step 0/100, epoch 1, local losses - - - -"
    shown.add(
        {
            "kind": "eval",
            "split": "test",
            "epoch": 1,
            "step": 10,
            "stage": 3,
            "accuracy": None,
            "loss": None,
        }
    )
    assert "accuracy" not in shown.build_line() and "None" not in shown.build_line() + screen(
        shown, console
    )


def test_an_evaluations_loss_is_no_local_loss(tmp_path: Path) -> None:
    shown, text = filled(tmp_path, 80)
    assert "9.9" not in text + shown.build_line()


def test_without_a_terminal_a_line_an_interval_has_no_control_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_INTERVAL_S", 0.0)
    shown, _ = filled(tmp_path, 80)
    shown.refresh()
    shown.refresh()  # nothing new: nothing said
    shown.add(record(0, 20, 20.0))
    shown.refresh()  # the last stage is not there yet
    out = capsys.readouterr().out
    expected = (
        "step 20/100, epoch 2, local losses 0.123 1.123 2.123 3.123, accuracy 87.5 %, "
        "320 samples/s, 80 s left\n"
    )
    assert out == expected and out.isascii() and out.rstrip("\n").isprintable()


def test_on_a_terminal_the_screen_is_drawn_over_itself_and_given_back(tmp_path: Path) -> None:
    console = Console(width=80, height=40, file=io.StringIO(), force_terminal=True)
    shown = View(settings(tmp_path / "run"), SCHEDULE, console)
    shown.add(record(3, 10, 1.0))
    shown.refresh()
    shown.close()
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert (
        "\x1b[?25l" in text and text.rstrip().endswith("\x1b[2K") and "3.1234" in text
    )  # hidden cursor, wiped lines


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(42.4, "42 s"), (99, "99 s"), (700, "12 min"), (11_100, "3 h 05 min"), (187_000, "2 d 4 h")],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


# --- Where else the metrics go


def test_only_numbers_are_drawn() -> None:
    record = {
        "kind": "eval",
        "split": "test",
        "step": 3,
        "stage": 1,
        "accuracy": 0.5,
        "loss": None,
        "wall_s": 1.0,
    }
    assert scalars(record) == {"test/accuracy/stage_1": 0.5}
    assert scalars({"kind": "start", "torch": "2"}) == {}


def test_asking_for_wandb_where_it_is_not_installed_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_wandb(None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="run.wandb is 'mine', but wandb is not installed; pip install wandb"
    ):
        check_wandb("mine")


class _Run:
    """Stands in for a run of Weights & Biases."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.finished = False

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


def test_wandb_gets_what_tensorboard_gets_from_the_first_step_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, asked = _Run(), {}

    def init(**words: Any) -> _Run:
        asked.update(words)
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    first, second = build_trackers(tmp_path / "run", 10, "mine", {"optim": {"lr": 0.1}})
    assert asked["project"] == "mine" and asked["config"] == {"optim": {"lr": 0.1}}
    for step in (5, 10):  # step 5 was logged before the resume
        second.add({"kind": "train", "step": step, "stage": 0, "loss": 0.5, "wall_s": 1.0})
    first.close()
    second.close()
    assert run.logged == [{"step": 10, "train/loss/stage_0": 0.5}] and run.finished


def test_wandb_that_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def init(**words: Any) -> _Run:
        raise RuntimeError("no key\nmore")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(UserError, match="run.wandb 'mine' cannot be used: no key; log in"):
        WeightsAndBiases(tmp_path, 0, "mine", {})


def test_a_worker_that_was_replaced_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line at once, without the ten seconds of other lines; a terminal's display counts them."""
    shown, console = a_view(tmp_path)
    assert "workers replaced" not in screen(shown, console)
    shown.show_note("stage 1 goes on in a new process")
    shown.show_note("stage 2 goes on in a new process")
    assert capsys.readouterr().out.count(" goes on in a new process\n") == 2
    assert "workers replaced: 2" in screen(shown, console)


def test_a_note_stands_above_the_live_display(tmp_path: Path) -> None:
    file = io.StringIO()
    console = Console(width=80, height=40, file=file, force_terminal=True)
    shown = View(settings(tmp_path / "run", pipeline={"processes": 4}), SCHEDULE, console)
    shown.show_note("stage 1 goes on in a new process")
    shown.close()
    assert "stage 1 goes on in a new process\n" in file.getvalue()

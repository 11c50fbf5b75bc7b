"""The live view of a run: one screen for the whole pipeline, or plain lines without a terminal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.errors import LiveError
from rich.live import Live
from rich.table import Table
from rich.text import Text

from localpipe.config.resolved import Resolved
from localpipe.errors import first_line
from localpipe.output import make_console, say, warn
from localpipe.pipeline.workers.mesh import find_rank
from localpipe.pipeline.workers.steps import StepSchedule
from localpipe.plan.formats import format_duration, format_number, format_percent
from localpipe.runs.recorded_run import Record
from localpipe.tasks.metric import ACCURACY, Metric

_INTERVAL_S = 10.0  # between lines without a terminal
_RECENT = 20  # training records of the last stage from which the time left is estimated
_WIDE = 110  # columns of a terminal with room for every number
_BAR = 18  # columns of the bar that divides a stage's time
# The key of a record, its sign and style in the bar, its name in the legend.
_TIME_PARTS = (
    ("busy", "█", "blue", "computes"),
    ("receive_wait", "░", "bright_black", "waits to receive"),
    ("send_wait", "▒", "yellow", "waits to send"),
)


class View:
    """The stages as rows on a terminal. Without one, plain lines, at most one every 10 s.

    console: None for standard output. On a terminal that can move its cursor, the live display
    starts at once and holds the terminal until `close`.
    """

    def __init__(
        self,
        config: Resolved,
        schedule: StepSchedule,
        console: Console | None = None,
        metric: Metric = ACCURACY,
    ) -> None:
        self._config = config
        self._metric = metric
        self._schedule = schedule
        if console is None:
            console = make_console(tolerant=True)
        self._console = console
        # The newest values of every stage, and its newest records' times by step.
        self._rows: list[dict[str, Any]] = [{} for _ in range(config.stages)]
        self._times: list[dict[int, float]] = [{} for _ in range(config.stages)]
        # (step, wall_s) of the last stage.
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT)
        self._is_new = False  # there is something that was not shown
        self._is_line_due = False  # and the last stage is part of it
        self._line_time = time.monotonic()
        self._notes_shown = 0
        self._live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            self._live = _start_live(self.build_screen(), console)

    def add(self, record: Record) -> None:
        """Take one record of metrics.jsonl. It is shown by the next `refresh`.

        Records of other kinds than `train` and `eval` and validation records are ignored.
        """
        if record["kind"] not in ("train", "eval") or record.get("split") == "validation":
            return
        stage = record["stage"]
        is_last = stage == len(self._rows) - 1
        row = self._rows[stage]
        if record["kind"] == "train":
            row.update(record)
            self._add_time(stage, record["step"], record["wall_s"])
            if is_last:
                self._recent.append((record["step"], record["wall_s"]))
        else:
            value = record.get(self._metric.name)
            row.update(metric=value, epoch=record["epoch"], step=record["step"])
        self._is_new = True
        self._is_line_due |= is_last

    def _add_time(self, stage: int, step: int, wall_s: float) -> None:
        times = self._times[stage]
        times[step] = wall_s
        if len(times) > _RECENT:
            del times[min(times)]

    def refresh(self) -> None:
        """Show what was added since the last call.

        On a terminal it draws at once. Without one it prints a line to standard output, if the last
        stage has a new record and the last line is 10 s old.
        """
        if not self._is_new:
            return
        if self._live is not None:
            self._live.update(self.build_screen(), refresh=True)
            self._is_new = False
        elif self._is_line_due and time.monotonic() - self._line_time >= _INTERVAL_S:
            self._line_time = time.monotonic()
            self._is_new = False
            self._is_line_due = False
            say(self.build_line())

    def show_note(self, text: str) -> None:
        """Print a line above the live display, or to standard output. It never waits for a record.

        The live display counts such lines.
        """
        self._notes_shown += 1
        if self._live is None:
            say(text)
            return
        self._live.console.print(text, highlight=False, soft_wrap=True)
        self._live.update(self.build_screen(), refresh=True)

    def close(self) -> None:
        """Remove the live display and release the terminal. A second call does nothing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def build_screen(self) -> Group:
        """Return the progress of the whole pipeline, a row for every stage, and a legend, for rich.

        Values that no record has yet are a dash, or 0 for steps.
        """
        config = self._config
        last = self._rows[-1]
        title = Text(f"{config.model.name} on {config.data.name}: {config.run.dir}", style="bold")
        parts = [self._describe_step(), f"epoch {self._epoch()}/{self._schedule.last_epoch}"]
        if "samples_per_s" in last:
            parts.append(f"{last['samples_per_s']:,.0f} samples/s")
        left_s = self._left_s()
        if left_s is None:
            parts.append("time left unknown")
        else:
            parts.append(f"{format_duration(left_s)} left")
        if self._notes_shown:
            parts.append(f"workers replaced: {self._notes_shown}")
        return Group(
            title, Text("   ".join(parts)), Text(), self._build_table(), Text(), _build_legend()
        )

    def build_line(self) -> str:
        """Return the progress in one plain line, without a newline.

        A stage without a loss yet has a dash. Metric, speed and time left are left out until the
        last stage has recorded them.
        """
        last = self._rows[-1]
        losses = [format_number(row.get("loss"), 3) for row in self._rows]
        parts = [
            self._describe_step(),
            f"epoch {self._epoch()}",
            f"local losses {' '.join(losses)}",
        ]
        if last.get("metric") is not None:
            parts.append(f"{self._metric.words} {self._metric.format(last['metric'])}")
        if "samples_per_s" in last:
            parts.append(f"{last['samples_per_s']:.0f} samples/s")
        left_s = self._left_s()
        if left_s is not None:
            parts.append(f"{format_duration(left_s)} left")
        return ", ".join(parts)

    def _describe_step(self) -> str:
        return f"step {self._rows[-1].get('step', 0)}/{self._schedule.steps}"

    def _epoch(self) -> int:
        return int(self._rows[-1].get("epoch", 1))

    def _build_table(self) -> Table:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        # A terminal of 80 columns has no room for a long name.
        exit_name = "exit acc" if self._metric == ACCURACY else f"exit {self._metric.words}"
        before = ["stage", "step", "loss", exit_name]
        after = ["busy", "ahead", "memory"]
        if self._is_wide:
            before = ["stage", "rank", "step", "loss", exit_name]
            after = ["busy", "receive", "send", "samples/s", "ahead", "memory"]
        for name in before:
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("time", no_wrap=True)
        for name in after:
            table.add_column(name, justify="right", no_wrap=True)
        for stage in range(len(self._rows)):
            table.add_row(*self._build_cells(stage))
        return table

    def _build_cells(self, stage: int) -> list[str | Text]:
        """Return the cells of a stage's row, in the order of the columns."""
        row = self._rows[stage]
        cells: list[str | Text] = [str(stage)]
        if self._is_wide:
            cells.append(str(self._rank(stage)))
        cells += [
            str(row.get("step", 0)),
            format_number(row.get("loss"), 4),
            self._metric.format(row.get("metric")),
            _build_bar(row),
            format_percent(row.get("busy"), 0),
        ]
        if self._is_wide:
            cells += [
                format_percent(row.get("receive_wait"), 0),
                format_percent(row.get("send_wait"), 0),
                format_number(row.get("samples_per_s"), 0),
            ]
        cells.append(format_number(self._steps_ahead(stage), 1))
        cells.append(_format_memory(row.get("peak_memory_bytes")))
        return cells

    @property
    def _is_wide(self) -> bool:
        return self._console.width >= _WIDE

    def _rank(self, stage: int) -> int:
        return find_rank(stage, 0, self._config.replicas, self._config.pipeline.processes)

    def _step_s(self) -> float | None:
        """Return the seconds of a step, with the evaluations and checkpoints between steps."""
        if len(self._recent) < 2:
            return None
        first_step, start_s = self._recent[0]
        last_step, end_s = self._recent[-1]
        if last_step <= first_step or end_s <= start_s:
            return None
        return (end_s - start_s) / (last_step - first_step)

    def _left_s(self) -> float | None:
        """Return the seconds until the end of the run."""
        step_s = self._step_s()
        if step_s is None:
            return None
        steps_left: int = self._schedule.steps - self._rows[-1].get("step", 0)
        return step_s * steps_left

    def _steps_ahead(self, stage: int) -> float | None:
        """Return by how many steps a stage is ahead of the next one.

        These are the messages between them and the one in work. It is estimated from the times at
        which both recorded the same step. On several hosts it is as good as their clocks.
        """
        step_s = self._step_s()
        is_last = stage + 1 == len(self._rows)
        if step_s is None or is_last or self._rank(stage) == self._rank(stage + 1):
            return None
        times, next_times = self._times[stage], self._times[stage + 1]
        common_steps = times.keys() & next_times.keys()
        if not common_steps:
            return None
        step = max(common_steps)
        return max(0.0, (next_times[step] - times[step]) / step_s)


def _start_live(screen: Group, console: Console) -> Live | None:
    """Start a live display and return it, None where another one has the terminal."""
    live = Live(screen, console=console, auto_refresh=False, transient=True)
    try:
        live.start()
    except LiveError as error:
        warn(f"localpipe: no live view: {first_line(error)}")
        return None
    return live


def _build_bar(row: Mapping[str, Any]) -> Text:
    """Draw how a stage's time divides.

    The rest is the other stages of its worker, evaluations and checkpoints.
    """
    bar = Text()
    for key, sign, style, _ in _TIME_PARTS:
        bar.append(sign * round(_BAR * row.get(key, 0.0)), style=style)
    bar.truncate(_BAR, pad=True)
    return bar


def _build_legend() -> Text:
    legend = Text()
    for _, sign, style, name in _TIME_PARTS:
        legend.append(f"{sign} ", style=style).append(f"{name}  ")
    legend.append("ahead: steps before the next")
    return legend


def _format_memory(value: int | None) -> str:
    if value is None:
        return "-"
    return f"{value / 2**20:,.0f} MiB"

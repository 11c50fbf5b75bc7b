"""What a person sees: one screen for the whole pipeline while a run goes on, and the table at its end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from localpipe.config.resolved import Resolved
from localpipe.pipeline.workers.mesh import rank_of
from localpipe.pipeline.workers.steps import StepSchedule

_INTERVAL_S = 10.0  # between lines where there is no terminal
_RECENT = 20  # training records of the last stage that the time left is told from
_WIDE = 110  # columns of a terminal that has room for every number
_BAR = 18
_SHARES = (
    ("busy", "█", "blue"),
    ("receive_wait", "░", "bright_black"),
    ("send_wait", "▒", "yellow"),
)


class View:
    """Stages as rows on a terminal; one plain line an interval without one."""

    def __init__(
        self, config: Resolved, course: StepSchedule, console: Console | None = None
    ) -> None:
        self.course = course
        self._config = config
        self._console = console if console is not None else Console()
        self._stages: list[dict[str, Any]] = [{} for _ in range(config.pipeline.stages or 0)]
        self._recent: deque[tuple[int, float]] = deque(
            maxlen=_RECENT
        )  # (step, wall_s) of the last stage
        self._times: list[dict[int, float]] = [
            {} for _ in self._stages
        ]  # step to wall_s, of the newest records
        self._live: Live | None = None
        self._changed = self._ended = (
            False  # something is new; the whole pipeline has done something
        )
        self._printed = time.monotonic()
        if self._console.is_terminal:
            self._live = Live(
                self.screen(), console=self._console, auto_refresh=False, transient=True
            )
            self._live.start()

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in one record of metrics.jsonl."""
        if record["kind"] not in ("train", "eval") or record.get("split") == "validation":
            return
        stage = record["stage"]
        shown = self._stages[stage]
        if record["kind"] == "train":
            shown.update(record)
            times = self._times[stage]
            times[record["step"]] = record["wall_s"]
            if len(times) > _RECENT:
                del times[min(times)]
            if stage == len(self._stages) - 1:
                self._recent.append((record["step"], record["wall_s"]))
        else:
            shown.update(accuracy=record["accuracy"], epoch=record["epoch"], step=record["step"])
        self._changed = True
        self._ended |= stage == len(self._stages) - 1

    def refresh(self) -> None:
        """Show what has changed."""
        if not self._changed:
            return
        if self._live is not None:
            self._live.update(self.screen(), refresh=True)
            self._changed = False
        elif self._ended and time.monotonic() - self._printed >= _INTERVAL_S:
            self._printed, self._changed, self._ended = time.monotonic(), False, False
            print(self.line(), flush=True)

    def close(self) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def screen(self) -> Group:
        """Return the whole pipeline: what it has done and has left, then a row for every stage."""
        config, last = self._config, self._stages[-1]
        title = Text(f"{config.model.name} on {config.data.name}: {config.run.dir}", style="bold")
        words = [
            f"step {last.get('step', 0)}/{self.course.steps}",
            f"epoch {self._epoch()}/{self.course.epochs}",
        ]
        if "samples_per_s" in last:
            words.append(f"{last['samples_per_s']:,.0f} samples/s")
        left = self._left_s()
        words.append("time left unknown" if left is None else f"{_duration(left)} left")
        legend = Text()
        for (_, sign, style), what in zip(
            _SHARES, ("computes", "waits to receive", "waits to send"), strict=True
        ):
            legend.append(f"{sign} ", style=style).append(f"{what}  ")
        legend.append("ahead: steps before the next")
        return Group(title, Text("   ".join(words)), Text(), self._table(), Text(), legend)

    def line(self) -> str:
        """Return the same in one plain line; a stage without a loss yet has a dash."""
        last = self._stages[-1]
        losses = " ".join(_number(shown.get("loss"), 3) for shown in self._stages)
        words = [
            f"step {last.get('step', 0)}/{self.course.steps}",
            f"epoch {self._epoch()}",
            f"local losses {losses}",
        ]
        if last.get("accuracy") is not None:
            words.append(f"accuracy {_percent(last['accuracy'])}")
        if "samples_per_s" in last:
            words.append(f"{last['samples_per_s']:.0f} samples/s")
        if (left := self._left_s()) is not None:
            words.append(f"{_duration(left)} left")
        return ", ".join(words)

    def _table(self) -> Table:
        wide = self._console.width >= _WIDE
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for name in ("stage", *(["rank"] if wide else []), "step", "loss", "exit acc"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("time", no_wrap=True)
        numbers = ("busy", "receive", "send", "samples/s") if wide else ("busy",)
        for name in (*numbers, "ahead", "memory"):
            table.add_column(name, justify="right", no_wrap=True)
        for stage, shown in enumerate(self._stages):
            shares = [_percent(shown.get(key), 0) for key, _, _ in _SHARES]
            cells = [*shares, _number(shown.get("samples_per_s"), 0)] if wide else shares[:1]
            table.add_row(
                str(stage),
                *([str(self._rank(stage))] if wide else []),
                str(shown.get("step", 0)),
                _number(shown.get("loss"), 4),
                _percent(shown.get("accuracy")),
                _bar(shown),
                *cells,
                _number(self._ahead(stage), 1),
                _memory(shown.get("peak_memory_bytes")),
            )
        return table

    def _rank(self, stage: int) -> int:
        processes = self._config.pipeline.processes
        assert isinstance(processes, int)
        return rank_of(stage, 0, self._config.replicas, processes)

    def _epoch(self) -> int:
        return int(self._stages[-1].get("epoch", 1))

    def _pace_s(self) -> float | None:
        """Return seconds a step, evaluations and checkpoints between them included."""
        if len(self._recent) < 2:
            return None
        (first, begin), (last, end) = self._recent[0], self._recent[-1]
        return (end - begin) / (last - first) if last > first and end > begin else None

    def _left_s(self) -> float | None:
        pace = self._pace_s()
        return (
            None if pace is None else pace * (self.course.steps - self._stages[-1].get("step", 0))
        )

    def _ahead(self, stage: int) -> float | None:
        """Return by how many steps a stage is ahead of the next one: the messages between them, and the one in work.

        Told from the times at which both recorded the same step; on several hosts it is as good as their clocks.
        """
        pace = self._pace_s()
        if (
            pace is None
            or stage + 1 == len(self._stages)
            or self._rank(stage) == self._rank(stage + 1)
        ):
            return None
        common = self._times[stage].keys() & self._times[stage + 1].keys()
        if not common:
            return None
        step = max(common)
        return max(0.0, (self._times[stage + 1][step] - self._times[stage][step]) / pace)


def _bar(shown: Mapping[str, Any]) -> Text:
    """Draw how a stage's time divides; what is left is its worker's other stages, evaluation and checkpoints."""
    bar = Text()
    for key, sign, style in _SHARES:
        bar.append(sign * round(_BAR * shown.get(key, 0.0)), style=style)
    bar.truncate(_BAR, pad=True)
    return bar


def _percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _memory(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.0f} MiB"


def _duration(seconds: float) -> str:
    """Write seconds as 42 s, 12 min, 3 h 05 min or 2 d 4 h."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{hours // 24} d {hours % 24} h"

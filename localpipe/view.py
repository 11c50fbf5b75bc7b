"""What a person sees: a live table while a run goes on (on a terminal only), and the table at its end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from localpipe.config import Config
from localpipe.loader import Course

_INTERVAL_S = 10.0  # between lines where there is no terminal


class View:
    """Stages as rows on a terminal; one plain line an interval without one."""

    def __init__(self, config: Config, course: Course) -> None:
        self.course = course
        self._config = config
        self._console = Console()
        self._stages: list[dict[str, Any]] = [{} for _ in range(config.pipeline.stages or 0)]
        self._live: Live | None = None
        self._changed, self._printed = False, time.monotonic()
        if self._console.is_terminal:
            self._live = Live(self._table(), console=self._console, auto_refresh=False, transient=True)
            self._live.start()

    def add(self, record: Mapping[str, Any]) -> None:
        """Take in one record of metrics.jsonl."""
        if record["kind"] not in ("train", "eval") or record.get("split") == "validation":
            return
        shown = self._stages[record["stage"]]
        if record["kind"] == "train":
            shown.update(record)
        else:
            shown.update(accuracy=record["accuracy"], epoch=record["epoch"], step=record["step"])
        self._changed = True

    def refresh(self) -> None:
        """Show what has changed."""
        if not self._changed:
            return
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            self._changed = False
        elif time.monotonic() - self._printed >= _INTERVAL_S:
            self._printed, self._changed = time.monotonic(), False
            print(self._line(), flush=True)

    def close(self) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _table(self) -> Table:
        config = self._config
        table = Table(title=f"{config.model.name} on {config.data.name}: {config.run.dir}", title_justify="left")
        for name in ("stage", "step", "epoch", "local loss", "exit accuracy", "busy", "waits", "samples/s"):
            table.add_column(name, justify="right")
        for stage, shown in enumerate(self._stages):
            waits = shown.get("receive_wait", 0.0) + shown.get("send_wait", 0.0)
            table.add_row(
                str(stage),
                f"{shown.get('step', 0)}/{self.course.steps}",
                str(shown.get("epoch", "")),
                _number(shown.get("loss"), 4),
                _percent(shown.get("accuracy")),
                _percent(shown.get("busy")),
                _percent(waits) if "busy" in shown else "",
                _number(shown.get("samples_per_s"), 0),
            )
        return table

    def _line(self) -> str:
        last = self._stages[-1]
        losses = " ".join(_number(shown.get("loss"), 3) or "-" for shown in self._stages)
        words = [
            f"step {last.get('step', 0)}/{self.course.steps}",
            f"epoch {last.get('epoch', 1)}",
            f"local losses {losses}",
        ]
        if last.get("accuracy") is not None:
            words.append(f"accuracy {_percent(last['accuracy'])}")
        if "samples_per_s" in last:
            words.append(f"{last['samples_per_s']:.0f} samples/s")
        return ", ".join(words)


def print_summary(summary: Mapping[str, Any], run_dir: str) -> None:
    """Print the table of a finished run."""
    table = Table(title=f"{run_dir}: {summary['steps']} steps in {summary['wall_s']:.0f} s", title_justify="left")
    for name in ("stage", "local loss", "exit accuracy", "busy share", "KiB saved/sample"):
        table.add_column(name, justify="right")
    rows = zip(
        summary["loss_per_stage"],
        summary["test_accuracy_per_stage"],
        summary["busy_share_per_stage"],
        summary["saved_activation_bytes_per_sample"],
        strict=True,
    )
    for stage, (loss, accuracy, busy, saved) in enumerate(rows):
        table.add_row(str(stage), _number(loss, 4), _percent(accuracy), _percent(busy), f"{saved / 1024:,.0f}")
    console = Console()
    console.print(table)
    console.print(
        f"whole network: accuracy {_percent(summary['test_accuracy'])}, best {_percent(summary['best_test_accuracy'])} "
        f"in epoch {summary['best_epoch']}",
        highlight=False,
    )
    if summary["train_samples_per_s"] is not None:
        efficiency = summary["efficiency"]
        told = (
            "workers x threads exceed the cores, so no efficiency"
            if efficiency is None
            else f"efficiency {efficiency:.2f}"
        )
        console.print(
            f"speed: {summary['train_samples_per_s']:.0f} samples/s with {summary['processes']} processes, bound "
            f"{summary['bound_samples_per_s']:.0f} (from spans), {told}",
            highlight=False,
        )
    console.print(f"weights {summary['weights_sha256']}", highlight=False, soft_wrap=True)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"

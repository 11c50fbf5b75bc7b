"""`localpipe eval`: the task's metric for every stage's exit and for the whole network."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localpipe.cli.command import Command, add_run_dir, to_path

if TYPE_CHECKING:
    from rich.table import Table


def run(arguments: argparse.Namespace) -> int:
    """Evaluate a run's newest checkpoint, print the figures, and return 0.

    `--json` prints JSON instead. Raises UserError without a run or a checkpoint, for a wrong
    override, and for the run's own code without `--trust`. Raises RunError if the weights do not
    fit.
    """
    from localpipe.output import make_console
    from localpipe.results.evaluate import evaluate
    from localpipe.runs.directory import RunDirectory

    run_dir = to_path(arguments.run_dir)
    code = None if arguments.trust else ()  # names of user code that may be imported
    config = RunDirectory(run_dir).config(code, arguments.overrides)
    records = evaluate(run_dir, config)
    if arguments.json:
        print(json.dumps({"schema": 1, "stages": records}))
        return 0
    make_console().print(_exit_table(run_dir, records))
    print(f"whole network: accuracy {100 * records[-1]['accuracy']:.2f} %")
    return 0


def _exit_table(run_dir: Path, records: Sequence[Mapping[str, Any]]) -> Table:
    """Return a row for every stage's exit."""
    from rich.table import Table

    table = Table(title=f"{run_dir} after step {records[-1]['step']}", title_justify="left")
    for name in ("stage", "exit accuracy", "exit loss", "samples"):
        table.add_column(name, justify="right")
    for record in records:
        accuracy, loss = "-", "-"
        if record["accuracy"] is not None:
            accuracy, loss = f"{100 * record['accuracy']:.2f} %", f"{record['loss']:.4f}"
        table.add_row(str(record["stage"]), accuracy, loss, str(record["samples"]))
    return table


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_dir(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    about = "import the code that the run directory names"
    parser.add_argument("--trust", action="store_true", help=about)


COMMAND = Command(
    "the task's metric for every stage's exit and for the whole network", _add_arguments, run
)

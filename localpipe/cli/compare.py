"""`localpipe compare`: runs beside each other."""

from __future__ import annotations

import argparse
import json

from localpipe.cli.command import RUN_DIR, Command, to_path


def run(arguments: argparse.Namespace) -> int:
    """Print the figures of runs, a row for those that differ only in seed, and return 0.

    `--json` prints JSON instead. Raises UserError for a directory that is no run.
    """
    from localpipe.output import make_console
    from localpipe.results.compare import (
        compare_runs,
        comparison_json,
        comparison_notes,
        comparison_table,
    )

    folders = [to_path(folder) for folder in [*arguments.run_dirs, *arguments.overrides]]
    comparison = compare_runs(folders)
    if arguments.json:
        print(json.dumps(comparison_json(comparison)))
        return 0
    if comparison.groups:
        make_console().print(comparison_table(comparison))
    for note in comparison_notes(comparison):
        print(note)
    return 0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help=RUN_DIR)
    parser.add_argument("--json", action="store_true", help="print JSON")


COMMAND = Command(
    "runs that differ only in seed grouped: mean +- sample deviation (n)", _add_arguments, run
)

"""`localpipe report`: pictures of a run on one page."""

from __future__ import annotations

import argparse

from localpipe.cli.command import RUN_DIR, Command, optional_path, to_path
from localpipe.environment import draw_without_display
from localpipe.errors import UserError


def run(arguments: argparse.Namespace) -> int:
    """Write the page and its pictures, print the files, one a line, and return 0.

    Raises UserError for a second run directory, and what `write_report` raises.
    """
    draw_without_display()
    from localpipe.results.report.page import write_report

    for word in arguments.overrides:
        raise UserError(
            f"command line: report takes one run directory; got {word!r} beside {arguments.run_dir}"
        )
    for path in write_report(to_path(arguments.run_dir), optional_path(arguments.output)):
        print(path)
    return 0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", help=RUN_DIR)
    text = "the page (RUN_DIR/report.html); PNG files go beside it"
    parser.add_argument("-o", "--output", metavar="FILE", help=text)


COMMAND = Command(
    "pictures on one page: curves per stage, timeline of all stages, memory", _add_arguments, run
)

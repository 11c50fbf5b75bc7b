"""`localpipe configs`: the configurations that come with localpipe."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap

from localpipe.cli.command import Command
from localpipe.config import shipped
from localpipe.errors import UserError, suggest


def run(arguments: argparse.Namespace) -> int:
    """List the configurations, or print one, and return 0.

    Raises UserError if there is none of that name, and for a second word.
    """
    for word in arguments.overrides:
        raise UserError(f"command line: configs prints one configuration; got {word!r} too")
    if arguments.name is None:
        _list_configs()
        return 0
    path = shipped.find_path(arguments.name)
    if path is None:
        advice = suggest(arguments.name, shipped.list_names())
        raise UserError(f"configs: there is no {arguments.name!r}; {advice}")
    print(path.read_text(encoding="utf-8"), end="")
    return 0


def _list_configs() -> None:
    """Print a line for each configuration, folded where the terminal is narrower."""
    columns = 10_000
    if sys.stdout.isatty():
        columns = shutil.get_terminal_size().columns
    margin = max(map(len, shipped.list_names())) + 2
    for name in shipped.list_names():
        width = max(20, columns - margin)
        lines = textwrap.wrap(shipped.describe(name), width, break_on_hyphens=False) or [""]
        first = f"{name:<{margin}}{lines[0]}"
        print(f"\n{'':{margin}}".join([first, *lines[1:]]))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="print this one")


COMMAND = Command(
    "list the configurations that come with localpipe, or print one", _add_arguments, run
)

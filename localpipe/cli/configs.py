"""`localpipe configs`: the configurations that come with localpipe."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap

from localpipe.cli.command import Command
from localpipe.config import shipped
from localpipe.errors import UserError, suggest

_INDENT = "    "
_NARROW = 40  # columns, in which no word is broken


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
    """Print a line for each configuration, on a terminal its name and below it the text, folded."""
    names = shipped.list_names()
    if not sys.stdout.isatty():
        margin = max(map(len, names)) + 2
        for name in names:
            print(f"{name:<{margin}}{shipped.describe(name)}")
        return
    width = max(_NARROW, shutil.get_terminal_size().columns)
    for name in names:
        print(name)
        print(
            textwrap.fill(
                shipped.describe(name),
                width,
                initial_indent=_INDENT,
                subsequent_indent=_INDENT,
                break_on_hyphens=False,
            )
        )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="print this one")


COMMAND = Command(
    "list the configurations that come with localpipe, or print one", _add_arguments, run
)

"""`localpipe doctor`: is this machine ready."""

from __future__ import annotations

import argparse

from localpipe.cli.command import Command, to_path
from localpipe.errors import UserError


def run(arguments: argparse.Namespace) -> int:
    """Check this machine, print the results, and return 1 if a check is an error, else 0.

    Raises UserError for a word that is no flag, and for a `--dir` that is no directory.
    """
    from localpipe.doctor.doctor import doctor

    if arguments.overrides:
        raise UserError(
            f"command line: doctor takes no {arguments.overrides[0]}; see localpipe doctor --help"
        )
    return doctor(arguments.quick, arguments.json, to_path(arguments.dir))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    about = "without the pings and with a small file: a health check"
    parser.add_argument("--quick", action="store_true", help=about)
    about = "the directory that will hold run directories (.)"
    parser.add_argument("--dir", default=".", help=about)


COMMAND = Command(
    "is this machine ready: versions, devices, links, a two-rank ping, memory, disk; "
    "status 1 if not",
    _add_arguments,
    run,
)

"""`localpipe train`: starts its own workers, or joins those that torchrun started."""

from __future__ import annotations

import argparse

from localpipe.cli.command import Command, add_config
from localpipe.config.keys import Config
from localpipe.environment import (
    die_with_parent,
    foreign_launcher,
    launcher_problem,
    under_torchrun,
)
from localpipe.errors import UserError
from localpipe.output import warn


def run(arguments: argparse.Namespace) -> int:
    """Train a configuration, and return the exit status.

    Under torchrun this process is one worker, and ends inside. Else it returns what
    `localpipe.runs.train.train` returns, and raises what that raises. Raises UserError for a
    mistake in the configuration.
    """
    if under_torchrun():
        _check_launcher()
        die_with_parent()  # before the slow imports, for torchrun may be killed meanwhile
    from localpipe import config as configs

    def read_config() -> Config:
        return configs.load(arguments.config, arguments.overrides)

    if under_torchrun():
        from localpipe.runs import train_worker

        return train_worker.main(read_config)
    config = read_config()
    from localpipe.runs.train import train

    return train(config)


def _check_launcher() -> None:
    """Say where RANK and WORLD_SIZE come from, if not from torchrun; raise UserError if wrong."""
    problem = launcher_problem()
    if problem is not None:
        raise UserError(f"train: {problem}")
    note = foreign_launcher()
    if note is not None:
        warn(f"localpipe: {note}")


class _Keys(argparse.Action):
    """Prints every key and ends, like --help."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from localpipe.config import reference

        print("\n".join(reference.format_lines()).lstrip())
        parser.exit()


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    text = "print every key, its default and choices, and end"
    parser.add_argument("--keys", action=_Keys, nargs=0, help=text)


COMMAND = Command(
    "train: starts its own workers, or uses those that torchrun started", _add_arguments, run
)

"""Command: what each file of the command line offers, and the arguments that commands share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_OVERRIDES = "replaces a key of the configuration; `localpipe train --keys` prints them all"
_CONFIG = "a YAML configuration, or the name of one that comes with localpipe"
RUN_DIR = "the directory of a run"


@dataclass(frozen=True)
class Command:
    """One command: its line of help, its arguments, and what runs it.

    `add_arguments` gets the command's own parser. `run` gets the parsed arguments and returns the
    exit status, or raises UserError or RunError. Its module imports what is slow inside `run`, so
    that `--help` stays fast.
    """

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the arguments `config` (a str) and `overrides` (a list of str, [] by default)."""
    parser.add_argument("config", help=_CONFIG)
    _add_overrides(parser)


def add_run_dir(parser: argparse.ArgumentParser) -> None:
    """Add the arguments `run_dir` (a str) and `overrides` (a list of str, [] by default)."""
    parser.add_argument("run_dir", help=RUN_DIR)
    _add_overrides(parser)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help=_OVERRIDES
    )


def optional_path(text: str | None) -> Path | None:
    """Return a flag's text as a path, None where the flag is not given or empty."""
    return to_path(text) if text else None


def to_path(text: str) -> Path:
    """Return a word of the command line as a path, with a leading ~ as the home directory."""
    return Path(os.path.expanduser(text))


def split_words(text: str) -> list[str]:
    """Return the words of a flag's text, which commas separate."""
    return [word.strip() for word in text.split(",")]

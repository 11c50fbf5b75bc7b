"""The command line: finds the command, parses its arguments, turns errors into one line."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

import localpipe
from localpipe.cli.command import Command
from localpipe.config import registry
from localpipe.errors import RunError, UserError, suggest, to_line
from localpipe.output import escape_what_cannot_be_encoded, open_closed_streams, warn

_DESCRIPTION = "Train neural networks cut into gradient-isolated stages, each in its own process."


_OUTPUT_ERRORS = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit status.

    argv: the words after `localpipe`, None for those of this process. The status is 2 for a
    UserError and 1 for a RunError, both printed to standard error in one line. It is 130 after
    Ctrl-C, and 1 if the reader of standard output has gone or its disk is full. It is 2 too for a
    path that cannot be used. `--help` and `--version` raise SystemExit. Any other exception passes
    through.
    """
    open_closed_streams()
    escape_what_cannot_be_encoded()
    try:
        arguments = parse_arguments(argv)
        command: Command = arguments.command
        status = command.run(arguments)
        sys.stdout.flush()
        return status
    except UserError as error:
        warn(f"localpipe: {error}")
        return 2
    except RunError as error:
        warn(f"localpipe: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if isinstance(error.filename, str | bytes):
            path = to_line(os.fsdecode(error.filename))
            warn(f"localpipe: files: cannot use {path}: {error.strerror}; give another path")
            return 2
        if not _is_of_output(error):
            raise
        if not isinstance(error, BrokenPipeError):
            advice = "redirect it elsewhere"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                advice = "free space"
            warn(f"localpipe: standard output cannot be written: {error.strerror}; {advice}")
        # Python flushes standard output at the end: give it a place where that cannot fail.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _is_of_output(error: OSError) -> bool:
    """Return whether an error is of standard output: an error of a file of ours names the file."""
    return error.filename is None and error.errno in _OUTPUT_ERRORS


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, like every other mistake's."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; see {self.prog} --help")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the words of a command. Overrides may stand on either side of a flag.

    argv: as `main` gets it. The result has `command` (a Command), `overrides` (also words that no
    argument takes), and the command's own arguments. Raises UserError for an unknown command or
    flag and for missing arguments, SystemExit after `--help` and `--version`.
    """
    words = sys.argv[1:] if argv is None else argv
    parser, parsers = build_parser()
    if words and not words[0].startswith("-") and words[0] not in parsers:
        raise UserError(
            f"command line: {words[0] or repr('')} is no command; {suggest(words[0], parsers)}"
        )

    # What argparse does not recognise is a mistyped flag or an override after a flag.
    arguments, rest = parser.parse_known_args(words)
    for word in rest:
        if word.startswith("-") and words[0] not in parsers:
            raise UserError(f"command line: {word} stands before the command; see localpipe --help")
        if word.startswith("-"):
            flags = re.findall(r"(?<![\w-])--[\w-]+", parsers[words[0]].format_help())
            advice = suggest(word, {*flags})
            raise UserError(f"command line: {words[0]} has no flag {word}; {advice}")
    arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def build_parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Return the parser of the whole command line, and that of every command by its name.

    It imports the module of every command. The parsers raise UserError for a mistake.
    """
    parser = _Parser(prog="localpipe", description=_DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"localpipe {localpipe.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in registry.COMMANDS:
        command: Command = registry.look_up(registry.COMMANDS, name, "command line")
        subparser = commands.add_parser(
            name, help=command.help, description=command.help, allow_abbrev=False
        )
        subparser.set_defaults(command=command, overrides=[])
        command.add_arguments(subparser)
    return parser, commands.choices

"""The command line."""

from __future__ import annotations

from collections.abc import Sequence

from localpipe.environment import interrupts_end_imports


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit status, as `localpipe.cli.command_line.main` does.

    Ctrl-C during an import ends the process at once with status 130, also during the first ones.
    """
    with interrupts_end_imports():
        from localpipe.cli import command_line

        return command_line.main(argv)

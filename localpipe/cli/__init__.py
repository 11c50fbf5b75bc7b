"""The command line."""

from localpipe.cli.command_line import main as main

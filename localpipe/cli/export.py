"""`localpipe export`: one file out of a run, and a model card beside it."""

from __future__ import annotations

import argparse

from localpipe.cli.command import Command, add_run_dir, to_path


def run(arguments: argparse.Namespace) -> int:
    """Write a run's network, print the files, one a line, and return 0.

    Raises what `export` raises, and UserError for a wrong override and for the run's own code
    without `--trust`.
    """
    from localpipe.config.load import as_resolved
    from localpipe.results.export import export
    from localpipe.runs.directory import RunDirectory

    run_dir = to_path(arguments.run_dir)
    code = None if arguments.trust else ()  # names of user code that may be imported
    config = as_resolved(RunDirectory(run_dir).config(code, arguments.overrides))
    for path in export(run_dir, config, to_path(arguments.output), arguments.exit):
        print(path)
    return 0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_dir(parser)
    text = "the file to write: .pt, .safetensors or .pt2"
    parser.add_argument("-o", "--output", required=True, help=text)
    text = "only up to a stage, with its own exit"
    parser.add_argument("--exit", type=int, default=None, metavar="STAGE", help=text)
    text = "import the code that the run directory names"
    parser.add_argument("--trust", action="store_true", help=text)


COMMAND = Command(
    "write the weights (.pt or .safetensors), a program (.pt2), and a model card",
    _add_arguments,
    run,
)

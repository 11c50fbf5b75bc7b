"""The command line: `localpipe train | eval | export | plan | bench | configs`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import localpipe
from localpipe import launched
from localpipe.errors import RunError, UserError

_OVERRIDES = "section.key=value words that replace keys of the configuration"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 2 for a user's mistake, 1 for anything else that fails."""
    try:
        arguments = _parse(argv)
        status: int = arguments.command(arguments)
        return status
    except UserError as error:
        print(f"localpipe: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"localpipe: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, like every other mistake's."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; see {self.prog} --help")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse, letting overrides stand on either side of a flag."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    for word in rest:
        if word.startswith("-"):
            parser.error(f"{word} is not a known flag")
    arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _train(arguments: argparse.Namespace) -> int:
    if launched.under_torchrun():
        launched.die_with_parent()  # before the slow imports, for torchrun may be killed meanwhile
    from localpipe import config

    def given() -> config.Config:
        return config.load(arguments.config, arguments.overrides)

    if launched.under_torchrun():
        from localpipe import process

        return process.main(given)
    parsed = given()
    from localpipe import launcher

    return launcher.train(parsed)


def _eval(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from localpipe.evaluate import evaluate
    from localpipe.saved import read_config

    run_dir = Path(arguments.run_dir)
    records = evaluate(run_dir, read_config(run_dir, arguments.overrides, arguments.trust))
    if arguments.json:
        print(json.dumps({"schema": 1, "stages": records}))
        return 0
    table = Table(title=f"{run_dir} after step {records[-1]['step']}", title_justify="left")
    for name in ("stage", "exit accuracy", "exit loss", "samples"):
        table.add_column(name, justify="right")
    for record in records:
        known = record["accuracy"] is not None
        table.add_row(
            str(record["stage"]),
            f"{100 * record['accuracy']:.2f} %" if known else "",
            f"{record['loss']:.4f}" if known else "",
            str(record["samples"]),
        )
    Console().print(table)
    print(f"whole network: accuracy {100 * records[-1]['accuracy']:.2f} %")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from localpipe.export import export
    from localpipe.saved import read_config

    run_dir = Path(arguments.run_dir)
    config = read_config(run_dir, arguments.overrides, arguments.trust)
    for path in export(run_dir, config, Path(arguments.output), arguments.exit):
        print(path)
    return 0


def _configs(arguments: argparse.Namespace) -> int:
    from localpipe import shipped
    from localpipe.errors import suggest

    if arguments.name is None:
        width = max(map(len, shipped.names()))
        print("\n".join(f"{name:<{width}}  {shipped.about(name)}" for name in shipped.names()))
        return 0
    path = shipped.path_of(arguments.name)
    if path is None:
        raise UserError(f"configs: there is no {arguments.name!r}; {suggest(arguments.name, shipped.names())}")
    print(path.read_text(encoding="utf-8"), end="")
    return 0


class _Keys(argparse.Action):
    """Prints every key and ends, like --help."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from localpipe import reference

        print("\n".join(reference.lines()).lstrip())
        parser.exit()


def _plan(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from localpipe import config, data, job, planner

    given = config.load(arguments.config, arguments.overrides)
    resolved = job.resolve(given, data.load(given.data, given.run.seed))
    blueprint, plans = job.plans_of(resolved, job.image_of(resolved))
    costs = planner.measure(blueprint, plans, resolved)
    if arguments.json:
        print(json.dumps(planner.as_json(plans, costs)))
    else:
        Console().print(planner.table(plans, costs))
        print("\n".join(planner.crossings(plans)))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from localpipe import config
    from localpipe.bench.launch import bench

    given = config.load(arguments.config, arguments.overrides)
    return bench(given, Path(arguments.json) if arguments.json else None, arguments.windows, arguments.window_s)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="localpipe",
        description="Train neural networks cut into gradient-isolated stages, each in its own process.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"localpipe {localpipe.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], what: str, target: str, of: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=what, description=what, allow_abbrev=False)
        added.add_argument(target, help=of)
        added.add_argument("overrides", nargs="*", metavar="section.key=value", help=_OVERRIDES)
        added.set_defaults(command=run)
        return added

    a_config = ("config", "a YAML configuration, or the name of one that comes with localpipe")
    a_run = ("run_dir", "the directory of a run")
    train = command("train", _train, "train; starts its own workers, or uses those that torchrun started", *a_config)
    train.add_argument("--keys", action=_Keys, nargs=0, help="print every key, its default and choices, and end")
    evaluate = command("eval", _eval, "the task's metric for every stage's exit and for the whole network", *a_run)
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    export = command(
        "export", _export, "write the weights (.pt or .safetensors), a program (.pt2), and a model card", *a_run
    )
    export.add_argument("-o", "--output", required=True, help="the file to write: .pt, .safetensors or .pt2")
    export.add_argument("--exit", type=int, default=None, metavar="STAGE", help="only up to a stage, with its own exit")
    for added in (evaluate, export):
        added.add_argument("--trust", action="store_true", help="import the code that the run directory names")
    plan = command("plan", _plan, "the cut, what crosses each boundary, parameters, MACs, memory", *a_config)
    plan.add_argument("--json", action="store_true", help="print JSON")
    bench = command("bench", _bench, "throughput beside the bound, in paired windows", *a_config)
    bench.add_argument("--json", metavar="FILE", help="write the figures to a file")
    bench.add_argument("--windows", type=int, default=9, help="pairs of windows (9)")
    bench.add_argument("--window-s", type=float, default=3.0, help="seconds of a window (3)")
    listed = commands.add_parser("configs", help="list the configurations that come with localpipe, or print one")
    listed.add_argument("name", nargs="?", help="print this one")
    listed.set_defaults(command=_configs, overrides=[])
    return parser

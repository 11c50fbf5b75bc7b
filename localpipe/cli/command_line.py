"""The command line: `localpipe train | eval | export | plan | bench | report | compare | configs | doctor`."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import localpipe
from localpipe import data
from localpipe.config.keys import Config
from localpipe.environment import die_with_parent, under_torchrun
from localpipe.errors import RunError, UserError, suggest

_OVERRIDES = "replaces a key of the configuration; `localpipe train --keys` prints them all"


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
    words = sys.argv[1:] if argv is None else argv
    parser, commands = _parser()
    if words and not words[0].startswith("-") and words[0] not in commands:
        raise UserError(f"command line: {words[0]} is no command; {suggest(words[0], commands)}")
    arguments, rest = parser.parse_known_args(words)
    for word in rest:
        if word.startswith("-"):
            flags = re.findall(r"(?<![\w-])--[\w-]+", commands[words[0]].format_help())
            raise UserError(
                f"command line: {words[0]} has no flag {word}; {suggest(word, {*flags})}"
            )
    arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _train(arguments: argparse.Namespace) -> int:
    if under_torchrun():
        die_with_parent()  # before the slow imports, for torchrun may be killed meanwhile
    from localpipe import config as configs

    def given() -> Config:
        return configs.load(arguments.config, arguments.overrides)

    if under_torchrun():
        from localpipe.runs import train_worker

        return train_worker.main(given)
    parsed = given()
    from localpipe.runs.train import train

    return train(parsed)


def _eval(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from localpipe.results.evaluate import evaluate
    from localpipe.runs.directory import read_config

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
            f"{100 * record['accuracy']:.2f} %" if known else "-",
            f"{record['loss']:.4f}" if known else "-",
            str(record["samples"]),
        )
    Console().print(table)
    print(f"whole network: accuracy {100 * records[-1]['accuracy']:.2f} %")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from localpipe.config.load import as_resolved
    from localpipe.results.export import export
    from localpipe.runs.directory import read_config

    run_dir = Path(arguments.run_dir)
    config = as_resolved(read_config(run_dir, arguments.overrides, arguments.trust))
    for path in export(run_dir, config, Path(arguments.output), arguments.exit):
        print(path)
    return 0


def _configs(arguments: argparse.Namespace) -> int:
    from localpipe.config import shipped

    if arguments.name is None:
        _list_configs()
        return 0
    path = shipped.path_of(arguments.name)
    if path is None:
        raise UserError(
            f"configs: there is no {arguments.name!r}; {suggest(arguments.name, shipped.names())}"
        )
    print(path.read_text(encoding="utf-8"), end="")
    return 0


def _list_configs() -> None:
    """Print one line each; folded where a terminal is narrower."""
    from localpipe.config import shipped

    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    margin = max(map(len, shipped.names())) + 2
    for name in shipped.names():
        told = textwrap.wrap(
            shipped.describe(name), max(20, columns - margin), break_on_hyphens=False
        ) or [""]
        print(f"\n{'':{margin}}".join([f"{name:<{margin}}{told[0]}", *told[1:]]))


class _Keys(argparse.Action):
    """Prints every key and ends, like --help."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from localpipe.config import reference

        print("\n".join(reference.lines()).lstrip())
        parser.exit()


def _plan(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from localpipe import config as configs
    from localpipe.cli.plan_freeze import write_frozen
    from localpipe.pipeline.stages.stage_plan import build_plans
    from localpipe.plan.cluster.forecast import forecast_on_cluster
    from localpipe.plan.cluster.tables import forecast_json, forecast_remarks, forecast_tables
    from localpipe.plan.costs import count_costs
    from localpipe.plan.notes import plan_notes
    from localpipe.plan.predict import THIS, describe_stages, predict_cuts, profile_for
    from localpipe.plan.resolve_here import resolve_here
    from localpipe.plan.tables import (
        add_memory,
        describe_crossings,
        memory_table,
        plan_json,
        plan_table,
        prediction_table,
    )

    given = configs.load(arguments.config, arguments.overrides)
    dataset = data.load(given.data, given.run.seed)
    file = Path(arguments.profile) if arguments.profile else None
    profile = profile_for(given, dataset, arguments.measure, file)
    resolved = resolve_here(given, dataset, profile=profile)
    blueprint, plans = build_plans(resolved)
    costs = count_costs(blueprint, plans, resolved)
    predicted = {} if profile is None else predict_cuts(resolved, profile)
    found = None
    if arguments.cluster is not None:
        known = (given, resolved, dataset, blueprint, plans, costs)
        found = forecast_on_cluster(*known, arguments.cluster, arguments.micro_batches)
    if arguments.freeze is not None:
        write_frozen(resolved, Path(arguments.freeze))
    if arguments.json:
        this = predicted.pop(THIS, None)
        shown = add_memory(plan_json(plans, costs, this, predicted), plans, costs, resolved)
        print(json.dumps(shown if found is None else {**shown, "cluster": forecast_json(found)}))
        return 0
    console = Console()
    console.print(plan_table(plans, costs))
    print("\n".join([*describe_crossings(plans), *plan_notes(resolved)]))
    if predicted:
        console.print()
        console.print(prediction_table(predicted))
        print("\n".join(describe_stages(predicted[THIS])))
    if found is None:
        console.print()
        console.print(memory_table(plans, costs, resolved))
    else:
        for table in forecast_tables(found):
            console.print()
            console.print(table)
        console.print()
        print("\n".join(forecast_remarks(found)))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    import shlex

    from localpipe import config as configs
    from localpipe.bench.launch import run_bench
    from localpipe.bench.memory import run_memory
    from localpipe.config.load import update

    given = configs.load(arguments.config, arguments.overrides)
    typed = shlex.join(["localpipe", "bench", arguments.config, *arguments.overrides])
    target = Path(arguments.json) if arguments.json else None
    if arguments.memory:
        return run_memory(given, target)
    asked = {
        f"bench.{key}": getattr(arguments, key)
        for key in ("systems", "micro_batches", "windows", "window_s")
        if getattr(arguments, key) is not None
    }
    picture = Path(arguments.picture) if arguments.picture else None
    return run_bench(update(given, asked), target, picture, typed)


def _report(arguments: argparse.Namespace) -> int:
    from localpipe.results.report.page import write_report

    for word in arguments.overrides:
        raise UserError(
            f"command line: report takes one run directory; got {word!r} beside {arguments.run_dir}"
        )
    for path in write_report(
        Path(arguments.run_dir), Path(arguments.output) if arguments.output else None
    ):
        print(path)
    return 0


def _compare(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from localpipe.results.compare import (
        compare_runs,
        comparison_json,
        comparison_notes,
        comparison_table,
    )

    found = compare_runs([Path(folder) for folder in [*arguments.run_dirs, *arguments.overrides]])
    if arguments.json:
        print(json.dumps(comparison_json(found)))
        return 0
    if found.groups:
        Console().print(comparison_table(found))
    for note in comparison_notes(found):
        print(note)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from localpipe.doctor.checks import doctor

    if arguments.overrides:
        raise UserError(
            f"command line: doctor takes no {arguments.overrides[0]}; see localpipe doctor --help"
        )
    return doctor(arguments.quick, arguments.json, Path(arguments.dir))


def _parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Return the parser, and that of every command by its name."""
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
        added.add_argument(
            "overrides", nargs="*", default=[], metavar="section.key=value", help=_OVERRIDES
        )
        added.set_defaults(command=run)
        return added

    a_config = ("config", "a YAML configuration, or the name of one that comes with localpipe")
    a_run = ("run_dir", "the directory of a run")
    train = command(
        "train",
        _train,
        "train: starts its own workers, or uses those that torchrun started",
        *a_config,
    )
    train.add_argument(
        "--keys", action=_Keys, nargs=0, help="print every key, its default and choices, and end"
    )
    evaluate = command(
        "eval", _eval, "the task's metric for every stage's exit and for the whole network", *a_run
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    export = command(
        "export",
        _export,
        "write the weights (.pt or .safetensors), a program (.pt2), and a model card",
        *a_run,
    )
    export.add_argument(
        "-o", "--output", required=True, help="the file to write: .pt, .safetensors or .pt2"
    )
    export.add_argument(
        "--exit",
        type=int,
        default=None,
        metavar="STAGE",
        help="only up to a stage, with its own exit",
    )
    for added in (evaluate, export):
        added.add_argument(
            "--trust", action="store_true", help="import the code that the run directory names"
        )
    plan = command(
        "plan", _plan, "the cut, what crosses each boundary, parameters, MACs, memory", *a_config
    )
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument(
        "--measure",
        action="store_true",
        help="measure the blocks on this machine and predict the speed",
    )
    plan.add_argument(
        "--profile", metavar="FILE", help="predict from a profile; with --measure, write it there"
    )
    plan.add_argument(
        "--cluster",
        metavar="FILE",
        help="compare localpipe with its peers on the machines of a YAML file",
    )
    plan.add_argument(
        "--micro-batches",
        metavar="N,N",
        help="micro-batches of the synchronous peers (K and 4 K for K workers)",
    )
    plan.add_argument(
        "--freeze",
        metavar="FILE",
        help="write the configuration with every automatic choice made explicit",
    )
    bench = command(
        "bench", _bench, "throughput and memory beside the peers, and beside the bound", *a_config
    )
    bench.add_argument("--json", metavar="FILE", help="write the figures to a file")
    bench.add_argument(
        "--picture",
        metavar="FILE",
        help="draw throughput, memory and timelines: .png, .svg or .pdf",
    )
    bench.add_argument("--systems", type=_words, metavar="A,B", help="only these rows")
    bench.add_argument(
        "--micro-batches", type=_counts, metavar="N,M", help="of the peers that have them (4)"
    )
    bench.add_argument("--windows", type=int, help="windows of each system, in turn (7)")
    bench.add_argument("--window-s", type=float, help="seconds of a window (3)")
    bench.add_argument(
        "--memory", action="store_true", help="only memory: end to end, checkpointing, every method"
    )
    what = "pictures on one page: curves per stage, timeline of all stages, memory"
    report = commands.add_parser("report", help=what, description=what, allow_abbrev=False)
    report.add_argument(*a_run[:1], help=a_run[1])
    report.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="the page (RUN_DIR/report.html); PNG files go beside it",
    )
    report.set_defaults(command=_report, overrides=[])
    what = "runs that differ only in seed grouped: mean +- sample deviation (n)"
    compare = commands.add_parser("compare", help=what, description=what, allow_abbrev=False)
    compare.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help=a_run[1])
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.set_defaults(command=_compare, overrides=[])
    about = "is this machine ready: versions, devices, links, a two-rank ping, memory, disk; status 1 if not"
    check = commands.add_parser("doctor", help=about, description=about, allow_abbrev=False)
    check.add_argument("--json", action="store_true", help="print JSON")
    check.add_argument(
        "--quick",
        action="store_true",
        help="without the pings and with a small file: a health check",
    )
    check.add_argument(
        "--dir", default=".", help="the directory that will hold run directories (.)"
    )
    check.set_defaults(command=_doctor, overrides=[])
    what = "list the configurations that come with localpipe, or print one"
    listed = commands.add_parser("configs", help=what, description=what, allow_abbrev=False)
    listed.add_argument("name", nargs="?", help="print this one")
    listed.set_defaults(command=_configs, overrides=[])
    return parser, commands.choices


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _counts(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of numbers; write 4 or 2,4,8"
        ) from None

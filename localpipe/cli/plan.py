"""`localpipe plan`: the cut, what crosses each boundary, parameters, MACs, memory, speed."""

from __future__ import annotations

import argparse
import json

from localpipe.cli.command import Command, add_config, optional_path


def run(arguments: argparse.Namespace) -> int:
    """Plan a configuration, print the tables, or JSON, and return 0.

    `--freeze` writes its file before anything is printed. Raises UserError for a mistake in the
    configuration or the flags, RunError if a file cannot be written or a measurement fails.
    """
    from localpipe import config as configs
    from localpipe.plan.whole_plan import check_outputs, make_plan

    config = configs.load(arguments.config, arguments.overrides)
    profile, freeze = optional_path(arguments.profile), optional_path(arguments.freeze)
    # Without --measure the profile is read.
    check_outputs(profile if arguments.measure else None, freeze)
    plan = make_plan(
        config,
        measure=arguments.measure,
        profile_file=profile,
        cluster=arguments.cluster,
        micro_batches=arguments.micro_batches,
    )
    if freeze is not None:
        plan.freeze(freeze)
    if arguments.json:
        print(json.dumps(plan.as_json()))
    else:
        plan.print()
    return 0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    text = "measure the blocks on this machine and predict the speed"
    parser.add_argument("--measure", action="store_true", help=text)
    text = "predict from a profile; with --measure, write it there"
    parser.add_argument("--profile", metavar="FILE", help=text)
    text = "compare localpipe with its peers on the machines of a YAML file"
    parser.add_argument("--cluster", metavar="FILE", help=text)
    text = "micro-batches of the synchronous peers (K and 4 K for K workers)"
    parser.add_argument("--micro-batches", metavar="N,N", help=text)
    text = "write the configuration with every automatic choice made explicit"
    parser.add_argument("--freeze", metavar="FILE", help=text)


COMMAND = Command(
    "the cut, what crosses each boundary, parameters, MACs, memory", _add_arguments, run
)

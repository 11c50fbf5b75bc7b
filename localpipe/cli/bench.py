"""`localpipe bench`: throughput and memory beside the peers, and beside the bound."""

from __future__ import annotations

import argparse
import shlex

from localpipe.cli.command import Command, add_config, optional_path, split_words
from localpipe.environment import draw_without_display

_KEYS = ("systems", "micro_batches", "windows", "window_s")  # of the section `bench`


def run(arguments: argparse.Namespace) -> int:
    """Measure a configuration beside its peers, or only memory, and return the exit status.

    The status is 0, or 128 + signal after a stop. Raises UserError for a mistake in the
    configuration or the flags, RunError if the measurement fails or a file cannot be written.
    """
    draw_without_display()
    from localpipe import config as configs
    from localpipe.bench.launch import run_bench
    from localpipe.bench.links.run import find_counts, run_link_bench
    from localpipe.bench.memory import run_memory
    from localpipe.config.load import update
    from localpipe.errors import UserError

    config = configs.load(arguments.config, arguments.overrides)
    target = optional_path(arguments.json)
    if arguments.memory:
        if arguments.link is not None:
            raise UserError("bench: --memory has no --link; leave one of them out")
        return run_memory(config, target)

    # A flag replaces the configuration's own key.
    values = {}
    for key in _KEYS:
        value = getattr(arguments, key)
        if value is not None:
            values[f"bench.{key}"] = value
    command = shlex.join(["localpipe", "bench", arguments.config, *arguments.overrides])
    if arguments.link is not None:
        if arguments.picture is not None:
            raise UserError("bench: --link draws no --picture; leave it out")
        counts = find_counts(config, arguments.micro_batches)
        return run_link_bench(update(config, values), arguments.link, target, command, counts)
    return run_bench(update(config, values), target, optional_path(arguments.picture), command)


def _parse_counts(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of numbers; write 4 or 2,4,8"
        ) from None


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file")
    text = "draw throughput, memory and timelines: .png, .svg or .pdf"
    parser.add_argument("--picture", metavar="FILE", help=text)
    parser.add_argument("--systems", type=split_words, metavar="A,B", help="only these rows")
    text = "of the peers that have them (4)"
    parser.add_argument("--micro-batches", type=_parse_counts, metavar="N,M", help=text)
    parser.add_argument("--windows", type=int, help="windows of each system, in turn (8)")
    parser.add_argument("--window-s", type=float, help="seconds of a window (3)")
    text = "on TCP links of 100mbit, or 1gbit,5ms, or r=0.9 (transfer / compute), beside open ones"
    parser.add_argument("--link", metavar="RATE[,DELAY]", help=text)
    text = "only memory: end to end, checkpointing, every method"
    parser.add_argument("--memory", action="store_true", help=text)


COMMAND = Command(
    "throughput and memory beside the peers, and beside the bound", _add_arguments, run
)

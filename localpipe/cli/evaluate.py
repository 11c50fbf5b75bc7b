"""`localpipe eval`: the task's metric for every stage's exit and for the whole network."""

from __future__ import annotations

import argparse
import json

from localpipe.cli.command import Command, add_run_dir, optional_path, to_path
from localpipe.errors import to_line


def run(arguments: argparse.Namespace) -> int:
    """Evaluate a run's newest checkpoint, print the figures, and return 0.

    `--json` prints JSON instead, and `--predictions` writes a file before anything is printed.
    Raises UserError without a run or a checkpoint, for a wrong override, for data or a file that
    cannot be used, and for the run's own code without `--trust`. Raises RunError if the weights do
    not fit.
    """
    from localpipe.config.resume import EVALUATION_KEYS
    from localpipe.files import check_output_path
    from localpipe.output import make_console, warn
    from localpipe.results.evaluate import evaluate
    from localpipe.results.evaluation_tables import ensemble_line, evaluation_tables, metric_line
    from localpipe.runs.directory import RunDirectory

    directory = RunDirectory(to_path(arguments.run_dir))
    code = None if arguments.trust else ()  # names of user code that may be imported
    config = directory.config(code, arguments.overrides, EVALUATION_KEYS, reads_data=True)
    file = optional_path(arguments.predictions)
    if file is not None:
        check_output_path("eval: --predictions", file)
    evaluation = evaluate(directory.path, config, file is not None, arguments.ensemble)
    if file is not None and evaluation.predictions is not None:
        evaluation.predictions.write_csv(file)

    for note in evaluation.notes:
        warn(note)
    if arguments.json:
        print(json.dumps(evaluation.as_json()))
        return 0
    console = make_console()
    for table in evaluation_tables(to_line(directory.title), evaluation):
        console.print(table)
    print(metric_line(evaluation))
    if evaluation.ensemble is not None:
        print(ensemble_line(evaluation.ensemble, evaluation.metric))
    return 0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_dir(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    text = "write the target and the prediction of every sample into a CSV file"
    parser.add_argument("--predictions", metavar="FILE", help=text)
    text = (
        "also average the class probabilities of all exits that were trained, equally or with the "
        "weight 2^k of stage k; predictions stay those of the whole network"
    )
    parser.add_argument("--ensemble", choices=("mean", "2^k"), help=text)
    text = "import the code that the run directory names"
    parser.add_argument("--trust", action="store_true", help=text)


COMMAND = Command(
    "the task's metric for every stage's exit and for the whole network", _add_arguments, run
)

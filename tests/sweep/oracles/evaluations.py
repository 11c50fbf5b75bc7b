"""Evaluations: `eval` of a run says what its summary says."""

from __future__ import annotations

from tests.sweep.oracles.numbers import impossible_numbers
from tests.sweep.oracles.tables import has_row
from tests.sweep.trial import Trial, read_json


def check_eval(trial: Trial) -> None:
    """Metric and loss of every exit are those after the last step, in JSON and in the table."""
    assert trial.trained
    result = trial.run("eval", trial.run_dir, "--json", "--trust")
    records = read_json(result.stdout)["stages"]
    for sentence in impossible_numbers(records):
        trial.find(result, sentence)
    trial.expect_equal(result, "number of stages", len(records), trial.summary["stages"])
    table = trial.run("eval", trial.run_dir, "--trust")
    for record in records:
        stage = record["stage"]
        expected = trial.final_record(stage)
        for key in (trial.metric.name, "loss", "samples", "step"):
            trial.expect_equal(
                result, f"{key} of stage {stage}", record.get(key), expected.get(key)
            )
        cells = [
            str(stage),
            trial.metric.format(record[trial.metric.name], 2),
            str(record["samples"]),
        ]
        trial.expect(has_row(table.stdout, cells), table, f"the table has no row {cells}")

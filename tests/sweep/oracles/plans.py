"""Plans: what `plan` counts is what the run's summary says, and its table what its JSON says."""

from __future__ import annotations

from typing import Any

from tests.sweep.forks.runner import Result
from tests.sweep.oracles.numbers import impossible_numbers
from tests.sweep.oracles.tables import has_row
from tests.sweep.trial import BASE, Trial, read_json


def check_plan(trial: Trial) -> None:
    """The plan of the words and of the run's config.yaml are one, and the summary's."""
    assert trial.trained
    config_file = trial.run_dir / "config.yaml"
    result = trial.run("plan", config_file, "--json")
    plan = read_json(result.stdout)
    check_numbers(trial, result, plan)
    _compare_with_summary(trial, result, plan)
    if trial.config["pipeline"]["cuts"] != "time" and not _measures(trial):
        words = trial.run("plan", BASE, *trial.words, "--json")
        trial.expect(
            read_json(words.stdout) == plan, words, "another plan than that of the run's config"
        )
    check_table(trial, plan, trial.run("plan", config_file))


def _measures(trial: Trial) -> bool:
    return "pipeline.cuts=time" in trial.words


def check_numbers(trial: Trial, result: Result, plan: dict[str, Any]) -> None:
    for sentence in impossible_numbers(plan):
        trial.find(result, sentence)


def _compare_with_summary(trial: Trial, result: Result, plan: dict[str, Any]) -> None:
    summary, totals = trial.summary, plan["totals"]
    saved = [stage["activation_bytes_per_sample"] for stage in plan["stages"]]
    for key, value in (
        ("stages", len(plan["stages"])),
        ("aux_params", totals["aux_params"]),
        ("context_params", totals["context_params"]),
        ("train_macs_per_sample", totals["train_macs"]),
        ("inference_macs_per_sample", totals["macs"] + totals["context_macs"]),
        ("saved_activation_bytes_per_sample", saved),
    ):
        trial.expect_equal(result, f"{key} beside the summary's", value, summary[key])


def check_table(trial: Trial, plan: dict[str, Any], result: Result) -> None:
    """Compare the cells of the first table with JSON."""
    rows = [(str(stage["stage"]), stage) for stage in plan["stages"]]
    for name, figures in [*rows, ("all", plan["totals"])]:
        cells = [
            name,
            f"{figures['params']:,}",
            f"{figures['macs'] / 1e6:.2f}",
            f"{figures['aux_params']:,}",
            f"{figures['aux_macs'] / 1e6:.2f}",
            f"{figures['activation_bytes_per_sample'] / 1024:,.0f}",
        ]
        trial.expect(has_row(result.stdout, cells), result, f"the table has no row {cells}")

"""Forecasts: `plan --measure` and `plan --cluster`."""

from __future__ import annotations

from tests import ROOT
from tests.sweep.oracles.plans import check_numbers, check_table
from tests.sweep.oracles.tables import has_row
from tests.sweep.trial import BASE, Trial, read_json

_CLUSTER = ROOT / "configs" / "clusters" / "internet_8.yaml"


def check_measured(trial: Trial) -> None:
    """A measured plan predicts a speed; from its profile alone the prediction is the same."""
    profile = trial.runner.folder / f"profile_{trial.number}.json"
    words = ("plan", BASE, *trial.words, "--profile", profile)
    result = trial.run(*words, "--measure", "--json")
    plan = read_json(result.stdout)
    check_numbers(trial, result, plan)
    trial.expect(plan["predicted"] is not None, result, "nothing is predicted")
    again = trial.run(*words, "--json")
    trial.expect_equal(
        again,
        "prediction from the profile",
        read_json(again.stdout)["predicted"],
        plan["predicted"],
    )
    check_table(trial, plan, trial.run(*words))


def check_cluster(trial: Trial) -> None:
    """A forecast has possible numbers, and the plan's counts in its table."""
    words = ("plan", BASE, *trial.words, "--cluster", _CLUSTER)
    result = trial.run(*words, "--json")
    plan = read_json(result.stdout)
    check_numbers(trial, result, plan)
    systems = plan["cluster"]["systems"]
    names = [row["system"] for row in systems]
    trial.expect("localpipe" in names, result, f"no row of localpipe in {names}")
    table = trial.run(*words)
    for row in systems:
        cells = [row["system"], str(row["devices"])]
        if row["samples_per_s"] is not None:
            cells += [f"{row['formula_samples_per_s']:,.0f}", f"{row['samples_per_s']:,.0f}"]
        if "pipeline.cuts=time" not in trial.words:
            trial.expect(has_row(table.stdout, cells), table, f"the table has no row {cells}")
    if "pipeline.cuts=time" not in trial.words:
        check_table(trial, plan, table)
    trial.expect("bottleneck: " in table.stdout, table, "no bottleneck is named")

"""Pages of runs: `report` and `compare`."""

from __future__ import annotations

from pathlib import Path

from tests.sweep.oracles.numbers import impossible_numbers
from tests.sweep.oracles.tables import has_row
from tests.sweep.trial import Trial, read_json


def check_report(trial: Trial) -> None:
    """The files that are named are there, and the page has the summary's metric and digest."""
    assert trial.trained
    result = trial.run("report", trial.run_dir)
    files = [Path(line) for line in result.stdout.splitlines()]
    for file in files:
        trial.expect(file.exists() and file.stat().st_size > 0, result, f"{file} is not there")
    pages = [file for file in files if file.suffix == ".html"]
    trial.expect(len(pages) == 1, result, f"{len(pages)} pages")
    page = pages[0].read_text(encoding="utf-8")
    value = trial.metric.format(trial.summary["metric"]["value"])
    trial.expect(value in page.replace("&nbsp;", " "), result, f"the page lacks {value}")
    trial.expect(trial.summary["weights_sha256"][:8] in page, result, "the page lacks the digest")


def check_compare(trial: Trial) -> None:
    """A run beside the first one: two rows, or one where only free keys and the seed differ."""
    assert trial.trained
    first = trial.runner.folder / "first"
    result = trial.run("compare", first, trial.run_dir, "--json")
    content = read_json(result.stdout)
    for sentence in impossible_numbers(content):
        trial.find(result, sentence)
    runs = [run for group in content["groups"] for run in group["runs"]]
    trial.expect_equal(result, "runs", sorted(runs), sorted([str(first), str(trial.run_dir)]))
    group = next(each for each in content["groups"] if str(trial.run_dir) in each["runs"])
    values = group["metric_last"]["values"]
    trial.expect(trial.summary["metric"]["value"] in values, result, "another metric")
    table = trial.run("compare", first, trial.run_dir)
    for number, each in enumerate(content["groups"], 1):
        cells = [str(number), str(each["n"]), f"{each['train_macs_per_sample'] / 1e6:,.1f}"]
        trial.expect(has_row(table.stdout, cells), table, f"the table has no row {cells}")

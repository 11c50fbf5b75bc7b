"""Benchmarks: rows with possible figures, the table's beside JSON's, and memory."""

from __future__ import annotations

from typing import Any

from tests.sweep.oracles.numbers import impossible_numbers
from tests.sweep.oracles.tables import has_row
from tests.sweep.trial import BASE, Trial, read_json


def check_bench(trial: Trial) -> None:
    """Every system that is asked for has a row with figures, or a note."""
    target = trial.runner.folder / f"bench_{trial.number}.json"
    result = trial.run("bench", BASE, *trial.words, "--json", target)
    content = read_json(target.read_text(encoding="utf-8"))
    for sentence in impossible_numbers(content["rows"]):
        trial.find(result, sentence)
    asked, got = content["config"]["bench"]["systems"], [row["system"] for row in content["rows"]]
    trial.expect(set(asked) == set(got), result, f"rows of {got}, asked for {asked}")
    for row in content["rows"]:
        if row["note"] is not None:
            trial.expect("Error" not in row["note"], result, f"{row['system']}: {row['note']}")
            continue
        shape = f"{row['processes']} x {_show_threads(row['threads'])}"
        cells = [_label(row), shape, f"{row['samples_per_s']:.1f}"]
        trial.expect(has_row(result.stdout, cells), result, f"the table has no row {cells}")
        windows = content["config"]["bench"]["windows"]
        trial.expect_equal(
            result, f"windows of {row['system']}", len(row["samples_per_s_runs"]), windows
        )


def _show_threads(threads: int | list[int]) -> str:
    """Return the threads of a process, or those of each: 2, or 1,3."""
    if isinstance(threads, int):
        return str(threads)
    return ",".join(map(str, threads))


def _label(row: dict[str, Any]) -> str:
    accumulating = ("localpipe", "sequential", "frozen-copies")
    if row["micro_batches"] is not None and row["system"] in accumulating:
        return f"{row['system']}, {row['micro_batches']}"
    return str(row["system"])


def check_bench_memory(trial: Trial) -> None:
    """Memory is counted for every method, and the table shows it."""
    target = trial.runner.folder / f"memory_{trial.number}.json"
    result = trial.run("bench", BASE, *trial.words, "--memory", "--json", target)
    content = read_json(target.read_text(encoding="utf-8"))
    for sentence in impossible_numbers(content["rows"]):
        trial.find(result, sentence)
    for row in content["rows"]:
        saved = row["saved_activation_bytes_per_sample"]
        trial.expect(saved > 0, result, f"{row['method']} saves nothing")
        cells = [row["method"], str(row["stages"]), f"{saved / 2**10:,.0f}"]
        trial.expect(has_row(result.stdout, cells), result, f"the table has no row {cells}")

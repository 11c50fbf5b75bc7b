"""A run: what `train` prints and leaves."""

from __future__ import annotations

from tests.sweep.oracles.numbers import impossible_numbers
from tests.sweep.oracles.tables import has_row, number, percent
from tests.sweep.trial import Trial

_PER_STAGE = (
    "metric_per_stage",
    "loss_per_stage",
    "busy_s_per_stage",
    "busy_share_per_stage",
    "saved_activation_bytes_per_sample",
)


def check_run(trial: Trial) -> None:
    """The run ends, and its summary, its records and its table say the same."""
    result, summary, config = trial.trained, trial.summary, trial.config
    for sentence in impossible_numbers(summary):
        trial.find(result, f"summary.json: {sentence}")
    for record in trial.records:
        for sentence in impossible_numbers(record):
            trial.find(result, f"metrics.jsonl: {sentence}")

    stages = config["pipeline"]["stages"]
    for key in _PER_STAGE:
        trial.expect_equal(result, f"length of {key}", len(summary[key]), stages)
    processes = config["pipeline"]["processes"]
    trial.expect_equal(result, "workers with a peak", len(summary["peak_memory_bytes"]), processes)
    for key, value in (
        ("stages", stages),
        ("processes", processes),
        ("replicas", config["pipeline"]["replicas"]),
        ("seed", config["run"]["seed"]),
        ("epochs", config["optim"]["epochs"] or trial.final_record(0)["epoch"]),
    ):
        trial.expect_equal(result, f"summary's {key}", summary[key], value)
    _check_metric(trial)
    _check_files(trial)
    for stage in range(stages):
        cells = [
            str(stage),
            number(summary["loss_per_stage"][stage], 4),
            trial.metric.format(summary["metric_per_stage"][stage]),
            percent(summary["busy_share_per_stage"][stage], 1),
            number(summary["saved_activation_bytes_per_sample"][stage] / 1024, 0),
        ]
        trial.expect(has_row(result.stdout, cells), result, f"the table has no row {cells}")
    trial.expect(summary["weights_sha256"] in result.stdout, result, "the digest is not printed")


def _check_metric(trial: Trial) -> None:
    result, summary, metric = trial.trained, trial.summary, trial.metric
    values, last = summary["metric_per_stage"], summary["metric"]["value"]
    trial.expect_equal(result, "metric_per_stage's last", values[-1], last)
    if not trial.config["data"]["validation"]:
        is_best = metric.sort_key(summary["best_metric"]) >= metric.sort_key(last)
        trial.expect(is_best, result, "the best is worse than the last")
    for stage in range(summary["stages"]):
        record = trial.final_record(stage)
        trial.expect_equal(
            result,
            f"{metric.name} of stage {stage} in the summary and in metrics.jsonl",
            values[stage],
            record[metric.name],
        )
    probes = summary["probe_metric_per_stage"]
    has_probe = trial.config["run"]["probe"] == "linear"
    trial.expect_equal(result, "whether there are probes", probes is not None, has_probe)


def _check_files(trial: Trial) -> None:
    result, run = trial.trained, trial.config["run"]
    has_trace = (trial.run_dir / "trace.json").exists()
    trial.expect_equal(result, "whether trace.json is there", has_trace, run["trace"])
    checkpoints = list((trial.run_dir / "checkpoints").glob("step_*"))
    is_kept = 1 <= len(checkpoints) <= run["keep_checkpoints"]
    trial.expect(is_kept, result, f"{len(checkpoints)} checkpoints are there")

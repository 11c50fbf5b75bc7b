"""Digests: one result for any number of processes, depth, recomputation, and after a resume."""

from __future__ import annotations

from typing import Any

from tests.sweep.trial import BASE, Trial

_SAME = ("weights_sha256", "metric_per_stage", "probe_metric_per_stage", "steps")


def check_digests(trial: Trial) -> None:
    """Another run with other free keys, stopped and resumed, has the same weights."""
    _check_same_command(trial)
    steps = trial.summary["steps"]
    words = other_words(trial.config)
    run_dir = trial.run_dir.with_name(f"{trial.run_dir.name}_again")
    if steps > 1 and not _depends_on_steps(trial.config):
        trial.train(str(run_dir), *words, f"optim.max_steps={steps // 2}")
    result = trial.train(str(run_dir), *words, "run.log_every=1", f"optim.max_steps={steps}")
    again = trial.read_summary(run_dir)
    for key in _SAME:
        trial.expect_equal(result, f"{key} after a resume", again[key], trial.summary[key])


def _check_same_command(trial: Trial) -> None:
    """The command of a run, given again, goes on with it: nothing in its record contradicts it."""
    assert trial.trained
    words = ("train", BASE, *trial.words, f"run.dir={trial.run_dir}")
    result = trial.runner.run(*words, "run.resume=auto", "run.overwrite=false")
    trial.expect(result.refusal is None, result, f"is refused when given again: {result.refusal}")


def _depends_on_steps(config: dict[str, Any]) -> bool:
    """Return whether the schedule is as long as max_steps, which a resume may not change then."""
    return config["optim"]["epochs"] is None and config["optim"]["schedule"] not in (
        "constant",
        "multistep",
    )


def other_words(config: dict[str, Any]) -> list[str]:
    """Return the words that change every free key of a run, and keep what was measured."""
    pipeline, run = config["pipeline"], config["run"]
    replicas = pipeline["replicas"]
    stages = pipeline["stages"]
    if isinstance(replicas, int):
        processes = replicas * stages
        if pipeline["processes"] == processes:
            processes = replicas
    else:
        processes = pipeline["processes"]
    threads = run["threads"]
    if isinstance(threads, list):
        threads = threads[0]  # another number of workers has another list
    words = [
        f"pipeline.processes={processes}",
        "pipeline.devices=null",
        "pipeline.memory=null",
        f"pipeline.depth={3 if pipeline['depth'] < 3 else 1}",
        f"pipeline.cuts={pipeline['cuts']}".replace(" ", ""),
        f"run.threads={threads}",
        f"run.trace={str(not run['trace']).lower()}",
        "run.checkpoint_every_s=0",
        "run.keep_checkpoints=3",
        "run.resume=auto",
        "run.overwrite=false",
    ]
    reconcile = config["method"]["reconcile"]
    if run["checkpointing"] == "block":
        words.append("run.checkpointing=none")
    elif reconcile["distance"] == "none" or reconcile["weight"] == 0:
        words.append("run.checkpointing=block")
    return words

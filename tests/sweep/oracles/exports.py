"""Exports: files of a run's network, which give what the run gave."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.sweep.forks.runner import Result
from tests.sweep.trial import FailedError, RefusedError, Trial, read_json

_CLOSE = 1e-3  # of logits, between a program and the network that it was made of


def measure_files(run_dir: str, files: list[str]) -> None:
    """Print as JSON what each file's network gives for the run's test images. A process calls it.

    The run directory is the first of the files. `distance` is the largest from its logits.
    """
    import localpipe
    from localpipe import data
    from localpipe.data.augment import read_batch
    from localpipe.runs.directory import RunDirectory

    torch.set_num_threads(1)
    config = RunDirectory(Path(run_dir)).config(None)
    test = data.load(config.data, config.run.seed).test
    images = torch.from_numpy(read_batch(test, np.arange(len(test))))
    reference: torch.Tensor | None = None
    found = {}
    for file in [run_dir, *files]:
        with torch.no_grad():
            logits = localpipe.load(file, trust=True)(images)
        if reference is None:
            reference = logits
        found[file] = {
            "accuracy": float((logits.argmax(1).numpy() == test.labels).mean()),
            "digest": hashlib.sha256(logits.numpy().tobytes()).hexdigest(),
            "distance": float((logits - reference).abs().max()),
            "largest": float(logits.abs().max()),
        }
    print(json.dumps(found))


def check_export(trial: Trial) -> None:
    """.pt, .safetensors and the run directory load to one network, with the run's accuracy."""
    files = [str(trial.run_dir / name) for name in ("net.pt", "net.safetensors")]
    result, found = _export(trial, files)
    digests = {values["digest"] for values in found.values()}
    trial.expect_equal(result, "different logits of the files", len(digests), 1)
    _check_accuracy(trial, result, found, trial.summary["test_accuracy"])


def check_program(trial: Trial) -> None:
    """A .pt2 gives the logits of the run's network."""
    files = [str(trial.run_dir / "program.pt2")]
    result, found = _export(trial, files)
    _check_distance(trial, result, found[files[0]])
    _check_accuracy(trial, result, found, trial.summary["test_accuracy"])


def check_exits(trial: Trial) -> None:
    """The network up to every stage has that exit's accuracy, or no exit and a refusal."""
    assert trial.trained
    has_probe = trial.config["run"]["probe"] == "linear"
    accuracies = trial.summary["test_accuracy_per_stage"]
    for stage, accuracy in enumerate(accuracies):
        target = str(trial.run_dir / f"exit_{stage}.pt")
        words = ("export", str(trial.run_dir), "-o", target, "--exit", str(stage), "--trust")
        try:
            trial.run(*words)
        except RefusedError as refused:
            has_exit = accuracy is not None or has_probe
            trial.expect(not has_exit, refused.result, f"refused: {refused}")
            continue
        if accuracy is None:
            probes = trial.summary["probe_accuracy_per_stage"]
            trial.expect(probes is not None, trial.trained, f"stage {stage} exports no exit")
            accuracy = probes[stage] if probes else None
        # The run directory's own network is the whole one, so only the accuracy is compared.
        result = trial.require(trial.runner.call(measure_files, str(trial.run_dir), [target]))
        found = read_json(result.stdout)
        _check_accuracy(trial, result, {target: found[target]}, accuracy)


def _export(trial: Trial, files: list[str]) -> tuple[Result, dict[str, Any]]:
    """Export every file and load them; return the last result and what each network gives."""
    assert trial.trained
    for file in files:
        shown = trial.run("export", trial.run_dir, "-o", file, "--trust")
        for line in shown.stdout.splitlines():
            trial.expect(Path(line).exists(), shown, f"{line} is not there")
    loaded = trial.runner.call(measure_files, str(trial.run_dir), files)
    if loaded.status != 0:
        trial.find(shown, f"load: {(loaded.stderr.strip().splitlines() or ['nothing'])[-1]}")
        raise FailedError
    return shown, read_json(loaded.stdout)


def _check_accuracy(
    trial: Trial, result: Result, found: dict[str, Any], expected: float | None
) -> None:
    """Compare accuracies where the run's arithmetic was that of a loaded network, fp32."""
    if not trial.is_exact:
        return
    for file, values in found.items():
        trial.expect_equal(result, f"accuracy of {Path(file).name}", values["accuracy"], expected)


def _check_distance(trial: Trial, result: Result, values: dict[str, Any]) -> None:
    is_close = values["distance"] <= _CLOSE * (1 + values["largest"])
    trial.expect(is_close, result, f"logits differ by {values['distance']}")

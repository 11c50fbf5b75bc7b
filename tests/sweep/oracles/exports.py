"""Exports: files of a run's network, which give what the run gave."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

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
    from localpipe.config.load import as_resolved
    from localpipe.data.batches import BatchReader
    from localpipe.data.dataset import limit_classes
    from localpipe.runs.directory import RunDirectory
    from localpipe.tasks.build_task import build_task
    from localpipe.tasks.task import measure_batch

    torch.set_num_threads(1)
    config = as_resolved(RunDirectory(Path(run_dir)).config(None))
    dataset = data.load(config.data, config.run.seed)
    # An exported network takes images as they are stored, bytes.
    dataset = dataclasses.replace(dataset, augment="none")
    dataset = limit_classes(dataset, config.task, config.model.num_classes)
    samples = len(dataset.test)
    batch = BatchReader(dataset, config.run.seed).read_test(slice(0, samples))
    task = build_task(config.task, config.model.num_classes, config.sample)
    reference: torch.Tensor | None = None
    found = {}
    for file in [run_dir, *files]:
        with torch.no_grad():
            logits = localpipe.load(file, trust=True)(batch[config.inputs.name])
            sums = measure_batch(task, logits, batch["target"])
        if reference is None:
            reference = logits
        found[file] = {
            "metric": task.summarise(sums, samples)[task.metric.name],
            "digest": hashlib.sha256(logits.numpy().tobytes()).hexdigest(),
            "distance": float((logits - reference).abs().max()),
            "largest": float(logits.abs().max()),
        }
    print(json.dumps(found))


def check_export(trial: Trial) -> None:
    """.pt, .safetensors and the run directory load to one network, with the run's metric."""
    files = [str(trial.run_dir / name) for name in ("net.pt", "net.safetensors")]
    result, found = _export(trial, files)
    digests = {values["digest"] for values in found.values()}
    trial.expect_equal(result, "different logits of the files", len(digests), 1)
    _check_metric(trial, result, found, trial.summary["metric"]["value"])


def check_program(trial: Trial) -> None:
    """A .pt2 gives the logits of the run's network."""
    files = [str(trial.run_dir / "program.pt2")]
    result, found = _export(trial, files)
    _check_distance(trial, result, found[files[0]])
    _check_metric(trial, result, found, trial.summary["metric"]["value"])


def check_exits(trial: Trial) -> None:
    """The network up to every stage has that exit's metric, or no exit and a refusal."""
    assert trial.trained
    has_probe = trial.config["run"]["probe"] == "linear"
    for stage, value in enumerate(trial.summary["metric_per_stage"]):
        target = str(trial.run_dir / f"exit_{stage}.pt")
        words = ("export", str(trial.run_dir), "-o", target, "--exit", str(stage), "--trust")
        try:
            trial.run(*words)
        except RefusedError as refused:
            has_exit = value is not None or has_probe
            trial.expect(not has_exit, refused.result, f"refused: {refused}")
            continue
        if value is None:
            probes = trial.summary["probe_metric_per_stage"]
            trial.expect(probes is not None, trial.trained, f"stage {stage} exports no exit")
            value = probes[stage] if probes else None
        # The run directory's own network is the whole one, so only the metric is compared.
        result = trial.require(trial.runner.call(measure_files, str(trial.run_dir), [target]))
        found = read_json(result.stdout)
        _check_metric(trial, result, {target: found[target]}, value)


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


def _check_metric(
    trial: Trial, result: Result, found: dict[str, Any], expected: float | None
) -> None:
    """Compare metrics where the run's arithmetic was that of a loaded network, fp32."""
    if not trial.is_exact:
        return
    for file, values in found.items():
        # Sums of losses differ in their last digits, as the batches do.
        is_same = expected is not None and math.isclose(values["metric"], expected, rel_tol=1e-4)
        text = f"metric of {Path(file).name}: got {values['metric']}, expected {expected}"
        trial.expect(is_same, result, text)


def _check_distance(trial: Trial, result: Result, values: dict[str, Any]) -> None:
    is_close = values["distance"] <= _CLOSE * (1 + values["largest"])
    trial.expect(is_close, result, f"logits differ by {values['distance']}")

"""The theorem under clipped gradients, a moving average, and evaluations by steps."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from localpipe.config.keys import Config
from localpipe.config.load import as_resolved, to_yaml, update
from localpipe.data.augment import read_batch
from localpipe.errors import UserError
from localpipe.pipeline.stages.weights import weight_lines, weights_digest
from localpipe.results.evaluate import evaluate
from localpipe.results.export import export, load
from localpipe.runs.directory import RunDirectory
from localpipe.runs.prepare import prepare
from tests.harness import (
    differences,
    kill_after_a_checkpoint,
    load_images,
    run,
    settings,
    train,
    train_here,
)

ADAMW = {
    "name": "adamw",
    "lr": 0.02,
    "betas": [0.8, 0.95],
    "decay": "matrices",
    "weight_decay": 0.1,
    "clip": 0.5,
    "ema": 0.8,
    "schedule": "poly",
    "min_lr": 0.001,
    "warmup_steps": 2,
    "epochs": None,
    "max_steps": 8,
}
# Every combination whose step is another one.
STEPS: Mapping[str, dict[str, Any]] = {
    "adamw": {"optim": ADAMW, "run": {"evaluate_every": "3 steps"}},
    "sgd, accumulate, reconcile": {
        "optim": {"clip": 0.5, "ema": 0.8, "decay": "matrices", "accumulate": 2},
        "method": {"objective": {"name": "dgl"}, "reconcile": {"distance": "cosine"}},
    },
    "replicas": {"optim": {"clip": 0.5, "ema": 0.8}, "pipeline": {"replicas": 2}},
    "fp16": {"optim": {"clip": 0.5, "ema": 0.8}, "run": {"precision": "fp16"}},
}


def configured(folder: Path, name: str, processes: int, depth: int = 2) -> Any:
    sections = dict(STEPS[name])
    given = sections.pop("pipeline", {})
    pipeline = {"stages": 2, "processes": processes, "depth": depth, **given}
    return settings(folder, pipeline=pipeline, **sections)


@functools.cache
def reference(name: str, processes: int) -> dict[int, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        return run(configured(Path(folder, "run"), name, processes))


@pytest.mark.parametrize(
    ("name", "processes", "others", "depth"),
    [
        ("adamw", 1, 2, 3),
        ("sgd, accumulate, reconcile", 1, 2, 1),
        ("replicas", 2, 4, 2),
        ("fp16", 1, 2, 2),
    ],
)
def test_any_processes_and_depth_give_the_same_bits(
    tmp_path: Path, name: str, processes: int, others: int, depth: int
) -> None:
    expected = reference(name, processes)
    states = run(configured(tmp_path / "run", name, others, depth))
    assert differences(states, expected) == []
    for state in states.values():
        assert differences(state["ema"], state["weights"]) != []


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_clip_above_every_norm_changes_nothing_and_one_below_does(
    tmp_path: Path, precision: str
) -> None:
    # A loss scale is divided out first: with it, every norm would be above 100.
    digests = []
    for number, clip in enumerate((None, 100.0, 0.1)):
        config = settings(
            tmp_path / str(number),
            pipeline={"stages": 2},
            optim={"max_steps": 3, "clip": clip},
            run={"precision": precision},
        )
        stages = train_here(config)
        digests.append(weights_digest(line for s in stages for line in weight_lines(s.weights())))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("pipeline", "optim"),
    [({"replicas": 2, "processes": 2}, {}), ({}, {"accumulate": 4})],
    ids=["replicas", "messages"],
)
def test_the_norm_is_that_of_the_whole_step(
    tmp_path: Path, pipeline: dict[str, Any], optim: dict[str, Any]
) -> None:
    states = []
    for name, parts, keys in (("whole", {}, {}), ("parts", pipeline, optim)):
        config = settings(
            tmp_path / name,
            model={"name": "tests.sample_networks:plain"},
            method={"objective": {"name": "greedy"}},
            pipeline={"stages": 2, **parts},
            optim={"max_steps": 3, "clip": 0.02, "ema": 0.5, **keys},
        )
        states.append(run(config))
    for stage, state in states[0].items():
        for name, tensor in state["weights"].items():
            for key in ("weights", "ema"):
                assert torch.allclose(states[1][stage][key][name], state[key][name], atol=1e-6)
            assert tensor.isfinite().all()


def summary_of(folder: Path) -> dict[str, Any]:
    summary = RunDirectory(folder).summary()
    assert summary is not None
    return dict(summary)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    """Return the evaluations of a run without their times."""
    records = []
    for record in RunDirectory(folder).records():
        if record["kind"] == "eval":
            records.append({key: value for key, value in record.items() if key != "wall_s"})
    return sorted(records, key=lambda record: (record["step"], record["stage"]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of every key, to its end."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    config: Config = update(configured(folder, "adamw", 1), {"run.checkpoint_every_s": 0.0})
    train(config)
    return config


def test_a_killed_run_ends_with_the_same_weights_averages_and_evaluations(
    tmp_path: Path, whole: Config
) -> None:
    config = update(whole, {"run.dir": str(tmp_path / "run")})
    kill_after_a_checkpoint(config, tmp_path / "store")
    train(config)
    expected, found = summary_of(Path(whole.run.dir)), summary_of(tmp_path / "run")
    for key in ("weights_sha256", "ema_sha256", "test_accuracy_per_stage", "steps", "epochs"):
        assert found[key] == expected[key], key
    assert expected["ema_sha256"] != expected["weights_sha256"]
    assert evaluations(tmp_path / "run") == evaluations(Path(whole.run.dir))


def test_evaluations_come_after_every_few_steps_and_the_last_one(whole: Config) -> None:
    steps = [record["step"] for record in evaluations(Path(whole.run.dir)) if record["stage"] == 0]
    assert steps == [3, 6, 8]
    assert (summary_of(Path(whole.run.dir))["steps"], whole.optim.epochs) == (8, None)


def test_a_run_killed_in_an_evaluation_by_steps_begins_with_it(
    tmp_path: Path, whole: Config
) -> None:
    config = update(whole, {"run.dir": str(tmp_path / "run"), "optim.max_steps": 3})
    config = update(config, {"optim.schedule": "constant"})
    train(config)
    # The checkpoint of step 3 is there, and the evaluation after it is not.
    file = tmp_path / "run" / "metrics.jsonl"
    lines = [line for line in file.read_text().splitlines(True) if '"eval"' not in line]
    file.write_text("".join(lines))
    longer = update(config, {"optim.max_steps": 4})
    train(longer)
    steps = {record["step"] for record in evaluations(tmp_path / "run")}
    assert steps == {3, 4}


def test_what_is_evaluated_exported_and_loaded_is_the_average(
    tmp_path: Path, whole: Config
) -> None:
    folder = Path(whole.run.dir)
    directory = RunDirectory(folder)
    recorded = directory.config(None)
    final = [record for record in evaluations(folder) if record["step"] == 8]
    again = evaluate(folder, recorded).stages
    for before, now in zip(final, again, strict=True):
        assert (now["loss"], now["accuracy"]) == (before["loss"], before["accuracy"])

    # The exported network has the accuracy of the run, and the weights of the average.
    files = export(folder, as_resolved(recorded), tmp_path / "net.pt", None)
    test = load_images(recorded.data, recorded.run.seed).test
    images = torch.from_numpy(read_batch(test, np.arange(len(test.labels))))
    predicted = []
    for source in (tmp_path / "net.pt", folder):
        network = load(source, trust=True)
        with torch.no_grad():
            predicted.append(network(images).argmax(1).numpy())
    accuracy = float((predicted[0] == test.labels).mean())
    assert accuracy == summary_of(folder)["test_accuracy"]
    assert (predicted[0] == predicted[1]).all()
    states = [directory.require_checkpoint().load_stage(stage) for stage in range(2)]
    exported = torch.load(tmp_path / "net.pt", weights_only=True)
    for name, tensor in exported.items():
        (averaged,) = [state["ema"][name] for state in states if name in state["ema"]]
        assert torch.equal(tensor, averaged), name
    card = next(path for path in files if path.suffix == ".md").read_text()
    assert "a moving average of the trained parameters, decay 0.8" in card
    assert summary_of(folder)["ema_sha256"] in card
    lines = [line for state in states for line in weight_lines(state["ema"])]
    assert weights_digest(lines) == summary_of(folder)["ema_sha256"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.clip", 0.6),
        ("optim.ema", None),
        ("optim.betas", [0.8, 0.99]),
        ("optim.eps", 1e-7),
        ("optim.decay", "all"),
        ("optim.min_lr", 0.0),
        ("optim.warmup_steps", 3),
        ("optim.max_steps", 9),
        ("optim.epochs", 2),
        ("run.evaluate_every", "4 steps"),
    ],
)
def test_a_resume_with_another_value_is_refused_by_name(
    whole: Config, key: str, value: Any
) -> None:
    with pytest.raises(UserError, match=rf"^config: {key} is .*but the run in .* was started with"):
        prepare(update(whole, {key: value}))


def test_the_recorded_configuration_is_read_back(tmp_path: Path, whole: Config) -> None:
    recorded = RunDirectory(Path(whole.run.dir)).recorded_config(None)
    assert recorded.optim.epochs is None and recorded.run.evaluate_every == "3 steps"
    assert (recorded.optim.warmup_epochs, recorded.optim.warmup_steps) == (0, 2)
    assert "evaluate_every: 3 steps" in to_yaml(recorded)

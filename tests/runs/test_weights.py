"""A run that begins with weights: what it records, what a resume needs, what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from localpipe import config as configs
from localpipe.config.keys import Config
from localpipe.config.load import to_dict, update
from localpipe.config.resume import flatten
from localpipe.errors import UserError
from localpipe.networks.weights import pretrained
from localpipe.networks.weights.named_weights import IMAGENET_STATISTICS, NamedWeights
from localpipe.pipeline.stages.weights import weight_lines
from localpipe.pipeline.workers.mesh import Mesh, open_file_store
from localpipe.pipeline.workers.phase import PhaseTimer
from localpipe.results.export import export, metadata
from localpipe.runs.directory import RunDirectory
from localpipe.runs.prepare import Prepared, prepare
from localpipe.runs.train_worker import assemble
from tests.harness import kill_after_a_checkpoint, settings, train
from tests.sample_networks import small

NAME = "tests.sample_networks:small"


def written(folder: Path, seed: int = 0) -> Path:
    """Write weights of seven classes; return the file."""
    torch.manual_seed(seed)
    path = folder / "weights.pt"
    torch.save({"state_dict": small(num_classes=7).state_dict()}, path)
    return path


def configured(folder: Path, weights: Path | None, **sections: Any) -> Config:
    model = {"name": NAME, "weights": None if weights is None else str(weights), "freeze": ["0"]}
    pipeline = {"stages": 2, "processes": 1}
    return settings(
        folder, model={**model, **sections.pop("model", {})}, pipeline=pipeline, **sections
    )


def prepared(config: Config) -> Prepared:
    result = prepare(config)
    result.lock.close()
    return result


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_new_run_notes_what_it_takes_and_records_the_digest(tmp_path: Path) -> None:
    weights = written(tmp_path)
    first = prepared(configured(tmp_path / "run", weights))
    assert first.notes[0] == (
        f"model.weights {weights}: 26 of 28 tensors taken\n"
        "  left as initialised: 5.2.weight, 5.2.bias"
    )
    recorded = RunDirectory(tmp_path / "run").recorded_config().model
    assert (recorded.weights, recorded.weights_sha256) == (str(weights), digest(weights))
    assert recorded.freeze == ("0",)


def test_a_file_that_does_not_fit_starts_nothing(tmp_path: Path) -> None:
    weights = written(tmp_path)
    with pytest.raises(UserError, match="does not fit tests.sample_networks:small: "):
        prepare(configured(tmp_path / "run", weights, model={"args": {"width": 4}, "freeze": []}))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_weights_and_another_runs_weights_are_refused_together(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.weights .* and run.init_from .* leave one of them"):
        configured(tmp_path / "run", written(tmp_path), run={"init_from": str(tmp_path)})


@pytest.mark.parametrize("names_it", [True, False])
def test_a_killed_run_goes_on_without_the_file_to_the_same_end(
    tmp_path: Path, names_it: bool
) -> None:
    weights = written(tmp_path)
    keys = {"checkpoint_every_s": 0.0}
    whole = configured(tmp_path / "whole", weights, run=keys)
    train(whole)
    config = configured(tmp_path / "run", weights, run=keys)
    kill_after_a_checkpoint(config, tmp_path / "store")
    expected = digest(weights)
    weights.unlink()

    if not names_it:
        config = update(config, {"model.weights": None})
    assert prepared(config).job.start_step > 0
    train(config)
    summaries = []
    for name in ("whole", "run"):
        summary = RunDirectory(tmp_path / name).summary()
        assert summary is not None
        summaries.append(summary["weights_sha256"])
    assert summaries[0] == summaries[1]
    assert RunDirectory(tmp_path / "run").recorded_config().model.weights_sha256 == expected


def test_the_frozen_part_of_a_run_has_the_digest_of_the_file(tmp_path: Path) -> None:
    weights = written(tmp_path)
    train(configured(tmp_path / "run", weights))
    checkpoint = RunDirectory(tmp_path / "run").require_checkpoint().load_weights()
    given = torch.load(weights)["state_dict"]
    lines, expected = set(weight_lines(checkpoint)), set(weight_lines(given))
    frozen = {line for line in expected if line.startswith("0.")}
    assert frozen and frozen <= lines
    assert not any(line in lines for line in expected if ".1.weight" in line)


def test_other_weights_than_recorded_are_refused(tmp_path: Path) -> None:
    weights = written(tmp_path)
    train(update(configured(tmp_path / "run", weights), {"optim.max_steps": 1}))
    other = written(tmp_path, seed=1).rename(tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"config: model.weights is .*; give model.weights="):
        prepare(configured(tmp_path / "run", other))
    with pytest.raises(UserError, match=r"config: model.freeze is \['1'\], but the run in "):
        prepare(configured(tmp_path / "run", weights, model={"freeze": ["1"]}))


def test_another_beginning_is_told_by_its_key(tmp_path: Path) -> None:
    weights = written(tmp_path)
    train(update(configured(tmp_path / "run", weights), {"optim.max_steps": 1}))
    begun = {"init_from": str(tmp_path / "run")}
    with pytest.raises(UserError, match="config: model.weights is null, but the run in "):
        prepare(configured(tmp_path / "run", None, run=begun))
    train(update(configured(tmp_path / "next", None, run=begun), {"optim.max_steps": 1}))
    with pytest.raises(UserError, match="config: model.weights is .* was started with null; "):
        prepare(configured(tmp_path / "next", weights))


def test_frozen_blocks_of_another_run_stay(tmp_path: Path) -> None:
    train(configured(tmp_path / "run", None, model={"freeze": []}))
    begun = {"init_from": str(tmp_path / "run")}
    train(configured(tmp_path / "next", None, run=begun))
    before, now = (
        RunDirectory(tmp_path / name).require_checkpoint().load_weights()
        for name in ("run", "next")
    )
    kept = {name[0] for name in before if torch.equal(before[name], now[name])}
    assert kept == {"0"}


def test_a_run_without_a_checkpoint_wants_the_file_that_it_began_with(tmp_path: Path) -> None:
    weights = written(tmp_path)
    config = configured(tmp_path / "run", weights)
    sha256 = prepared(config).config.model.weights_sha256
    assert prepared(config).job.start_step == 0
    written(tmp_path, seed=1)
    with pytest.raises(UserError, match=f"and model.weights_sha256 is {sha256}; "):
        prepare(config)
    weights.unlink()
    with pytest.raises(UserError, match="cannot read model.weights .*: No such file"):
        prepare(update(config, {"model.weights": None}))


def test_an_export_is_weights_for_another_run(tmp_path: Path) -> None:
    """Its description holds no path, and nothing that only its own run needed."""
    config = configured(tmp_path / "run", written(tmp_path))
    train(config)
    directory = RunDirectory(tmp_path / "run")
    recorded = prepared(config).config
    for suffix in (".pt", ".safetensors"):
        target = tmp_path / f"exported{suffix}"
        export(directory.path, recorded, target, None)
        model = metadata(target)["config"]["model"]
        assert (model["name"], model["num_classes"]) == (NAME, 10)
        assert not model.keys() & {"weights", "weights_sha256", "download", "freeze"}
        again = prepared(configured(tmp_path / f"run{suffix}", target))
        assert again.notes[0] == f"model.weights {target}: 28 of 28 tensors taken"


# -- what the weights decide ----------------------------------------------------------------------


def test_the_rate_of_auto_is_a_tenth(tmp_path: Path) -> None:
    plain = configured(tmp_path / "a", None, optim={"lr": "auto"})
    tuned = configured(tmp_path / "b", written(tmp_path), optim={"lr": "auto"})
    assert (plain.optim.lr, tuned.optim.lr) == (0.8 * 16 / 1024, 0.8 * 16 / 1024 / 10)


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Named weights of images of 12x12; return their statistics."""
    path = written(tmp_path)
    statistics = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    found = NamedWeights(path, lambda: path, "", statistics, 12)
    monkeypatch.setattr(pretrained, "locate_weights", lambda network, name, download: found)
    return statistics


def decided(folder: Path, **data: Any) -> tuple[Any, Any, Any]:
    sections = to_dict(configured(folder, Path("DEFAULT")))
    sections["data"] = {"batch_size": 16, "augment": "none", **data}
    config = prepared(configs.parse(sections, "test")).config
    assert flatten(RunDirectory(folder).recorded_config()) == flatten(config)
    return config.data.mean, config.data.std, config.data.image_size


def test_named_weights_decide_size_and_statistics(tmp_path: Path, named: Any) -> None:
    synthetic = {"name": "synthetic", "samples": 32}
    assert decided(tmp_path / "a", **synthetic) == (*named, 12)
    # What is given stays.
    given = {"mean": [0.5, 0.5, 0.5], "image_size": 16}
    assert decided(tmp_path / "b", **synthetic, **given) == ((0.5,) * 3, named[1], 16)


def test_a_data_set_of_a_fixed_size_keeps_it(tmp_path: Path, named: Any) -> None:
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(32) % 10
    archive = tmp_path / "images.npz"
    np.savez(archive, x_train=images, y_train=labels, x_test=images, y_test=labels)
    assert decided(tmp_path / "run", name="npz", root=str(archive)) == (*named, 8)


def test_a_resume_keeps_what_the_weights_decided(tmp_path: Path, named: Any) -> None:
    sections = to_dict(configured(tmp_path / "run", Path("DEFAULT")))
    sections["data"] = {"name": "synthetic", "samples": 32, "batch_size": 16, "augment": "none"}
    sections["optim"]["max_steps"] = 1
    config = configs.parse(sections, "test")
    begun = prepared(config)
    _work(tmp_path, begun)
    (tmp_path / "weights.pt").unlink()
    again = prepared(update(config, {"optim.max_steps": 2}))
    assert again.job.start_step == 1
    assert again.config.data == begun.config.data
    assert again.config.data.mean == named[0] != IMAGENET_STATISTICS[0]


def _work(folder: Path, begun: Prepared) -> None:
    """Train in this process, which alone knows the named weights."""
    store = folder / "store"
    store.mkdir()
    mesh = Mesh(0, 1, open_file_store(store), local=True)
    assemble(mesh, begun.config, begun.job, PhaseTimer()).run()

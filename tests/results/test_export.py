"""A run's network in a file, and back: by localpipe, and by plain PyTorch."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from torch import Tensor, nn

import localpipe
from localpipe.cli.command_line import main
from localpipe.config.load import to_yaml, update
from localpipe.config.resolved import Resolved
from localpipe.data.augment import read_batch
from localpipe.errors import RunError, UserError
from localpipe.pipeline.channels.message import Header, Kind, Message
from localpipe.results.evaluate import load_stages
from localpipe.results.export import export, load, metadata
from localpipe.results.exported import build_exported, describe_network
from localpipe.runs.checkpoint import newest_checkpoint
from localpipe.runs.directory import SUMMARY_FILE
from tests import harness, sample_networks
from tests.harness import load_images


def named_like_the_inside(num_classes: int = 10) -> nn.Sequential:
    """Children with the names that Network has inside, each where another one is."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
    blocks = {"classifier": nn.Conv2d(3, 4, 3), "adapters": nn.Conv2d(4, 4, 1), "parts": head}
    return nn.Sequential(OrderedDict(blocks))


def trained(folder: Path, **sections: Any) -> Resolved:
    """Train a small network in one process; return its configuration."""
    config = harness.settings(folder, **sections)
    harness.run(config)
    (folder / "config.yaml").write_text(to_yaml(config))
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Resolved]:
    """Runs by name.

    `context`: adapters, a contrast without exits, in-place blocks, probes. `plain`: DGL with its
    own cuts.
    """
    folder = tmp_path_factory.mktemp("runs")
    contrast = {"objective": {"name": "infopro", "task": "contrast"}, "context": {"mode": "R2E"}}
    plain = {"objective": {"name": "predsim"}}
    short = {"optim": {"lr": 0.1, "epochs": 1}}
    return {
        "context": trained(folder / "context", method=contrast, run={"probe": "linear"}, **short),
        "plain": trained(
            folder / "plain",
            model={"name": "resnet8"},
            method=plain,
            pipeline={"stages": 3, "cuts": [0, 2]},
            **short,
        ),
    }


def held_out(config: Resolved) -> tuple[Tensor, Tensor]:
    test = load_images(config.data, 0).test
    images = torch.from_numpy(read_batch(test, np.arange(len(test))))
    return images, torch.from_numpy(test.labels)


def through_the_pipeline(config: Resolved) -> list[Tensor | None]:
    """Return the logits of every stage's exit for the test images, by the stages themselves."""
    checkpoint = newest_checkpoint(Path(config.run.dir))
    assert checkpoint is not None
    images, labels = held_out(config)
    fields = {"image": images, "target": labels}
    logits = []
    for stage in load_stages(config, checkpoint):
        message = Message(Header(Kind.TEST, 1, 1, len(labels)), fields)
        h = stage.forward(message)
        logits.append(stage.objective.exit(h))
        fields = {name: tensor.clone() for name, tensor in stage.outgoing(message, h).items()}
    return logits


def normalised(config: Resolved, images: Tensor) -> Tensor:
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1) for values in (config.data.mean, config.data.std)
    )
    return (images / 255 - mean) / std


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", ["context", "plain"])
def test_the_loaded_network_computes_what_the_pipeline_does(
    runs: dict[str, Resolved], name: str, suffix: str, tmp_path: Path
) -> None:
    config = runs[name]
    target = tmp_path / f"net{suffix}"
    export(Path(config.run.dir), config, target, None)
    net = load(target, trust=True)
    images, _ = held_out(config)
    torch.testing.assert_close(net(images), through_the_pipeline(config)[-1])
    torch.testing.assert_close(net(images), net(normalised(config, images)), atol=1e-4, rtol=1e-4)
    weights = load_weights(target)
    assert set(net.state_dict()) == set(weights)
    assert all(torch.equal(value, weights[key]) for key, value in net.state_dict().items())
    assert not net.training


def load_weights(target: Path) -> dict[str, Tensor]:
    if target.suffix == ".safetensors":
        return safetensors.torch.load_file(target)
    weights: dict[str, Tensor] = torch.load(target, weights_only=True)
    return weights


def test_the_plain_network_is_a_state_dict_that_the_network_takes_strictly(
    runs: dict[str, Resolved], tmp_path: Path
) -> None:
    config = runs["plain"]
    written = export(Path(config.run.dir), config, tmp_path / "net.pt", None)
    assert [path.name for path in written] == ["net.pt", "net.md"]
    weights = torch.load(tmp_path / "net.pt", weights_only=True)
    checkpoint = newest_checkpoint(Path(config.run.dir))
    assert checkpoint is not None
    wanted = {name for name in checkpoint.load_weights() if not name.startswith("aux.")}
    assert set(weights) == wanted and all(isinstance(value, Tensor) for value in weights.values())
    assert metadata(tmp_path / "net.pt")["config"]["data"]["mean"] == list(config.data.mean)
    assert str(tmp_path) not in json.dumps(metadata(tmp_path / "net.pt"))


def test_a_program_runs_for_any_batch_and_beside_it_are_the_adapters(
    runs: dict[str, Resolved], tmp_path: Path
) -> None:
    config = runs["context"]
    written = export(Path(config.run.dir), config, tmp_path / "net.safetensors", None)
    assert [path.name for path in written] == ["net.safetensors", "net.pt2", "net.md"]
    assert any(name.startswith("context.2.") for name in load_weights(tmp_path / "net.safetensors"))
    assert "is a state_dict with the adapters (" in (tmp_path / "net.md").read_text()
    net, program = load(tmp_path / "net.safetensors", trust=True), load(tmp_path / "net.pt2")
    images, _ = held_out(config)
    for count in (1, 2, 7):
        torch.testing.assert_close(program(images[:count]), net(images[:count]))


def test_a_program_of_another_export_does_not_stay_beside_new_weights(
    runs: dict[str, Resolved], tmp_path: Path
) -> None:
    config = runs["plain"]
    images, _ = held_out(config)
    export(Path(config.run.dir), config, tmp_path / "net.pt2", 0)
    before = load(tmp_path / "net.pt2")(images)
    written = export(Path(config.run.dir), config, tmp_path / "net.pt", None)
    assert [path.name for path in written] == ["net.pt", "net.pt2", "net.md"]
    after = load(tmp_path / "net.pt2")(images)
    assert torch.equal(after, load(tmp_path / "net.pt", trust=True)(images)) and not torch.equal(
        after, before
    )


def test_an_exit_is_the_blocks_up_to_it_and_no_more_than_it_needs(
    runs: dict[str, Resolved], tmp_path: Path
) -> None:
    config = runs["plain"]
    export(Path(config.run.dir), config, tmp_path / "exit.pt", 0)
    net = load(tmp_path / "exit.pt")
    torch.testing.assert_close(net(held_out(config)[0]), through_the_pipeline(config)[0])
    names = {name.partition(".")[0] for name in net.state_dict()}
    assert names == {"conv1", "bn1", "exit"} and not any(
        "similarity" in name for name in net.state_dict()
    )


def test_the_probe_is_the_exit_where_the_stage_has_none(
    runs: dict[str, Resolved], tmp_path: Path
) -> None:
    config = runs["context"]
    export(Path(config.run.dir), config, tmp_path / "exit.pt", 2)
    assert "is a state_dict with the adapters and the exit (" in (tmp_path / "exit.md").read_text()
    checkpoint = newest_checkpoint(Path(config.run.dir))
    assert checkpoint is not None
    probe = checkpoint.load_stage(2)["probe"]["network"]
    weights = torch.load(tmp_path / "exit.pt", weights_only=True)
    assert torch.equal(weights["exit.1.weight"], probe["1.weight"])
    assert not any(name.startswith("context.3") for name in weights)
    net, program = load(tmp_path / "exit.pt", trust=True), load(tmp_path / "exit.pt2")
    images, _ = held_out(config)
    torch.testing.assert_close(net(images), program(images))


def test_the_last_exit_is_the_whole_network(runs: dict[str, Resolved], tmp_path: Path) -> None:
    config = runs["plain"]
    for name, index in (("whole", None), ("last", 2)):
        export(Path(config.run.dir), config, tmp_path / f"{name}.pt", index)
    assert load_weights(tmp_path / "whole.pt").keys() == load_weights(tmp_path / "last.pt").keys()


def test_a_stage_without_an_exit_names_the_probe(
    runs: dict[str, Resolved],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = runs["context"]
    monkeypatch.setattr(
        "localpipe.runs.checkpoint.Checkpoint.load_stage", lambda checkpoint, index: {"probe": None}
    )
    assert (
        main(["export", config.run.dir, "--exit", "1", "--trust", "-o", str(tmp_path / "no.pt")])
        == 2
    )
    error = capsys.readouterr().err
    assert "stage 1 has no exit" in error and "run.probe=linear" in error
    assert list(tmp_path.iterdir()) == []


def test_code_that_a_file_names_is_not_imported_unasked(
    runs: dict[str, Resolved], tmp_path: Path
) -> None:
    config = runs["context"]
    export(Path(config.run.dir), config, tmp_path / "net.pt", None)
    with pytest.raises(UserError, match="tests.sample_networks:small; say trust=True"):
        load(tmp_path / "net.pt")


@pytest.mark.parametrize(
    "kind", ["foreign.pt", "text.pt", "text.safetensors", "text.pt2", "missing.pt", "other.pt"]
)
def test_a_file_that_is_no_export_is_refused(
    kind: str, tmp_path: Path, runs: dict[str, Resolved]
) -> None:
    path = tmp_path / kind
    if kind == "foreign.pt":
        torch.save(sample_networks.small().state_dict(), path)
    elif kind == "other.pt":
        export(Path(runs["plain"].run.dir), runs["plain"], path, None)
        weights = torch.load(path, weights_only=True)
        del weights["fc.weight"]
        torch.save(weights, path)
    elif kind != "missing.pt":
        path.write_text("no weights")
    with pytest.raises(
        UserError, match=r"^load: .*(was not written by|no program|there is no|does not hold)"
    ):
        load(path)


def test_a_run_directory_is_loaded_like_its_export(
    runs: dict[str, Resolved], tmp_path: Path
) -> None:
    config = runs["context"]
    export(Path(config.run.dir), config, tmp_path / "net.pt", None)
    reference, exported = (
        load(config.run.dir, trust=True).state_dict(),
        load_weights(tmp_path / "net.pt"),
    )
    assert reference.keys() == exported.keys() and all(
        torch.equal(reference[name], exported[name]) for name in reference
    )
    with pytest.raises(UserError, match="--trust|trust=True"):
        load(config.run.dir)


def test_names_are_the_plain_networks_whatever_they_are(tmp_path: Path) -> None:
    config = harness.settings(
        tmp_path, model={"name": f"{__name__}:named_like_the_inside"}, pipeline={"stages": 2}
    )
    built = build_exported(describe_network(config, None), "test")
    plain = named_like_the_inside()
    assert set(built.state_dict()) == set(plain.state_dict())
    built.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(built(x), plain(x))
    outer = nn.Sequential(built)
    assert set(outer.state_dict()) == {f"0.{name}" for name in plain.state_dict()}
    outer.load_state_dict(outer.state_dict())


def test_a_chain_is_built_for_the_batch_of_its_run(tmp_path: Path) -> None:
    # Bytes of a message that no other batch divides.
    model = {"name": "chain", "args": {"message_bytes": 1344, "blocks": 2}}
    chain = harness.settings(tmp_path, model=model, data={"batch_size": 12})
    network = build_exported(describe_network(chain, None), "test")
    assert network(torch.zeros(2, *chain.sample)).shape == (2, 10)


def test_the_card_has_the_figures_of_the_summary_and_none_of_another_step(
    runs: dict[str, Resolved], tmp_path: Path
) -> None:
    config = runs["plain"]
    run_dir = Path(config.run.dir)
    export(run_dir, config, tmp_path / "net.pt", None)
    assert "Nothing yet" in (tmp_path / "net.md").read_text()
    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint is not None
    summary = {
        "schema": 1, "steps": checkpoint.step, "test_accuracy": 0.8765, "best_test_accuracy": 0.9,
        "best_epoch": 1, "test_accuracy_per_stage": [0.4321, None, 0.8765],
        "probe_accuracy_per_stage": None, "wall_s": 3.0, "processes": 1,
        "train_samples_per_s": None, "localpipe": "0", "torch": "2", "weights_sha256": "abc",
    }  # fmt: skip
    (run_dir / SUMMARY_FILE).write_text(json.dumps(summary))
    try:
        export(run_dir, config, tmp_path / "net.pt", None)
        export(run_dir, config, tmp_path / "exit.pt", 0)
        rounded = update(config, {"run.precision": "bf16", "pipeline.wire_dtype": "fp16"})
        export(run_dir, rounded, tmp_path / "low.pt", None)
        coded = update(config, {"pipeline.wire_dtype": "int8"})
        export(run_dir, coded, tmp_path / "coded.pt", None)
    finally:
        (run_dir / SUMMARY_FILE).unlink()
    card = (tmp_path / "net.md").read_text()
    assert "Accuracy 87.65 %" in card and "| 1 | none |" in card and str(tmp_path) not in card
    assert "Accuracy 43.21 % (exit of stage 0)" in (tmp_path / "exit.md").read_text()
    low = (tmp_path / "low.md").read_text()
    assert "bf16 arithmetic and fp16 activations" in low and "computes in fp32, so" in low
    coded_card = (tmp_path / "coded.md").read_text()
    assert "Measured with int8 activations between the stages" in coded_card
    assert "computes in fp32 and codes nothing between its stages" in coded_card
    # An export has no codec: its weights are those of the run, whatever crossed.
    assert (tmp_path / "coded.pt").read_bytes() == (tmp_path / "net.pt").read_bytes()
    assert "fp32, so" not in card


# -- names of classes


def named(config: Resolved) -> Resolved:
    """Return a run's configuration with names for its ten classes, one of them odd."""
    names = [f"class {index}" for index in range(9)]
    return update(config, {"data.classes": [*names, "line\nbreak \udce9 `x` ä"]})


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors", "net.pt2"])
def test_every_file_has_the_names_of_the_classes(
    runs: dict[str, Resolved], tmp_path: Path, name: str
) -> None:
    config = named(runs["plain"])
    export(Path(config.run.dir), config, tmp_path / name, None)
    network: Any = load(tmp_path / name)
    assert network.classes == config.data.classes
    card = (tmp_path / "net.md").read_text(encoding="utf-8")
    assert '["class 0", "class 1", ' in card and '"line\\nbreak \\udce9 `x` ä"]' in card
    if name == "net.pt2":
        extra = {"localpipe": ""}
        torch.export.load(str(tmp_path / name), extra_files=extra)
        description = json.loads(extra["localpipe"])
    else:
        description = metadata(tmp_path / name)
    assert tuple(description["config"]["data"]["classes"]) == config.data.classes


@pytest.mark.parametrize("name", ["net.pt", "net.pt2"])
def test_without_names_a_network_has_none(
    runs: dict[str, Resolved], tmp_path: Path, name: str
) -> None:
    config = runs["plain"]
    export(Path(config.run.dir), config, tmp_path / name, 0)
    network: Any = load(tmp_path / name)
    assert network.classes is None
    assert "## Classes" not in (tmp_path / "net.md").read_text()


def test_a_program_of_an_earlier_version_has_no_names(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, str(tmp_path / "old.pt2"))
    network: Any = load(tmp_path / "old.pt2")
    assert network.classes is None


# -- all files or none


def counts_with_len(num_classes: int = 10) -> nn.Sequential:
    """Return a network whose batch size torch.export cannot leave free."""

    class Reshape(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(len(x), 3, 4, 16)

    head = nn.Sequential(nn.Flatten(), nn.Linear(2 * 7, num_classes))
    return nn.Sequential(Reshape(), nn.Conv2d(3, 2, 3, 2), head)


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    config = trained(
        tmp_path / "run",
        model={"name": f"{__name__}:counts_with_len"},
        pipeline={"stages": 2},
        optim={"epochs": 1},
    )
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "net.pt"
    with pytest.raises(RunError, match=r"cannot follow .*; nothing was written; .*x\.shape\[0\]"):
        export(tmp_path / "run", config, target, 0)
    assert list(target.parent.iterdir()) == []
    export(tmp_path / "run", config, target, None)  # the plain network needs no program
    assert sorted(path.name for path in target.parent.iterdir()) == ["net.md", "net.pt"]


def test_a_disk_that_fills_leaves_nothing(runs: dict[str, Resolved], tmp_path: Path) -> None:
    config = runs["plain"]
    part = tmp_path / f".net.md.{os.getpid()}"

    def fill(*arguments: Any) -> str:
        part.symlink_to("/dev/full")
        return "text"

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunError) as failed:
        patch.setattr("localpipe.results.export.card_text", fill)
        export(Path(config.run.dir), config, tmp_path / "net.pt", None)
    expected = f"export: cannot write {tmp_path}/net.pt: No space left on device; free space"
    assert str(failed.value).startswith(expected) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["/proc/x.pt", "file/x.pt", "card.pt"])
def test_a_path_that_cannot_be_written_is_told_before_the_work(
    runs: dict[str, Resolved], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = runs["plain"]
    (tmp_path / "file").touch()
    (tmp_path / "card.md").mkdir()
    monkeypatch.setattr("localpipe.results.export.build_exported", None)
    with pytest.raises(UserError, match=r"^export: -o .*; give (another file|the name of a file)$"):
        export(Path(config.run.dir), config, tmp_path / name, None)


@pytest.mark.parametrize("mode", ["none", "R1E"])
def test_a_vision_transformer_is_a_program_for_any_batch(tmp_path: Path, mode: str) -> None:
    shape = {"depth": 2, "width": 16, "heads": 2, "patch": 4}
    config = trained(
        tmp_path / "run",
        model={"name": "vit_tiny", "args": shape},
        method={"context": {"mode": mode}},
        pipeline={"stages": 2},
        optim={"lr": 0.01, "epochs": 1},
    )
    export(tmp_path / "run", config, tmp_path / "net.pt2", None)
    export(tmp_path / "run", config, tmp_path / "exit.pt2", 0)
    images, _ = held_out(config)
    program, network = load(tmp_path / "net.pt2"), load(tmp_path / "run")
    for count in (1, 2, 7):
        torch.testing.assert_close(program(images[:count]), network(images[:count]))
        assert load(tmp_path / "exit.pt2")(images[:count]).shape == (count, 10)


def test_eval_takes_another_data_set(
    runs: dict[str, Resolved], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One with fewer training images than the run held out, and with another mean, if asked."""
    config = update(runs["plain"], {"data.validation": 60})
    run_dir = Path(config.run.dir)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (12, 8, 8, 3), np.uint8), np.arange(12) % 10
    np.savez(tmp_path / "own.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    words = ["data.name=npz", f"data.root={tmp_path / 'own.npz'}"]
    shown = []
    for more in ([], ["data.mean=auto", "data.std=auto"]):
        assert main(["eval", str(run_dir), "--json", *words, *more]) == 0
        shown.append(json.loads(capsys.readouterr().out)["stages"])
    assert [stage["samples"] for stage in shown[0]] == [12] * 3
    assert shown[0][-1]["loss"] != shown[1][-1]["loss"]


def test_the_package_gives_load_itself() -> None:
    assert localpipe.load is load

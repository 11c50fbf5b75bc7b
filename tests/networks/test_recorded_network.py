"""Networks that come as one object: a user's class, and those of three libraries."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

import localpipe
from localpipe import config as configs
from localpipe.config.keys import Config
from localpipe.config.load import as_resolved, to_yaml, update
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.networks.blueprint import Blueprint
from localpipe.pipeline.stages.stage_plan import build_blueprint
from localpipe.results.export import export, load
from localpipe.runs.checkpoint import newest_checkpoint
from localpipe.runs.directory import RunDirectory
from localpipe.runs.prepare import prepare
from tests.harness import (
    differences,
    kill_after_a_checkpoint,
    resolved,
    run,
    settings,
    train,
)
from tests.sample_networks import Forked

FORKED = {"name": "tests.sample_networks:Forked"}
CALLS: list[str] = []


def blueprint(name: str, size: int = 32, **model: Any) -> Blueprint:
    return build_blueprint(
        resolved({"model": {"name": name, "num_classes": 10, **model}}, (3, size, size))
    )


def refusal(name: str, **model: Any) -> str:
    with pytest.raises(UserError) as caught:
        blueprint(name, **model)
    text = str(caught.value)
    assert "\n" not in text
    return text


def names(found: Blueprint) -> list[str]:
    return [block.name for block in found.blocks]


# -- the theorem ----------------------------------------------------------------------------------


def states(folder: Path, crossing: int, **sections: Any) -> dict[int, dict[str, Any]]:
    """Return the states after a run. A skip crosses beside the main tensor for crossing 2."""
    pipeline = {"stages": 4, **sections.pop("pipeline", {})}
    model = {**FORKED, "crossing": crossing}
    return run(settings(folder, model=model, pipeline=pipeline, **sections))


@pytest.mark.parametrize("crossing", [1, 2])
def test_any_processes_and_depth_give_the_bits_of_one(tmp_path: Path, crossing: int) -> None:
    one = states(tmp_path / "one", crossing)
    for processes, depth in ((2, 1), (4, 8)):
        pipeline = {"processes": processes, "depth": depth}
        others = states(tmp_path / str(processes), crossing, pipeline=pipeline)
        assert differences(others, one) == []
    # Blocks that run again draw the same stochastic depth, and count no batch twice.
    again = states(
        tmp_path / "again", crossing, pipeline={"processes": 2}, run={"checkpointing": "block"}
    )
    assert differences(again, one) == []


def test_replicas_give_the_bits_of_as_many_replicas(tmp_path: Path) -> None:
    two, four = (
        states(tmp_path / str(count), 2, pipeline={"replicas": 2, "processes": count})
        for count in (2, 4)
    )
    assert differences(four, two) == []


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def config(name: str) -> Resolved:
        return settings(
            tmp_path / name,
            model={**FORKED, "crossing": 2},
            run={"checkpoint_every_s": 0.0},
        )

    assert train(config("whole")) == 0
    kill_after_a_checkpoint(config("killed"), tmp_path / "store")
    assert newest_checkpoint(tmp_path / "killed") is not None
    assert train(config("killed")) == 0
    digests = []
    for name in ("whole", "killed"):
        summary = RunDirectory(tmp_path / name).summary()
        assert summary is not None
        digests.append(summary["weights_sha256"])
    assert digests[0] == digests[1]


# -- names ----------------------------------------------------------------------------------------


def test_torchvisions_names_of_shipped_networks_are_the_shipped_ones() -> None:
    given = configs.parse({"model": {"name": "torchvision:resnet50"}}, "test")
    assert given.model.name == "resnet50"
    args = {"replace_stride_with_dilation": [False, False, True]}
    given = configs.parse({"model": {"name": "torchvision:resnet50", "args": args}}, "test")
    assert given.model.name == "torchvision:resnet50"


@pytest.mark.parametrize(
    ("name", "size", "first", "last"),
    [
        ("torchvision:mobilenet_v3_small", 32, "features.0", "features.12"),
        ("torchvision:vit_b_16", 32, "conv_proj", "encoder.layers.encoder_layer_11"),
        ("timm:vit_tiny_patch16_224", 32, "patch_embed", "blocks.11"),
    ],
)
def test_libraries_networks_have_readable_blocks(
    name: str, size: int, first: str, last: str
) -> None:
    found = blueprint(name, size)
    assert names(found)[0].startswith(first) and names(found)[-1].startswith(last)
    assert found.library is not None and found.library.startswith(name.partition(":")[0] + " ")
    modules = [*found.build_meta(range(len(found.blocks) + 1))]
    original = found.build_original
    assert original is not None
    weights = [key for module in modules for key in module.state_dict()]
    assert sorted(weights) == sorted(original().state_dict())


def test_a_file_of_transformers_stands_in_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "vit.json"
    content = {
        "architectures": ["ViTForImageClassification"],
        "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
        "intermediate_size": 32, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    file.write_text(json.dumps(content))
    given = configs.parse(
        {"model": {"name": f"transformers:{file}", "args": {"patch_size": 16}}}, "test"
    )
    assert given.model.args == {**content, "patch_size": 16}
    # The file is needed no more.
    file.unlink()
    found = blueprint(given.model.name, args=given.model.args)
    assert names(found)[-1] == "vit.layers.2" and found.output(1).shape == (5, 16)


@pytest.mark.parametrize(
    ("name", "args", "text"),
    [
        ("torchvision:resnet19", {}, "torchvision has no 'resnet19'; did you mean resnet18?"),
        ("torchvision:fcn_resnet50", {}, "is a network for segmentation; expected one that class"),
        ("torchvision:raft_large", {}, "is a network for optical flow"),
        ("torchvision:resnet18", {"depth": 3}, "cannot be called: TypeError"),
        ("torchvision:alexnet", {"weights": "DEFAULT"}, "model.args.weights would fetch weights"),
        ("timm:resnet18", {"pretrained": True}, "give the weights by model.weights"),
        ("timm:hf-hub:a/b", {}, "fetches a network from elsewhere"),
        ("timm:resnet18", {"pretrained_cfg": {}}, "model.args.pretrained_cfg would fetch"),
        ("timm:resnet00", {}, "timm has no 'resnet00'"),
        ("transformers:none.json", {}, "cannot read none.json of model.name"),
        ("transformers:a.json", {"architectures": ["Viit"]}, "transformers has no class 'Viit'"),
        ("transformers:a.json", {"architectures": ["X"], "auto_map": {}}, "would fetch weights"),
    ],
)
def test_what_is_no_network_to_train_is_one_line(
    name: str, args: dict[str, Any], text: str
) -> None:
    assert text in refusal(name, args=args)


# -- a user's own class ---------------------------------------------------------------------------


class Decides(nn.Module):
    """Looks at values, so that no cut is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if bool((x > 0).all()):
            x = -x
        out: torch.Tensor = self.fc(x.mean((2, 3)))
        return out


class Six(Forked):
    """Another number of classes than is asked for."""

    def __init__(self) -> None:
        super().__init__(num_classes=6)


class Exit(Forked):
    """A child with a name that localpipe uses."""

    def __init__(self) -> None:
        super().__init__()
        self.exit = nn.Linear(2, 2)


def one_object() -> nn.Module:
    return ONLY


ONLY = Forked()


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("Decides", "does not take images of shape (3, 32, 32): it fails in training"),
        ("Six", "gives (2, 6) for 2 images; expected (2, 10), one logit a class"),
        ("Exit", "child exit of"),
        ("one_object", "returns the same child"),
    ],
)
def test_what_cannot_be_trained_is_one_line(function: str, text: str) -> None:
    assert text in refusal(f"{__name__}:{function}")
    assert not any(parameter.is_meta for parameter in ONLY.parameters())


class Shares(nn.Module):
    """One dropout for the whole network."""

    def __init__(self) -> None:
        super().__init__()
        CALLS.append("built")
        self.stem, self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 10)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.conv(self.dropout(self.stem(x))))
        out: torch.Tensor = self.fc(x.mean((2, 3)))
        return out


def test_a_network_is_built_once_for_the_stages_of_a_process() -> None:
    found = blueprint(f"{__name__}:Shares")
    before = len(CALLS)
    (stem,), (conv,) = found.build([0], 3), found.build([1], 3)
    assert len(CALLS) == before + 1
    # Each stage has a mode of its own.
    stem.eval()
    assert conv.training and all(module.training for module in conv.modules())
    # The same part again is a new one, with the same weights.
    (again,) = found.build([0], 3)
    assert len(CALLS) == before + 2 and again is not stem
    assert differences(dict(again.state_dict()), dict(stem.state_dict())) == []


class Tied(nn.Module):
    """Two blocks with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.second, self.fc = nn.Conv2d(4, 4, 3), nn.Linear(4, 10)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(torch.relu(self.first(torch.relu(self.stem(x)))))
        out: torch.Tensor = self.fc(x.mean((2, 3)))
        return out


def test_weights_that_blocks_share_keep_them_together_or_are_copied(tmp_path: Path) -> None:
    name = f"{__name__}:Tied"
    tied = blueprint(name)
    assert names(tied) == ["stem", "first"] and "model.untie" in " ".join(tied.notes)
    assert names(blueprint(name, untie=True)) == ["stem", "first", "second"]

    model = {"name": name, "untie": True}
    config = settings(tmp_path / "run", model=model, pipeline={"stages": 3})
    train(config)
    network = load(tmp_path / "run", trust=True)
    own = load(tmp_path / "run", trust=True, original=True)
    assert isinstance(own, Tied) and own.first.weight is not own.second.weight
    assert not torch.equal(own.first.weight, own.second.weight)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(network(x), own(x))


class Uncut(nn.Module):
    """Its last weight is also used first, so every cut would have it on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.dropout, self.fc = nn.Dropout(0.5), nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x + self.fc.weight.mean()))
        out: torch.Tensor = self.fc(self.dropout(x).mean((2, 3)))
        return out


def test_a_network_without_a_cut_trains_end_to_end_as_one_block(tmp_path: Path) -> None:
    name = f"{__name__}:Uncut"
    assert "fc.weight is used on both sides of every cut" in refusal(name)
    assert "or train it end to end with pipeline.stages=1" in refusal(name)

    config = settings(tmp_path / "run", model={"name": name}, pipeline={"stages": 1})
    found = build_blueprint(config)
    assert names(found) == ["network"] and "Uncut cannot be cut" in found.notes[0]
    block, head = found.build([0, 1], 0)
    plain = Uncut()
    plain.load_state_dict(block.state_dict(), strict=True)
    x, outputs = torch.randn(4, 3, 8, 8), []
    for network in (plain, nn.Sequential(block, head)):
        torch.manual_seed(1)
        outputs.append(network(x))
    assert torch.equal(*outputs)
    mean = plain.get_buffer("norm.running_mean")
    assert torch.equal(block.get_buffer("norm.running_mean"), mean) and mean.any()

    assert train(config) == 0
    own = load(tmp_path / "run", trust=True, original=True)
    assert type(own) is Uncut and torch.equal(own(x), load(tmp_path / "run", trust=True)(x))


class Offers(nn.Module):
    """A network that says its blocks, and would not be cut otherwise."""

    def __init__(self, misses: str = "") -> None:
        super().__init__()
        self.misses = misses
        self.stem = nn.Conv2d(3, 4, 3)
        self.body = nn.ModuleList([nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)])
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))

    def blocks(self) -> list[nn.Module]:
        modules = {"stem": self.stem, "0": self.body[0], "1": self.body[1], "head": self.head}
        kept = [module for name, module in modules.items() if name != self.misses]
        if self.misses == "foreign":
            return [nn.Sequential(*kept[:2]), *kept[2:]]
        return kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks():
            x = block(x)
        return x


def test_a_class_may_say_its_blocks(tmp_path: Path) -> None:
    name = f"{__name__}:Offers"
    found = blueprint(name)
    assert names(found) == ["stem", "body.0", "body.1"] and found.tail.name == "head"
    config = settings(tmp_path / "run", model={"name": name}, pipeline={"stages": 2})
    train(config)
    own = load(tmp_path / "run", trust=True, original=True)
    x = torch.randn(2, 3, 8, 8)
    assert type(own) is Offers and torch.equal(own(x), load(tmp_path / "run", trust=True)(x))


@pytest.mark.parametrize(
    ("misses", "text"),
    [
        ("0", "body.0.weight of .* is in none of its blocks()"),
        ("foreign", "gives a Sequential that is no module of the network"),
    ],
)
def test_blocks_that_are_not_the_networks_are_refused(misses: str, text: str) -> None:
    assert re.search(
        text.replace("()", r"\(\)"), refusal(f"{__name__}:Offers", args={"misses": misses})
    )


def test_a_network_is_recorded_once_for_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for width in (3, 4):
        folder = tmp_path / str(width)
        folder.mkdir()
        lines = ["from tests.sample_networks import Forked", f"net = lambda: Forked(10, {width})"]
        (folder / "net.py").write_text("\n".join(lines))
        monkeypatch.chdir(folder)
        first, second = blueprint("net.py:net"), blueprint("net.py:net")
        assert first is second
        found.append(first.output(0).shape[0])
    assert found == [3, 4]


def test_a_class_is_named_from_python() -> None:
    given = localpipe.configuration({"model": {"name": Forked}})
    assert given.model.name == "tests.sample_networks:Forked"


# -- a run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, cut by the names of blocks."""
    folder = tmp_path_factory.mktemp("forked") / "run"
    assert train(given(folder)) == 0
    return folder


def given(folder: Path, **keys: Any) -> Config:
    sections: dict[str, Any] = {
        "model": {**FORKED},
        "pipeline": {"cuts": ["stem", "middle"], "processes": 1},
        "data": {"name": "synthetic", "samples": 24, "image_size": 8, "batch_size": 8},
        "optim": {"lr": 0.05, "epochs": 1, "max_steps": 2},
        "run": {"dir": str(folder), "device": "cpu", "threads": 1},
    }
    for key, value in keys.items():
        section, name = key.split("__")
        sections[section][name] = value
    return configs.parse(sections, "test")


def test_a_run_records_blocks_and_library(run_dir: Path) -> None:
    recorded = configs.load(run_dir / "config.yaml")
    assert recorded.model.blocks == ("stem", "early", "middle", "join", "last")
    assert recorded.pipeline.cuts == (0, 2)
    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint is not None
    assert checkpoint.manifest["blocks"] == list(recorded.model.blocks)
    # The same command goes on.
    prepared = prepare(given(run_dir, optim__max_steps=3))
    prepared.lock.close()
    assert prepared.job.start_step == 2


def test_other_blocks_at_a_resume_are_one_line(run_dir: Path, tmp_path: Path) -> None:
    config = configs.load(run_dir / "config.yaml")
    blocks = ["stem", "early", "center", "join", "last"]
    changed = update(config, {"model.blocks": blocks, "model.library": "timm 0.1"})
    (tmp_path / "config.yaml").write_text(to_yaml(changed))
    with pytest.raises(UserError, match="block 2 of .* is middle, but the run has recorded center"):
        build_blueprint(resolved({"model": {**FORKED, "num_classes": 10, "blocks": blocks}}))


@pytest.mark.parametrize(
    ("cuts", "text"),
    [
        (["stem", "midle"], "names 'midle', which is no block of"),
        (["middle", "stem"], "must rise; got middle, stem, which are blocks 2, 0"),
    ],
)
def test_wrong_names_of_cuts_are_one_line(tmp_path: Path, cuts: list[str], text: str) -> None:
    with pytest.raises(UserError) as caught:
        prepare(given(tmp_path / "run", pipeline__cuts=cuts))
    assert text in str(caught.value)


def test_the_own_class_takes_an_export_and_gives_the_runs_outputs(
    run_dir: Path, tmp_path: Path
) -> None:
    config = as_resolved(configs.load(run_dir / "config.yaml"))
    export(run_dir, config, tmp_path / "net.safetensors", None)
    network = load(tmp_path / "net.safetensors", trust=True)
    own = load(tmp_path / "net.safetensors", trust=True, original=True)
    assert type(own) is Forked and not own.training
    plain = Forked().eval()
    plain.load_state_dict(own.state_dict(), strict=True)
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(own(x), network(x)) and torch.equal(plain(x), network(x))
    assert type(load(run_dir, trust=True, original=True)) is Forked


class Versioned(Forked):
    """A class that loads a state_dict by its version, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, *given: Any) -> None:
        assert given[2].get("version") == 2
        super()._load_from_state_dict(*given)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_class_that_loads_by_version_takes_an_export(tmp_path: Path, suffix: str) -> None:
    model = {"name": f"{__name__}:Versioned"}
    config = settings(tmp_path / "run", model=model, pipeline={"stages": 2})
    train(config)
    file = tmp_path / f"net{suffix}"
    export(tmp_path / "run", config, file, None)
    assert type(load(file, trust=True, original=True)) is Versioned
    assert type(load(tmp_path / "run", trust=True, original=True)) is Versioned
    if suffix == ".pt":
        Versioned().load_state_dict(torch.load(file, weights_only=True), strict=True)


def test_a_shipped_network_has_no_other_class(tmp_path: Path) -> None:
    config = settings(tmp_path / "run", model={"name": "resnet8"}, pipeline={"stages": 2})
    run(config)
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(UserError, match="is localpipe's own network, and has no other class"):
        load(tmp_path / "run", original=True)


def test_the_shipped_resnet18_is_torchvisions_to_the_bit() -> None:
    shipped = blueprint("resnet18")
    modules = shipped.build(range(len(shipped.parts)), 0)
    weights = {}
    for part, module in zip(shipped.parts, modules, strict=True):
        for key, value in module.eval().state_dict().items():
            weights[part.prefix + key] = value
    plain = torchvision.models.resnet18(num_classes=10).eval()
    plain.load_state_dict(weights, strict=True)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(nn.Sequential(*modules)(x), plain(x))

"""configs/finetune_resnet50.yaml: a ResNet-50 from a file of weights, on a folder of images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from localpipe import config as configs
from localpipe.config.keys import Config
from localpipe.config.load import update
from localpipe.errors import UserError
from localpipe.networks.weights.named_weights import IMAGENET_STATISTICS
from localpipe.networks.weights.pretrained import load_pretrained
from localpipe.pipeline.channels.message import Header, Kind, Message
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.weights import weight_lines
from localpipe.runs.prepare import Prepared, prepare
from tests.harness import run

SIZE = 64
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of weights, resnet50.pth, and photos of two classes."""
    path = tmp_path_factory.mktemp("finetune")
    torch.manual_seed(0)
    network = torchvision.models.resnet50()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean, 0, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(layer.running_var, 0.5, 2)  # type: ignore[arg-type]
    torch.save(network.state_dict(), path / "resnet50.pth")
    generator = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            target = path / "photos" / part / name
            target.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (72, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(target / f"{index}.png")
    return path


def configured(folder: Path, run_dir: Path, weights: Path | None = None) -> Config:
    """Return the shipped configuration, for smaller images and two steps."""
    words = [
        f"data.root={folder / 'photos'}",
        f"model.weights={weights or folder / 'resnet50.pth'}",
        f"data.image_size={SIZE}",
        "data.batch_size=4",
        "optim.max_steps=2",
        "run.threads=1",
        f"run.dir={run_dir}",
    ]
    return configs.load("finetune_resnet50", words)


def prepared(config: Config) -> Prepared:
    result = prepare(config)
    result.lock.close()
    return result


def test_the_features_before_the_first_step_are_torchvisions_own(
    folder: Path, tmp_path: Path
) -> None:
    begun = prepared(configured(folder, tmp_path / "run"))
    config = begun.config
    assert (config.data.mean, config.data.std) == IMAGENET_STATISTICS
    assert (config.stages, config.pipeline.processes, config.model.num_classes) == (2, 2, 2)
    assert config.optim.lr == 0.8 * 4 / 1024 / 10

    # The stages with the file, as workers load it.
    weights = load_pretrained(config.model)
    assert weights is not None
    image = torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8)
    fields = {"image": image, "target": torch.zeros(3, dtype=torch.int64)}
    stages = [Stage(plan, begun.blueprint, config) for plan in begun.plans]
    for stage in stages:
        stage.take_weights(weights.file.tensors)
        message = Message(Header(Kind.TEST, 1, 1, 3), fields)
        h = stage.forward(message)
        fields = dict(stage.outgoing(message, h))

    network = torchvision.models.resnet50().eval()
    network.load_state_dict(torch.load(folder / "resnet50.pth"))
    features: list[Tensor] = []
    network.layer4.register_forward_hook(lambda module, given, output: features.append(output))
    with torch.no_grad():
        network(stages[0].entry(image))
    assert torch.equal(h, features[0])


def test_two_processes_train_all_but_the_frozen_part(folder: Path, tmp_path: Path) -> None:
    begun = prepared(configured(folder, tmp_path / "run"))
    states = run(update(begun.config, {"run.dir": str(tmp_path / "worked")}))
    trained = {line for state in states.values() for line in weight_lines(state["weights"])}
    given = weight_lines(torch.load(folder / "resnet50.pth"))
    frozen = {line for line in given if line.startswith(("conv1.", "bn1."))}
    assert len(frozen) == 6 and frozen <= trained
    assert not any(line in trained for line in given if line.startswith(("layer1.0.conv1", "fc.")))
    assert states[1]["weights"]["fc.weight"].shape == (2, 2048)


def rename_head(state: State) -> State:
    """Return the weights of a network whose head was replaced by several layers."""
    head = {"fc.1.weight": state.pop("fc.weight"), "fc.1.bias": state.pop("fc.bias")}
    return {**state, **head}


FILES: dict[str, tuple[Callable[[State], State], str]] = {
    "another number of classes": (
        lambda state: state,
        "318 of 320 tensors taken\n  left as initialised: fc.weight, fc.bias",
    ),
    "another head": (
        rename_head,
        "318 of 320 tensors taken\n  left as initialised: fc.weight, fc.bias\n"
        "  not used: fc.1.weight, fc.1.bias",
    ),
    "the same classes": (
        lambda state: {**state, "fc.weight": torch.zeros(2, 2048), "fc.bias": torch.zeros(2)},
        "320 of 320 tensors taken",
    ),
    "a prefix": (
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        "318 of 320 tensors taken\n  left as initialised: fc.weight, fc.bias",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_with_other_heads_and_names(folder: Path, tmp_path: Path, kind: str) -> None:
    change, expected = FILES[kind]
    path = tmp_path / "weights.pt"
    torch.save(change(torch.load(folder / "resnet50.pth")), path)
    notes = prepared(configured(folder, tmp_path / "run", path)).notes
    assert f"model.weights {path}: {expected}" in notes


def test_a_missing_key_is_one_line(folder: Path, tmp_path: Path) -> None:
    state = torch.load(folder / "resnet50.pth")
    del state["layer3.0.downsample.0.weight"]
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(UserError) as refused:
        prepare(configured(folder, tmp_path / "run", tmp_path / "weights.pt"))
    assert "resnet50: layer3.0.downsample.0.weight is missing; expected" in str(refused.value)

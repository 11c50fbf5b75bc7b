"""Published weights by name: the place of their file, its digits, and what they decide."""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torchvision.transforms._presets import ImageClassification

from localpipe.config import registry
from localpipe.config.keys import Model
from localpipe.errors import UserError
from localpipe.networks.weights.named_weights import (
    IMAGENET_STATISTICS,
    locate_weights,
    rename_tensors,
)
from localpipe.networks.weights.pretrained import Pretrained, load_pretrained


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a private TORCH_HOME in which torch.hub keeps its files."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub" / "checkpoints"


@dataclass(frozen=True)
class Published:
    """What torchvision's enums have of their weights."""

    url: str

    def transforms(self) -> Any:
        return ImageClassification(crop_size=96, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def publish(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Let torchvision publish one file as DEFAULT of all its networks."""
    weights = SimpleNamespace(__members__={"DEFAULT": Published(url)})
    monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: weights)


def publish_resnet18(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Write weights of 1000 classes as torchvision names its files, and publish them."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    path = folder / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    path = path.rename(folder / f"resnet18-{digits}.pth")
    publish(monkeypatch, path.as_uri())
    return path


def load(**keys: Any) -> Pretrained:
    pretrained = load_pretrained(Model(name="resnet18", weights="DEFAULT", **keys))
    assert pretrained is not None
    return pretrained


@pytest.mark.parametrize("name", registry.IMAGENET)
def test_the_shipped_networks_of_imagenet_have_torchvisions_names(name: str) -> None:
    state: dict[str, Any] = {}
    build = registry.look_up(registry.MODELS, name, "model")
    for part in build(name, (3, 64, 64), 1000).state:
        state.update(part)
    with torch.device("meta"):
        expected = torchvision.models.get_model(name).state_dict()
    assert {key: tensor.shape for key, tensor in state.items()} == {
        key: tensor.shape for key, tensor in expected.items()
    }


def test_a_missing_file_is_told_with_its_place(cache: Path) -> None:
    with pytest.raises(UserError) as refused:
        locate_weights("resnet50", "IMAGENET1K_V2", download=False)
    assert f"expected {cache / 'resnet50-11ad3fa6.pth'}; " in str(refused.value)
    assert "model.download=true" in str(refused.value)


def test_a_file_in_the_cache_decides_size_and_statistics(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = publish_resnet18(monkeypatch, cache)
    pretrained = load()
    assert pretrained.file.path == path
    assert pretrained.facts.statistics == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert pretrained.facts.image_size == 96
    assert pretrained.facts.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_damaged_file_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = publish_resnet18(monkeypatch, cache)
    torch.save(torchvision.models.resnet18().state_dict(), path)
    with pytest.raises(UserError, match="is damaged: its SHA-256 begins with"):
        load()


def test_a_file_is_fetched_only_where_that_is_asked_for(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = publish_resnet18(monkeypatch, tmp_path / "server")
    with pytest.raises(UserError, match="is not in the cache"):
        load()
    assert not cache.exists()
    assert load(download=True).file.path == cache / source.name
    source.unlink()
    assert load().facts.image_size == 96  # it is there now


def test_a_download_that_fails_is_one_line(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(monkeypatch, (tmp_path / "none-01234567.pth").as_uri())
    with pytest.raises(UserError, match="cannot be downloaded: .*; put the file to ") as refused:
        load(download=True)
    assert "\n" not in str(refused.value)


def test_unknown_names_are_told_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean IMAGENET1K_V1?"):
        locate_weights("resnet18", "IMAGENET1K_V9", download=False)
    with pytest.raises(UserError, match="resnet8 has no named weights; expected a .pt"):
        locate_weights("resnet8", "DEFAULT", download=False)


OLD_NAMES = {
    "torchvision:densenet121": {
        "features.denseblock1.denselayer1.norm1.weight": "norm.1.weight",
        "features.denseblock2.denselayer12.conv2.weight": "conv.2.weight",
    },
    "torchvision:vit_b_16": {
        "encoder.layers.encoder_layer_0.mlp.0.weight": "linear_1.weight",
        "encoder.layers.encoder_layer_11.mlp.3.bias": "linear_2.bias",
    },
}


@pytest.mark.parametrize("network", OLD_NAMES)
def test_old_names_in_torchvisions_files_are_those_of_today(network: str) -> None:
    with torch.device("meta"):
        today = torchvision.models.get_model(network.partition(":")[2]).state_dict()
    assert list(rename_tensors(network, today)) == list(today)
    for name, end in OLD_NAMES[network].items():
        assert name in today
        start = re.sub(r"(norm|conv)?\d\.(weight|bias)$", "", name)
        old = {start + end: torch.zeros(1)}
        assert list(rename_tensors(network, old)) == [name]
        assert rename_tensors("resnet18", old) == old


def test_a_network_of_other_arguments_is_refused(cache: Path) -> None:
    model = Model(name="torchvision:googlenet", weights="DEFAULT")
    with pytest.raises(UserError, match="set model.args.transform_input=true"):
        load_pretrained(model)
    with pytest.raises(UserError, match="is not in the cache"):
        load_pretrained(model.model_copy(update={"args": {"transform_input": True}}))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for timm, with two weights of `tiny`, and for the hub; return the hub's cache."""
    folder = tmp_path / "hub"
    fetched = folder / "models--timm--tiny.a1" / "snapshots" / "0123" / "model.safetensors"

    def find(repository: str, name: str) -> str | None:
        return str(fetched) if fetched.is_file() else None

    def download(repository: str, name: str) -> str:
        fetched.parent.mkdir(parents=True)
        save_file({"a": torch.zeros(1)}, fetched)
        return str(fetched)

    configuration = SimpleNamespace(
        hf_hub_id="timm/tiny.a1", mean=(0.5,) * 3, std=(0.2,) * 3, input_size=(3, 160, 160)
    )
    timm = SimpleNamespace(
        list_pretrained=lambda name: ["tiny.a1", "tiny.b2"] if name == "tiny.*" else [],
        get_pretrained_cfg=lambda name: configuration,
    )
    huggingface_hub = SimpleNamespace(
        constants=SimpleNamespace(HF_HUB_CACHE=str(folder)),
        try_to_load_from_cache=find,
        hf_hub_download=download,
    )
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "huggingface_hub", huggingface_hub)
    return folder


def test_timms_weights_are_found_by_their_tag(hub: Path) -> None:
    for name in ("DEFAULT", "a1"):
        with pytest.raises(UserError, match=r"not in the cache; expected .*timm--tiny.a1"):
            locate_weights("timm:tiny", name, download=False)
    with pytest.raises(
        UserError, match="has no 'a3' of timm's tiny; choose one of DEFAULT, a1, b2"
    ):
        locate_weights("timm:tiny", "a3", download=False)
    with pytest.raises(UserError, match="timm has no weights of large"):
        locate_weights("timm:large", "DEFAULT", download=False)
    fetched = locate_weights("timm:tiny", "DEFAULT", download=True)
    assert fetched == replace(locate_weights("timm:tiny", "a1", False), fetch=fetched.fetch)
    assert (fetched.statistics, fetched.image_size) == (((0.5,) * 3, (0.2,) * 3), 160)
    pretrained = load_pretrained(Model(name="timm:tiny", weights="DEFAULT"))
    assert pretrained is not None and list(pretrained.file.tensors) == ["a"]


def test_timms_weights_may_be_put_where_they_are_expected(hub: Path) -> None:
    place = hub / "models--timm--tiny.a1" / "snapshots" / "model.safetensors"
    place.parent.mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, place)
    assert locate_weights("timm:tiny", "DEFAULT", download=False).file == place


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"need the package huggingface_hub; install localpipe"):
        locate_weights("timm:tiny", "DEFAULT", download=False)


def test_what_looks_like_a_path_is_no_name() -> None:
    for weights in ("weights/best", "best.ckpt"):
        with pytest.raises(UserError, match="does not end in .pt, .pth, .safetensors"):
            load_pretrained(Model(name="resnet18", weights=weights))


@pytest.mark.parametrize(
    ("network", "statistics"), [("resnet18", IMAGENET_STATISTICS), ("resnet8", None)]
)
def test_a_file_has_the_statistics_of_its_networks_images(
    tmp_path: Path, network: str, statistics: object
) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(1)}, path)
    pretrained = load_pretrained(Model(name=network, weights=str(path)))
    assert pretrained is not None
    assert (pretrained.facts.statistics, pretrained.facts.image_size) == (statistics, None)


def test_a_file_of_another_digest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(1)}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_pretrained(Model(weights=str(path), weights_sha256=digest)) is not None
    with pytest.raises(UserError, match=f"has the SHA-256 {digest}, and .* is 0123; "):
        load_pretrained(Model(weights=str(path), weights_sha256="0123"))

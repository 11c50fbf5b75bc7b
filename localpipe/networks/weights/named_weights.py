"""Published weights by name: where their file lies in a cache, and how their images were made.

A source knows the weights of one library. torchvision's file is looked up in the cache of
torch.hub, below TORCH_HOME. timm's is looked up in the cache of the Hugging Face hub, below
HF_HOME.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localpipe.config import registry
from localpipe.errors import UserError, first_line, suggest

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std per channel
# Of the images of ImageNet in 0..1, which nearly all published weights were trained with.
IMAGENET_STATISTICS: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Published files of torchvision keep the names of earlier versions of its networks.
_OLD_NAMES = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
)
# torchvision builds these with other arguments where it loads their named weights.
_ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "googlenet": {"transform_input": True},
    "inception_v3": {"transform_input": True},
}
# torchvision writes the first digits of the SHA-256 before the suffix.
_HASH = re.compile(r"-([0-9a-f]{8,64})\.")


@dataclass(frozen=True)
class NamedWeights:
    """Weights that a library publishes for one architecture.

    file: where the cache has it, or is to have it. `fetch` downloads it and returns its place.
    digits: the first ones of its SHA-256, "" where they are not known. statistics, image_size: of
    the images that the weights were trained with, None where the library does not say.
    """

    file: Path
    fetch: Callable[[], Path]
    digits: str = ""
    statistics: Statistics | None = None
    image_size: int | None = None


# A source returns the weights of an architecture by their name. It raises UserError for an unknown
# name.
Source = Callable[[str, str], NamedWeights]


def find_source(network: str) -> tuple[Source, str] | None:
    """Return the source of a network's named weights, and its name there; None without a source.

    network: model.name. A network without a source has weights in files alone.
    """
    if network in registry.IMAGENET:
        return SOURCES["torchvision"], network
    library, colon, architecture = network.partition(":")
    if colon and library in SOURCES:
        return SOURCES[library], architecture
    return None


def locate_weights(network: str, name: str, download: bool) -> NamedWeights:
    """Return a network's named weights, whose file is there and has the digits of its name.

    download: fetch a missing file. Raises UserError in one line for a network without named
    weights, an unknown name, a missing or damaged file, and a download that fails.
    """
    found = find_source(network)
    if found is None:
        raise UserError(
            f"model: model.weights {name} is a name, and {network} has no named weights; "
            "expected a .pt or .safetensors file"
        )
    source, architecture = found
    weights = source(architecture, name)
    if not weights.file.is_file() and not download:
        raise UserError(
            f"model: model.weights {name} of {network} is not in the cache; expected "
            f"{weights.file}; put the file there, or set model.download=true"
        )
    if not weights.file.is_file():
        return replace(weights, file=_fetch(network, name, weights))
    return weights


def _fetch(network: str, name: str, weights: NamedWeights) -> Path:
    try:
        weights.file.parent.mkdir(parents=True, exist_ok=True)
        return weights.fetch()
    except Exception as error:  # the net, the disk and the libraries raise errors of many kinds
        raise UserError(
            f"model: model.weights {name} of {network} cannot be downloaded: "
            f"{first_line(error).rstrip('.')}; put the file to {weights.file}"
        ) from None


def check_digits(weights: NamedWeights, sha256: str) -> None:
    """Raise UserError unless the SHA-256 of a file begins with the digits in its name."""
    if not sha256.startswith(weights.digits):
        raise UserError(
            f"model: {weights.file} is damaged: its SHA-256 begins with "
            f"{sha256[: len(weights.digits)]}, expected {weights.digits}; remove it, and fetch it "
            "again by model.download=true"
        )


def rename_tensors(network: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return tensors under the names of torchvision's networks of today; others as they are."""
    if not network.startswith("torchvision:"):
        return tensors
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in _OLD_NAMES:
            name = old.sub(new, name)
        renamed[name] = tensor
    return renamed


def check_arguments(network: str, args: Mapping[str, Any]) -> None:
    """Raise UserError for a network that computes something else than its named weights are for.

    args: model.args.
    """
    for key, value in _ARGUMENTS.get(network.removeprefix("torchvision:"), {}).items():
        if args.get(key) != value:
            raise UserError(
                f"model: the named weights of {network} were trained with {key}={value}; "
                f"set model.args.{key}={str(value).lower()}"
            )


# -- the sources --------------------------------------------------------------------------------


def _find_torchvision(architecture: str, name: str) -> NamedWeights:
    """Return weights of torchvision's enums. `transforms` tells how their images were made."""
    import torchvision  # slow, and for names alone

    try:
        members: Mapping[str, Any] = torchvision.models.get_model_weights(architecture).__members__
    except ValueError as error:
        raise UserError(
            f"model: torchvision has no weights of {architecture}: {first_line(error)}; "
            "give a .pt or .safetensors file"
        ) from None
    if name not in members:
        raise UserError(
            f"model: model.weights has no {name!r} of {architecture}; {suggest(name, members)}"
        )
    weights = members[name]
    url = weights.url
    file_name = url.rpartition("/")[2]
    file = Path(torch.hub.get_dir(), "checkpoints", file_name)
    digits = _HASH.search(file_name)

    def fetch() -> Path:
        torch.hub.download_url_to_file(url, str(file), progress=False)
        return file

    preset = weights.transforms()
    statistics = None
    if hasattr(preset, "mean") and hasattr(preset, "std"):
        statistics = (tuple(preset.mean), tuple(preset.std))
    sizes = getattr(preset, "crop_size", None)
    return NamedWeights(
        file,
        fetch,
        digits.group(1) if digits else "",
        statistics,
        sizes[0] if sizes else None,
    )


def _find_timm(architecture: str, name: str) -> NamedWeights:
    """Return weights of timm by their tag. DEFAULT is the default tag."""
    # Both are extras, which most users do not have.
    try:
        hub: Any = importlib.import_module("huggingface_hub")
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        raise UserError(
            f"model: weights of timm need the package {error.name}; install localpipe[timm]"
        ) from None
    tags = timm.list_pretrained(f"{architecture}.*") or timm.list_pretrained(architecture)
    names = [tag.partition(".")[2] for tag in tags]
    if not tags:
        raise UserError(
            f"model: timm has no weights of {architecture}; give a .pt or .safetensors file"
        )
    model = architecture if name == "DEFAULT" else f"{architecture}.{name}"
    if name not in ("DEFAULT", *names):
        raise UserError(
            f"model: model.weights has no {name!r} of timm's {architecture}; "
            f"{suggest(name, ['DEFAULT', *names])}"
        )
    cfg = timm.get_pretrained_cfg(model)
    repository = cfg.hf_hub_id
    if not repository:
        raise UserError(
            f"model: timm's {model} is not on the Hugging Face hub; give a .pt or .safetensors file"
        )

    # A fetched file lies below its revision. A file may also be put where there is none.
    file_name = "model.safetensors"
    cached = hub.try_to_load_from_cache(repository, file_name)
    folder = Path(hub.constants.HF_HUB_CACHE)
    file = folder / f"models--{repository.replace('/', '--')}" / "snapshots" / file_name
    if isinstance(cached, str):
        file = Path(cached)
    return NamedWeights(
        file,
        lambda: Path(hub.hf_hub_download(repository, file_name)),
        statistics=(tuple(cfg.mean), tuple(cfg.std)),
        image_size=cfg.input_size[-1],
    )


SOURCES: Mapping[str, Source] = {"torchvision": _find_torchvision, "timm": _find_timm}

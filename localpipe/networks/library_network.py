"""Networks of torchvision, timm and transformers, by their names there, without weights.

Nothing is downloaded: every builder is called without pretrained weights.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from localpipe.config.user_code import describe_exception
from localpipe.errors import UserError, suggest

Image = tuple[int, ...]  # (C, H, W)
_RGB = 3
# The ends of the names of transformers' classes that predict the next token.
_DECODERS = ("ForCausalLM", "LMHeadModel")
_CAUSAL = "localpipe_causal"  # the name of an attention function
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What the modules of torchvision.models hold beside networks that classify images.
_OTHER_TASKS = ("detection", "optical_flow", "quantization", "segmentation", "video")


@dataclass(frozen=True)
class LibraryNetwork:
    """A network of a library. build: returns a new one. version: `timm 1.0.3` of its library."""

    build: Callable[[], nn.Module]
    version: str


def find_library_network(
    library: str,
    network: str,
    image: Image,
    num_classes: int,
    args: Mapping[str, Any],
    reads: str = "sample",
) -> LibraryNetwork:
    """Return the network that a `model.name` LIBRARY:NETWORK stands for.

    args: of its constructor. `num_classes` and, where the network wants them, the size and the
    channels of images are added where args does not set them. reads: as of a Task. A loss of places
    takes torchvision's networks for segmentation. Nothing is built. Raises UserError for a library
    that is not installed, a name that it lacks, and a network for another task or other inputs.
    """
    if len(image) != 3 and library != "transformers":
        raise UserError(
            f"model: {library}:{network} takes images (C, H, W), but the inputs have shape "
            f"{image}; choose another model.name or data.name"
        )
    module = _import_library(library)
    if library == "torchvision" and reads == "place":
        build = _find_segmentation(network, num_classes, dict(args))
        return LibraryNetwork(build, f"{library} {module.__version__}")
    find: Callable[..., Callable[[], nn.Module]] = _FINDERS[library]
    return LibraryNetwork(
        find(module, network, image, num_classes, dict(args)), f"{library} {module.__version__}"
    )


def _import_library(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise UserError(
            f"model: {library} cannot be imported: {describe_exception(error)}; "
            f"pip install {library}"
        ) from None


def _find_torchvision(
    torchvision: Any, network: str, image: Image, num_classes: int, args: dict[str, Any]
) -> Callable[[], nn.Module]:
    models = importlib.import_module("torchvision.models")
    if network not in models.list_models():
        advice = suggest(network, models.list_models(module=models))
        raise UserError(f"model: torchvision has no {network!r}; {advice}")
    builder = models.get_model_builder(network)
    package = builder.__module__.split(".")[2]
    if package in _OTHER_TASKS:
        raise UserError(
            f"model: torchvision:{network} is a network for {package.replace('_', ' ')}; expected "
            "one that classifies images"
        )

    # Position embeddings have the images' size.
    arguments: dict[str, Any] = {"weights": None, "num_classes": num_classes, **args}
    if network.startswith("vit_") and image[1] == image[2]:
        arguments.setdefault("image_size", image[1])
    if network.startswith("maxvit") and "input_size" not in args:
        arguments["input_size"] = image[1:]
    # torchvision's own warning about initial weights is of no use here.
    if network in ("googlenet", "inception_v3"):
        arguments.setdefault("init_weights", True)
    return partial(builder, **arguments)


def _find_segmentation(
    network: str, num_classes: int, args: dict[str, Any]
) -> Callable[[], nn.Module]:
    """Return what builds a network for segmentation, without its auxiliary head."""
    models = importlib.import_module("torchvision.models")
    names = models.list_models(module=models.segmentation)
    if network not in names:
        raise UserError(
            f"model: torchvision has no network {network!r} for segmentation; "
            f"{suggest(network, names)}"
        )
    arguments = {"weights": None, "weights_backbone": None, "num_classes": num_classes, **args}
    return partial(models.get_model_builder(network), **arguments)


def _find_timm(
    timm: Any, network: str, image: Image, num_classes: int, args: dict[str, Any]
) -> Callable[[], nn.Module]:
    name = network.partition(".")[0]
    if not timm.is_model(name):
        raise UserError(f"model: timm has no {network!r}; {suggest(name, timm.list_models())}")
    arguments: dict[str, Any] = {"num_classes": num_classes, **args}
    if image[0] != _RGB:
        arguments.setdefault("in_chans", image[0])
    # Position embeddings and windows have the images' size.
    settings = timm.get_pretrained_cfg(network, allow_unregistered=True)
    if getattr(settings, "fixed_input_size", False):
        arguments.setdefault("img_size", image[1:])
    return partial(timm.create_model, network, pretrained=False, **arguments)


def _find_transformers(
    transformers: Any, network: str, image: Image, num_classes: int, args: dict[str, Any]
) -> Callable[[], nn.Module]:
    names = args.pop("architectures")
    cls = getattr(transformers, names[0], None)
    if not inspect.isclass(cls) or not hasattr(cls, "config_class"):
        known = [name for name in dir(transformers) if name.endswith("ForImageClassification")]
        raise UserError(
            f"model: transformers has no class {names[0]!r} of {network}; "
            f"{suggest(names[0], known)}"
        )
    settings = {**args, "num_labels": num_classes, "use_cache": False}
    if names[0].endswith(_DECODERS):
        settings.update(_find_decoder_settings(transformers, num_classes))
        _check_window(cls, settings, network, image)
    for key in ("id2label", "label2id"):
        settings.pop(key, None)  # they would decide the number of labels
    return partial(_build_transformer, cls, settings)


def _find_decoder_settings(transformers: Any, num_classes: int) -> dict[str, Any]:
    """Return the settings of a decoder: the data's vocabulary, and attention without masks.

    transformers looks at the values of the positions to choose a mask, which a recording cannot.
    """
    attention = importlib.import_module("transformers.integrations.sdpa_attention")
    # Without a function for masks of this name, torch's own causal attention does without one.
    transformers.AttentionInterface.register(_CAUSAL, attention.sdpa_attention_forward)
    # Special tokens may lie beyond the vocabulary of the data.
    return {
        **dict.fromkeys(_SPECIAL_TOKENS),
        "vocab_size": num_classes,
        "attn_implementation": _CAUSAL,
    }


def _check_window(cls: Any, settings: Mapping[str, Any], network: str, image: Image) -> None:
    """Raise UserError for a window of attention that is shorter than a sample of tokens."""
    window = getattr(cls.config_class.from_dict(dict(settings)), "sliding_window", None)
    if window is not None and window < image[0]:
        raise UserError(
            f"model: {network} sees {window} tokens at a time, but a sample has {image[0]}; set "
            f"data.length={window}, or model.args.sliding_window=null"
        )


def _build_transformer(cls: Any, settings: Mapping[str, Any]) -> nn.Module:
    config = cls.config_class.from_dict(dict(settings))
    network: nn.Module = cls(config)
    return network


_FINDERS: Mapping[str, Callable[..., Callable[[], nn.Module]]] = {
    "torchvision": _find_torchvision,
    "timm": _find_timm,
    "transformers": _find_transformers,
}

"""Which networks can be cut, and whether the pieces are the network: one row for each network.

    python examples/zoo.py torchvision timm transformers [--only PATTERN] [--out FILE]

Every network is built without its published weights, on the smallest image that it accepts, and
runs on batches of two. A row is appended to FILE, one JSON object a line, so a rerun goes on where
the last one ended. The table is written next to it, with the ending .md.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo_step import TOKENS, find_main, train_and_export

from localpipe.fields import Field, dtype_name
from localpipe.networks.blueprint import BlockOutput
from localpipe.networks.recorded.memory_format import memory_order
from localpipe.networks.recorded.recording import (
    Piece,
    Recording,
    RecordingError,
    find_aliases,
    record,
)
from localpipe.pipeline.channels.message import empty_rows

_BATCH = 2
_LENGTH = 16  # tokens of a text
_SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 299, 384, 512)
# Above so many parameters no gradients are compared, and network and pieces share their weights.
_MAX_COMPARED = 300_000_000
# Networks whose weights alone would take more memory are left out.
_MAX_BYTES = 8 * 2**30

# One network of each family of timm, the smallest or a common one.
TIMM = """
bat_resnext26ts beit_base_patch16_224 botnet26t_256 caformer_s18 cait_xxs24_224 coat_tiny
coatnet_nano_rw_224 convformer_s18 convit_tiny convmixer_768_32 convnext_atto convnextv2_atto
crossvit_tiny_240 cs3darknet_m cspresnet50 davit_tiny deit_tiny_patch16_224
deit_tiny_distilled_patch16_224 deit3_small_patch16_224 densenet121 dla34 dm_nfnet_f0 dpn48b
eca_botnext26ts_256 ecaresnet26t edgenext_xx_small efficientformer_l1 efficientformerv2_s0
efficientnet_b0 efficientvit_b0 efficientvit_m0 ese_vovnet19b_dw eva02_tiny_patch14_224
fastvit_t8 fbnetc_100 focalnet_tiny_srf gcvit_xxtiny gernet_s ghostnet_100 gmixer_24_224
gmlp_ti16_224 halonet26t hardcorenas_a hgnet_tiny hgnetv2_b0 hiera_tiny_224 hrnet_w18_small
inception_next_tiny inception_resnet_v2 inception_v3 inception_v4 lambda_resnet26t lcnet_050
legacy_senet154 levit_128s levit_conv_128s maxvit_pico_rw_256 maxxvit_rmlp_nano_rw_256
mambaout_femto mixer_s16_224 mixnet_s mnasnet_small mobilenetv1_100 mobilenetv2_050
mobilenetv3_small_050 mobilenetv4_conv_small mobileone_s0 mobilevit_xxs mobilevitv2_050 mvitv2_tiny
nest_tiny nextvit_small nf_resnet26 pit_ti_224 pit_ti_distilled_224 poolformer_s12 pvt_v2_b0
rdnet_tiny regnetx_002 regnety_002 regnetz_005 repghostnet_050 repvgg_a0 repvit_m0_9 res2net50d
resmlp_12_224 resnest14d resnet10t resnet18 resnetv2_50 resnext26ts rexnet_100 samvit_base_patch16
sebotnet33ts_256 selecsls42 semnasnet_050 sequencer2d_s seresnet50 shvit_s1 skresnet18 spnasnet_100
starnet_s1 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224
swinv2_tiny_window8_256 test_vit tf_efficientnetv2_b0 tiny_vit_5m_224 tinynet_e
tnt_s_legacy_patch16_224 tresnet_m twins_pcpvt_small twins_svt_small vgg11 visformer_tiny
vit_base_r26_s32_224 vit_relpos_small_patch16_224 vit_tiny_patch16_224 vit_tiny_r_s16_p8_224
vitamin_small_224 volo_d1_224 wide_resnet50_2 xception41 xception71 xcit_nano_12_p16_224
"""

# Configurations of a few thousand parameters to a few million: class, model, arguments, input.
_TEXT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_BERT = {**_TEXT, "intermediate_size": 64}
_LLAMA = {**_BERT, "num_key_value_heads": 2, "use_cache": False, "tie_word_embeddings": False}
_VISION = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
_AUDIO = {
    **_BERT, "conv_dim": (16, 16), "conv_kernel": (8, 4), "conv_stride": (4, 2),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4, "layerdrop": 0.0, "apply_spec_augment": False,
}  # fmt: skip
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", _BERT, "text"),
    "bert, masked words, tied": ("BertConfig", "BertForMaskedLM", _BERT, "text"),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", _BERT, "text"),
    "electra": ("ElectraConfig", "ElectraForSequenceClassification", _BERT, "text"),
    "albert": ("AlbertConfig", "AlbertForSequenceClassification",
               {**_BERT, "embedding_size": 16}, "text"),
    "distilbert": ("DistilBertConfig", "DistilBertForSequenceClassification",
                   {"vocab_size": 99, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64},
                   "text"),
    "deberta-v2": ("DebertaV2Config", "DebertaV2ForSequenceClassification", _BERT, "text"),
    "mpnet": ("MPNetConfig", "MPNetForSequenceClassification", _BERT, "text"),
    "modernbert": ("ModernBertConfig", "ModernBertForSequenceClassification",
                   {**_BERT, "pad_token_id": 0}, "text"),
    "gpt2, untied": ("GPT2Config", "GPT2LMHeadModel",
                     {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4,
                      "use_cache": False, "tie_word_embeddings": False}, "text"),
    "gpt2, tied": ("GPT2Config", "GPT2LMHeadModel",
                   {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4,
                    "use_cache": False}, "text"),
    "opt, untied": ("OPTConfig", "OPTForCausalLM",
                    {**_TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32, "use_cache": False,
                     "tie_word_embeddings": False}, "text"),
    "gpt-neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_BERT, "use_cache": False}, "text"),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA, "text"),
    "mistral": ("MistralConfig", "MistralForCausalLM", _LLAMA, "text"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _LLAMA, "text"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_LLAMA, "head_dim": 8}, "text"),
    "phi": ("PhiConfig", "PhiForCausalLM", _LLAMA, "text"),
    "gemma, untied": ("GemmaConfig", "GemmaForCausalLM", {**_LLAMA, "head_dim": 8}, "text"),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM",
                {**_LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1}, "text"),
    "mamba": ("MambaConfig", "MambaForCausalLM",
              {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "use_cache": False,
               "tie_word_embeddings": False}, "text"),
    "t5, encoder": ("T5Config", "T5EncoderModel",
                    {"vocab_size": 99, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 3,
                     "num_heads": 4}, "text"),
    "vit": ("ViTConfig", "ViTForImageClassification", _VISION, "image"),
    "deit": ("DeiTConfig", "DeiTForImageClassification", _VISION, "image"),
    "beit": ("BeitConfig", "BeitForImageClassification", _VISION, "image"),
    "data2vec-vision": ("Data2VecVisionConfig", "Data2VecVisionForImageClassification", _VISION,
                        "image"),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", _VISION, "image"),
    "swin": ("SwinConfig", "SwinForImageClassification",
             {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 2],
              "num_heads": [2, 4], "window_size": 4}, "image"),
    "swinv2": ("Swinv2Config", "Swinv2ForImageClassification",
               {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 2],
                "num_heads": [2, 4], "window_size": 4}, "image"),
    "convnext": ("ConvNextConfig", "ConvNextForImageClassification",
                 {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1]}, "image"),
    "convnextv2": ("ConvNextV2Config", "ConvNextV2ForImageClassification",
                   {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1]}, "image"),
    "resnet": ("ResNetConfig", "ResNetForImageClassification",
               {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1]},
               "image"),
    "regnet": ("RegNetConfig", "RegNetForImageClassification",
               {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 2, 1],
                "groups_width": 8}, "image"),
    "segformer": ("SegformerConfig", "SegformerForImageClassification",
                  {"hidden_sizes": [8, 16, 16, 32], "num_attention_heads": [1, 2, 2, 4],
                   "depths": [1, 1, 2, 1]}, "image"),
    "pvt-v2": ("PvtV2Config", "PvtV2ForImageClassification",
               {"hidden_sizes": [8, 16, 16, 32], "num_attention_heads": [1, 2, 2, 4],
                "depths": [1, 1, 2, 1], "image_size": 64}, "image"),
    "mobilevit": ("MobileViTConfig", "MobileViTForImageClassification",
                  {"image_size": 64, "hidden_sizes": [16, 24, 32],
                   "neck_hidden_sizes": [8, 8, 16, 16, 16, 32, 32]}, "image"),
    "mobilenet_v2": ("MobileNetV2Config", "MobileNetV2ForImageClassification",
                     {"depth_multiplier": 0.25, "image_size": 64}, "image"),
    "efficientnet": ("EfficientNetConfig", "EfficientNetForImageClassification",
                     {"width_coefficient": 0.25, "depth_coefficient": 0.5, "image_size": 64,
                      "hidden_dim": 320}, "image"),
    "levit": ("LevitConfig", "LevitForImageClassification",
              {"image_size": 64, "hidden_sizes": [16, 32, 48], "num_attention_heads": [1, 2, 3],
               "depths": [1, 1, 1], "key_dim": [8, 8, 8]}, "image"),
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2ForSequenceClassification", _AUDIO, "audio"),
    "hubert": ("HubertConfig", "HubertForSequenceClassification", _AUDIO, "audio"),
}  # fmt: skip

# Groups of torchvision that take no image or give no tensor of logits: a line for each.
GROUPS = {
    "torchvision.models.quantization": "their weights are packed integers, which cannot be trained",
    "torchvision.models.detection": "they take lists of images and boxes, and loop over them",
    "torchvision.models.video": "they take clips (B, C, T, H, W), which are no images",
    "torchvision.models.optical_flow": "they take two images, and refine one output in a loop",
}


@dataclass
class ZooNetwork:
    """A network of a library, how it is built and what it takes. `size` is None if not known.

    task: what it is trained for by the name `LIBRARY:NAME` of a configuration, or None. arguments:
    its model.args there.
    """

    library: str
    name: str
    build: Callable[[int | None], nn.Module]
    sample: Callable[[int, int], tuple[Tensor, ...]]
    sizes: Sequence[int | None] = _SIZES
    task: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class ZooRow:
    """What is known of a network. `refused` is the reason why it has no pieces, or None."""

    library: str
    name: str
    size: int | None = None
    parameters: int | None = None
    built: str | None = None
    crossing: int | None = None
    blocks: int | None = None
    layouts: list[str] = field(default_factory=list)
    orders: bool | None = None
    recording_s: float | None = None
    names: bool | None = None
    training: bool | None = None
    evaluation: bool | None = None
    copied: bool | None = None
    gradients: bool | None = None
    calls: str | None = None
    greedy: bool | None = None
    export: bool | None = None
    refused: str | None = None
    note: str = ""
    version: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Try the networks that have no row yet, and write the table; return the exit status."""
    arguments = _build_parser().parse_args(argv)
    torch.set_num_threads(1)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    earlier_rows = {(row["library"], row["name"]): row for row in read_rows(arguments.out)}
    end = time.monotonic() + 60 * arguments.minutes

    for library in arguments.libraries:
        for network in _LIBRARIES[library]():
            if not fnmatch.fnmatch(network.name, arguments.only):
                continue
            earlier_row = earlier_rows.get((library, network.name))
            if _is_complete(network, earlier_row) or time.monotonic() > end:
                continue
            row = ZooRow(**earlier_row) if earlier_row is not None else try_network(network)
            _try_step(network, row)
            with arguments.out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(vars(row)) + "\n")
            print(f"{library} {network.name}: {_summarise(vars(row))}", flush=True)
            gc.collect()
    table = make_table(read_rows(arguments.out))
    arguments.out.with_suffix(".md").write_text(table, encoding="utf-8")
    return 0


def _is_complete(network: ZooNetwork, row: dict[str, Any] | None) -> bool:
    """Return whether a row holds all that can be known. Older rows lack the step of some tasks."""
    if row is None or "greedy" not in row:
        return False
    has_no_step = network.task is None or row["refused"] is not None or _is_large(row["parameters"])
    return has_no_step or row["greedy"] is not None


def _is_large(parameters: int | None) -> bool:
    return parameters is not None and parameters > _MAX_COMPARED


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("libraries", nargs="+", choices=sorted(_LIBRARIES))
    parser.add_argument("--only", default="*", help="networks whose name matches, as 'resnet*'")
    parser.add_argument("--out", type=Path, default=Path("docs/zoo.jsonl"))
    parser.add_argument("--minutes", type=float, default=100.0, help="no network begins after that")
    return parser


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file, or none if there is no file. Of a network, the last one counts."""
    if not path.exists():
        return []
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["library"], row["name"]] = row
    return list(rows.values())


# -- the networks --------------------------------------------------------------------------------


def list_torchvision() -> Iterator[ZooNetwork]:
    """Yield the networks of torchvision that classify images, and those that segment them."""
    for name in torchvision.models.list_models(module=torchvision.models):
        yield ZooNetwork("torchvision", name, _make_builder(name), _images, task="classification")
    for name in torchvision.models.list_models(module=torchvision.models.segmentation):
        yield ZooNetwork("torchvision", name, _make_builder(name), _images, task="segmentation")


def _make_builder(name: str) -> Callable[[int | None], nn.Module]:
    def build(size: int | None) -> nn.Module:
        options: dict[str, Any] = {}
        if name in ("googlenet", "inception_v3"):
            options["init_weights"] = False
        if name.startswith("vit_"):
            options["image_size"] = size
        if name.startswith("maxvit"):
            # Its windows divide the sides of every map.
            options["input_size"] = (size, size)
        if name.startswith(("deeplab", "fcn", "lraspp")):
            options["weights_backbone"] = None
        network: nn.Module = torchvision.models.get_model(name, weights=None, **options)
        return network

    return build


def list_timm() -> Iterator[ZooNetwork]:
    """Yield one network for each of timm's families."""
    timm = import_module("timm")
    names = set(timm.list_models())
    for name in TIMM.split():
        if name not in names:
            continue

        def build(size: int | None, name: str = name) -> nn.Module:
            # Some take the size of the image, others any size. The default is what all take.
            if size is not None:
                try:
                    return timm.create_model(name, img_size=size)  # type: ignore[no-any-return]
                except TypeError:
                    pass
            return timm.create_model(name)  # type: ignore[no-any-return]

        default = int(timm.get_pretrained_cfg(name).input_size[-1])
        sizes = [*(size for size in _SIZES if size < default), default]
        yield ZooNetwork("timm", name, build, _images, sizes, task="classification")


def list_transformers() -> Iterator[ZooNetwork]:
    """Yield networks of transformers from small configurations."""
    transformers = import_module("transformers")
    samples = {"text": _words, "audio": _sounds, "image": _images}
    for name, (config, model, options, kind) in TRANSFORMERS.items():
        if not hasattr(transformers, model):
            continue

        def build(
            size: int | None,
            config: str = config,
            model: str = model,
            options: dict[str, Any] = options,
        ) -> nn.Module:
            settings = getattr(transformers, config)(**options)
            network: nn.Module = getattr(transformers, model)(settings)
            return network

        side = options.get("image_size", 64)
        task, arguments = None, {}
        if model.endswith(("ForCausalLM", "LMHeadModel")):
            task, arguments = TOKENS, {"architectures": [model], **options}
        if model.endswith("ForImageClassification"):
            task, arguments = "classification", {"architectures": [model], **options}
        yield ZooNetwork("transformers", name, build, samples[kind], [side], task, arguments)


_LIBRARIES = {
    "torchvision": list_torchvision,
    "timm": list_timm,
    "transformers": list_transformers,
}


def _images(batch: int, size: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(batch)
    return (torch.randn(batch, 3, size, size, generator=generator),)


def _words(batch: int, size: int) -> tuple[Tensor, ...]:
    return (torch.arange(batch * _LENGTH).reshape(batch, _LENGTH) * 7 % 97 + 2,)


def _sounds(batch: int, size: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(batch)
    return (torch.randn(batch, 800, generator=generator),)


# -- one network -----------------------------------------------------------------------------------


def try_network(network: ZooNetwork) -> ZooRow:
    """Return the row of a network. Whatever fails is its reason."""
    row = ZooRow(network.library, network.name, version=metadata.version(network.library))
    try:
        _fill_row(network, row)
    except RecordingError as error:
        row.refused = str(error)
    except Exception as error:
        row.refused = f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"
    return row


def _try_step(network: ZooNetwork, row: ZooRow) -> None:
    """Train a network that has a task for a step in four stages, and export it."""
    size = row.size if network.sample is _images else _LENGTH
    if row.refused is not None or network.task is None or size is None:
        return
    if _is_large(row.parameters):
        return
    name = f"{network.library}:{network.name}"
    try:
        row.greedy, row.export = train_and_export(
            name, size, row.crossing or 1, network.task, network.arguments
        )
    except Exception as error:
        row.greedy = False
        reason = f"under greedy: {type(error).__name__}: {str(error).splitlines()[0][:300]}"
        row.note = "; ".join(filter(None, [row.note, reason]))


def _fill_row(network: ZooNetwork, row: ZooRow) -> None:
    """Record a network and compare its pieces with it."""
    size = _find_size(network)
    row.size = size if network.sample is _images else None
    meta, aliases, row.built = _build_meta(network, size)
    row.parameters = sum(parameter.numel() for parameter in meta.parameters())
    if 4 * row.parameters > _MAX_BYTES:
        row.refused = "left out: its weights take more than 8 GiB"
        return

    def sample(batch: int) -> tuple[Tensor, ...]:
        return tuple(tensor.to("meta") for tensor in network.sample(batch, size))

    begin = time.process_time()
    row.crossing = 1
    try:
        recording = record(meta, sample, aliases=aliases)
    except RecordingError as error:
        if "model.crossing: " not in str(error):
            raise
        row.crossing = int(str(error).partition("model.crossing: ")[2].split()[0])
        row.note = "one tensor is alive nowhere"
        recording = record(meta, sample, row.crossing, aliases=aliases)
    row.recording_s = round(time.process_time() - begin, 2)
    row.blocks = len(recording.names)
    row.layouts = sorted({output.layout for output in recording.outputs})
    if recording.unused:
        row.note = f"parameters that training does not use: {len(recording.unused)}"
    del meta

    torch.manual_seed(0)
    plain = network.build(size)
    _compare(plain, recording, lambda: network.sample(_BATCH, size), row)


def _find_size(network: ZooNetwork) -> int:
    """Return the smallest size of images for which a network can be built and run."""
    failure: Exception | None = None
    for size in network.sizes:
        assert size is not None
        try:
            meta, _, _ = _build_meta(network, size)
            with torch.no_grad():
                for is_training in (True, False):
                    inputs = tuple(x.to("meta") for x in network.sample(_BATCH, size))
                    meta.train(is_training)(*inputs)
        except Exception as error:
            failure = error
            continue
        return size
    # The recorder finds better words for what fails.
    if network.sizes and network.sizes[-1] is not None and failure is not None:
        return network.sizes[-1]
    raise RuntimeError("no size of images is known")


def _build_meta(network: ZooNetwork, size: int) -> tuple[nn.Module, dict[str, str], str]:
    """Return a network on the meta device, the names of its tied tensors, and how it was built."""
    try:
        with torch.device("meta"):
            built_network = network.build(size)
        tensors = [*built_network.parameters(), *built_network.buffers()]
        if all(tensor.is_meta for tensor in tensors):
            return built_network, find_aliases(built_network), "meta"
    except Exception:
        pass  # its constructor needs values
    built_network = network.build(size)
    aliases = find_aliases(built_network)
    return built_network.to("meta"), aliases, "cpu"


@dataclass
class _Outcome:
    output: Tensor
    draw: Tensor
    calls: list[str]


class _CallLog(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def _compare(
    plain: nn.Module,
    recording: Recording,
    sample: Callable[[], tuple[Tensor, ...]],
    row: ZooRow,
) -> None:
    """Fill in what is equal between a network and its pieces."""
    is_large = row.parameters is not None and row.parameters > _MAX_COMPARED
    if is_large:
        row.note = "; ".join(filter(None, [row.note, "gradients not compared: over 300 M"]))
    twin = plain if is_large else copy.deepcopy(plain)
    pieces = recording.pieces(twin)
    names = [name for piece in pieces for name in piece.state_dict()]
    row.names = sorted(names) == sorted(plain.state_dict())

    # Training, with a backward pass. The pieces have no auxiliary classifiers.
    dropped = _drop_auxiliary(plain, recording.unused)
    if dropped:
        row.note = f"compared in training without {', '.join(dropped)}, which the pieces leave out"
    _set_mode(plain, pieces, True)
    with torch.set_grad_enabled(not is_large):
        plain_run = _run(plain, sample())
        cut_run = _run(lambda *inputs: compose(pieces, inputs), sample())
        row.training = _is_same(plain_run.output, cut_run.output)
        row.training = row.training and torch.equal(plain_run.draw, cut_run.draw)
        row.calls = _compare_calls(plain_run.calls, cut_run.calls)
    if not is_large:
        row.gradients = _has_same_gradients(plain, twin, plain_run.output, cut_run.output)
        row.training = row.training and _has_same_buffers(plain, twin)

    # Evaluation, also with the copies that a sender makes at every boundary.
    _set_mode(plain, pieces, False)
    with torch.no_grad():
        plain_run = _run(plain, sample())
        cut_run = _run(lambda *inputs: compose(pieces, inputs), sample())
        copied_run = _run(lambda *inputs: compose(pieces, inputs, recording.outputs), sample())
    row.evaluation = _is_same(plain_run.output, cut_run.output)
    row.copied = _is_same(plain_run.output, copied_run.output)
    with torch.no_grad():
        row.orders = _has_recorded_orders(pieces, sample(), recording.outputs)
    if row.calls == "same":
        row.calls = _compare_calls(plain_run.calls, cut_run.calls)


def _drop_auxiliary(network: nn.Module, unused: Sequence[str]) -> list[str]:
    """Set the children of which no parameter is used to None, as torchvision does without them."""
    dropped = []
    for name, child in list(network.named_children()):
        parameters = {f"{name}.{inner}" for inner, _ in child.named_parameters()}
        if parameters and parameters.issubset(unused) and "aux" in name.lower():
            setattr(network, name, None)
            dropped.append(name)
    return dropped


def _set_mode(plain: nn.Module, pieces: Sequence[Piece], is_training: bool) -> None:
    plain.train(is_training)
    for piece in pieces:
        piece.train(is_training)


def _run(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> _Outcome:
    """Run a forward pass under a seed. Return its main output and what is drawn after it."""
    torch.manual_seed(7)
    with _CallLog() as log:
        output = find_main(function(*inputs))
    return _Outcome(output, torch.rand(3), log.calls)


def compose(
    pieces: Sequence[Piece], inputs: tuple[Tensor, ...], outputs: Sequence[BlockOutput] = ()
) -> Any:
    """Return what the last piece gives. With `outputs`, a sender's copy is made at boundaries."""
    crossing = inputs
    for index, piece in enumerate(pieces):
        result = piece(*crossing)
        crossing = result if isinstance(result, tuple) else (result,)
        if index < len(outputs):
            crossing = (copy_in_order(crossing[0], outputs[index].order), *crossing[1:])
    return crossing[0]


def copy_in_order(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return a copy of (B, ...) in a message's memory of that order, as a sender makes it."""
    field = Field("h", tuple(tensor.shape[1:]), dtype_name(tensor.dtype), order)
    return empty_rows(field, len(tensor), "cpu").copy_(tensor)


def _has_recorded_orders(
    pieces: Sequence[Piece], inputs: tuple[Tensor, ...], outputs: Sequence[BlockOutput]
) -> bool:
    """Whether the order in memory of every output is the one of the meta device."""
    crossing = inputs
    for piece, output in zip(pieces, outputs, strict=False):
        result = piece(*crossing)
        crossing = result if isinstance(result, tuple) else (result,)
        strides = []
        for order in (memory_order(crossing[0]), output.order):
            copied = copy_in_order(crossing[0], order)
            # The stride of a dimension of one place says nothing.
            strides.append([s for s, n in zip(copied.stride(), copied.shape, strict=True) if n > 1])
        if strides[0] != strides[1]:
            return False
    return True


def _is_same(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape:
        return False
    return bool(torch.eq(first, second).logical_or(first.isnan()).all())


def _compare_calls(plain: Sequence[str], cut: Sequence[str]) -> str:
    """Return `same`, or how many calls the pieces make more (+) and less (-), or `moved`."""
    if plain == cut:
        return "same"
    more = Counter(cut) - Counter(plain)
    less = Counter(plain) - Counter(cut)
    counts = []
    if more:
        counts.append(f"+{more.total()}")
    if less:
        counts.append(f"-{less.total()}")
    return " ".join(counts) or "moved"


def _has_same_gradients(
    plain: nn.Module, twin: nn.Module, plain_output: Tensor, cut_output: Tensor
) -> bool:
    """Whether the same gradient of the output gives the same gradients of all parameters."""
    generator = torch.Generator().manual_seed(3)
    gradient = torch.rand(plain_output.shape, generator=generator).to(plain_output.dtype)
    plain_output.backward(gradient)
    cut_output.backward(gradient)
    twin_parameters = dict(twin.named_parameters())
    for name, parameter in plain.named_parameters():
        expected, actual = parameter.grad, twin_parameters[name].grad
        if (expected is None) != (actual is None):
            return False
        if expected is not None and actual is not None and not _is_same(expected, actual):
            return False
    return True


def _has_same_buffers(plain: nn.Module, twin: nn.Module) -> bool:
    twin_buffers = dict(twin.named_buffers())
    return all(_is_same(buffer, twin_buffers[name]) for name, buffer in plain.named_buffers())


# -- the table -------------------------------------------------------------------------------------


def _summarise(row: dict[str, Any]) -> str:
    """Return a row as one line."""
    if row["refused"] is not None:
        return f"refused: {row['refused']}"
    keys = (
        "names", "training", "evaluation", "copied", "orders", "gradients", "greedy", "export",
    )  # fmt: skip
    wrong = [key for key in keys if row.get(key) is False]
    calls = "" if row["calls"] == "same" else f", calls {row['calls']}"
    return f"{row['blocks']} blocks, {'wrong: ' + ' '.join(wrong) if wrong else 'equal'}{calls}"


def make_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the page: a summary, a table for each library, and the reasons of the exceptions."""
    lines = [
        "# Networks that nobody wrote to be cut",
        "",
        "Made by `python examples/zoo.py torchvision timm transformers`. Every network is built",
        "without its published weights and recorded on the meta device. Its pieces are compared",
        "with it, on two samples of the smallest size that it accepts.",
        "",
        "- `tensors` is how many cross a cut at most, `blocks` how many there are before the head.",
        "- `train` and `eval` say whether output, buffers and random draws are equal, bit for bit.",
        "- `copied` says the same where the output of every block is copied into its recorded",
        "  order in memory, as a sender does. `order` says whether this is its real order.",
        "- `gradients` are those of all parameters. A dash means that they were not compared.",
        "- `calls` are the calls of aten: `same` is the same ones in the same order. `+N` are made",
        "  again, such as a mask that several pieces need. `-N` are left out, since nothing reads",
        "  what they make. `moved` are made in the piece that needs them.",
        "- `names` says whether the pieces have the names of the network's own state_dict.",
        "- `greedy` says whether a classifier of images trains one step in four stages (or in as",
        "  many as it has blocks) under `greedy`. `export` says whether the original class then",
        "  loads its weights with `strict=True`, and gives the stages' own logits, bit for bit.",
        "  A dash means that no step was tried, as for networks that do not classify images by",
        "  their name alone, and for those above 300 M parameters.",
        "- `seconds` is the recording's, of one core.",
        "",
    ]
    for library in _LIBRARIES:
        library_rows = [row for row in rows if row["library"] == library]
        if library_rows:
            lines.extend(_make_section(library, library_rows))
    if any(row["library"] == "torchvision" for row in rows):
        lines.extend(["## Other networks of torchvision", ""])
        lines.extend(f"- `{group}`: {reason}." for group, reason in GROUPS.items())
        lines.append("")
    return "\n".join(lines)


def _make_section(library: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of a library: the networks that are cut, then the exceptions."""
    cut_rows = [row for row in rows if row["refused"] is None]
    equal_rows = []
    for row in cut_rows:
        if _summarise(row).partition("blocks, ")[2].startswith("equal"):
            equal_rows.append(row)
    version = ", ".join(sorted({row["version"] for row in rows}))
    lines = [
        f"## {library} {version}",
        "",
        f"{len(cut_rows)} of {len(rows)} networks are cut, "
        f"{len(equal_rows)} of them equal in all columns.",
        "",
        "| network | size | parameters | tensors | blocks | train | eval | copied | order "
        "| gradients | calls | names | greedy | export | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in cut_rows:
        size = row["size"] or "-"
        count = f"{row['parameters'] / 1e6:.2f} M"
        cells = [row["name"], size, count, row["crossing"], row["blocks"]]
        for key in ("training", "evaluation", "copied", "orders", "gradients"):
            cells.append(_format_flag(row[key]))
        cells += [row["calls"], _format_flag(row["names"])]
        cells += [_format_flag(row.get("greedy")), _format_flag(row.get("export"))]
        cells.append(row["recording_s"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    noted_rows = [row for row in cut_rows if row["note"]]
    if noted_rows:
        lines.extend(["", "Notes:", ""])
        lines.extend(f"- `{row['name']}`: {row['note']}." for row in noted_rows)
    refused_rows = [row for row in rows if row["refused"] is not None]
    if refused_rows:
        lines.extend(["", "Not cut:", ""])
        lines.extend(f"- `{row['name']}`: {row['refused']}." for row in refused_rows)
    return [*lines, ""]


def _format_flag(value: bool | None) -> str:
    if value is None:
        return "-"
    return "yes" if value else "NO"


if __name__ == "__main__":
    sys.exit(main())

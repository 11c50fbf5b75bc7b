"""Decoders of transformers on next-token prediction: recorded, causal, and what they are there."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from localpipe import config as configs
from localpipe import data
from localpipe.config.load import update
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.pipeline.stages.stage_plan import build_blueprint
from localpipe.plan.resolve_here import resolve_here
from localpipe.results.export import load
from localpipe.runs.directory import RunDirectory
from tests import ROOT
from tests.harness import train

transformers = pytest.importorskip("transformers")
LENGTH = 16
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 2,
    "n_positions": 64,
    "vocab_size": 50257,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32000,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODERS = {"gpt2": GPT2, "llama": LLAMA}


def resolved(folder: Path, values: dict[str, Any], **args: Any) -> Resolved:
    """Return the configuration of a decoder in three stages on a small text."""
    (folder / "decoder.json").write_text(json.dumps(values))
    (folder / "text").write_text("a text that is the same every time, " * 30)
    name = f"transformers:{folder / 'decoder.json'}"
    sections = {
        "model": {"name": name, "untie": True, "args": args},
        "method": {"objective": {"name": "auglocal", "aux_depth": 1}},
        "pipeline": {"stages": 3, "processes": 1},
        "data": {
            "name": "bytes",
            "root": str(folder / "text"),
            "length": LENGTH,
            "batch_size": 8,
        },
        "optim": {"name": "adamw", "lr": 0.01, "epochs": 2, "schedule": "cosine_step"},
        "run": {"dir": str(folder / "run"), "threads": 1, "device": "cpu"},
    }
    given = configs.parse(sections, "test")
    return resolve_here(given, data.load(given.data, 0))


@pytest.mark.parametrize("name", DECODERS)
def test_the_blocks_compute_what_the_network_computes_there(tmp_path: Path, name: str) -> None:
    blueprint = build_blueprint(resolved(tmp_path, DECODERS[name]))
    assert len(blueprint.blocks) >= 3 and blueprint.dtype == "int64"
    parts = nn.Sequential(*blueprint.build(range(len(blueprint.parts)), 0)).eval()
    assert blueprint.build_original is not None
    original: Any = blueprint.build_original().eval()
    original.load_state_dict({key: value for part in parts for key, value in part_state(part)})
    tokens = torch.randint(256, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = parts(tokens)
        original.set_attn_implementation("eager")  # with a mask
        torch.testing.assert_close(outputs, original(tokens).logits, atol=1e-5, rtol=1e-4)
        changed = tokens.clone()
        changed[:, 9] = (changed[:, 9] + 1) % 256
        after = parts(changed)
    assert torch.equal(after[:, :9], outputs[:, :9]) and not torch.equal(after, outputs)


def part_state(part: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return list(part.state_dict().items())


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_trains_and_is_loaded(tmp_path: Path, name: str) -> None:
    config = resolved(tmp_path, DECODERS[name])
    assert train(config) == 0
    summary = RunDirectory(tmp_path / "run").summary()
    assert summary is not None and summary["metric"]["name"] == "bits_per_byte"
    assert summary["metric"]["value"] < 8
    outputs = load(tmp_path / "run", trust=True)(torch.zeros(2, LENGTH, dtype=torch.int64))
    assert outputs.shape == (2, LENGTH, 256)


def test_a_window_of_attention_that_is_too_short_is_one_line(tmp_path: Path) -> None:
    values = {**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": 8}
    with pytest.raises(UserError, match="sees 8 tokens at a time, but a sample has 16"):
        build_blueprint(resolved(tmp_path, values))


def test_a_network_of_images_is_one_line(tmp_path: Path) -> None:
    config = update(resolved(tmp_path, LLAMA), {"model.name": "torchvision:vit_b_16"})
    config = update(config, {"model.args": {}})
    with pytest.raises(UserError, match=r"torchvision:vit_b_16 takes images \(C, H, W\), but the"):
        build_blueprint(config)


@pytest.mark.parametrize("name", DECODERS)
def test_the_zoo_tries_a_step_of_decoders(name: str) -> None:
    train_and_export = runpy.run_path(str(ROOT / "examples/zoo_step.py"))["train_and_export"]
    arguments = {**DECODERS[name], "tie_word_embeddings": False}
    found = train_and_export("transformers:x", LENGTH, task="next_token", arguments=arguments)
    assert found == (True, True)

"""A decoder's run in a file and back, its card, its evaluation, and a text that goes on."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import localpipe
from localpipe import config as configs
from localpipe import data
from localpipe.cli.command_line import main
from localpipe.data.images import Split
from localpipe.runs.directory import RunDirectory
from tests.harness import train

LENGTH = 16
DIGITS = ["data.name=digits", "data.root=data", "data.test=null"]
Continue = Callable[..., bytes]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run that knows its text by heart."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "text").write_text("abcdefgh" * 200)
    sections: dict[str, Any] = {
        "model": {"name": "gpt", "args": {"depth": 2, "width": 16, "heads": 2}},
        "method": {"objective": {"name": "dgl"}, "context": {"mode": "E"}},
        "pipeline": {"stages": 2, "processes": 1},
        "data": {
            "name": "bytes",
            "root": str(folder / "text"),
            "length": LENGTH,
            "batch_size": 8,
        },
        "optim": {"name": "adamw", "lr": 0.02, "epochs": 6, "schedule": "cosine_step"},
        "run": {"dir": str(folder / "run"), "threads": 1, "device": "cpu", "probe": "linear"},
    }
    assert train(configs.parse(sections, "test")) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def continue_text() -> Continue:
    found: Continue = runpy.run_path("examples/generate.py")["continue_text"]
    return found


def read_tokens(run_dir: Path) -> tuple[torch.Tensor, torch.Tensor]:
    test = data.load(RunDirectory(run_dir).config(()).data, 0).test
    assert not isinstance(test, Split)
    batch = test.read(np.arange(len(test)))
    return torch.from_numpy(batch["input"]), torch.from_numpy(batch["target"])


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors", "net.pt2"])
def test_an_export_has_the_accuracy_of_the_run_and_continues_its_text(
    run_dir: Path, tmp_path: Path, continue_text: Continue, name: str
) -> None:
    assert main(["export", str(run_dir), "-o", str(tmp_path / name)]) == 0
    network = localpipe.load(tmp_path / name)
    tokens, targets = read_tokens(run_dir)
    outputs = network(tokens)
    summary = RunDirectory(run_dir).summary()
    assert summary is not None and outputs.shape == (len(tokens), LENGTH, 256)
    accuracy = float((outputs.argmax(2) == targets).double().mean())
    assert accuracy == pytest.approx(summary["test_accuracy"]) and accuracy > 0.9
    assert network.sample == (LENGTH,)
    # The text is longer than what the network sees.
    expected = ("efgh" + "abcdefgh" * 3)[:25].encode()
    assert continue_text(network, b"abcdefghabcd", 25, 0.0, 0) == expected
    drawn = [continue_text(network, b"abcd", 40, 3.0, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_exit_and_the_run_itself_are_loaded_too(run_dir: Path, tmp_path: Path) -> None:
    assert main(["export", str(run_dir), "-o", str(tmp_path / "exit.pt"), "--exit", "0"]) == 0
    tokens, targets = read_tokens(run_dir)
    outputs = localpipe.load(tmp_path / "exit.pt")(tokens)
    summary = RunDirectory(run_dir).summary()
    assert summary is not None
    accuracy = float((outputs.argmax(2) == targets).double().mean())
    assert accuracy == pytest.approx(summary["test_accuracy_per_stage"][0])
    assert localpipe.load(run_dir)(tokens).shape == outputs.shape


def test_the_model_card_speaks_of_bits(run_dir: Path, tmp_path: Path) -> None:
    assert main(["export", str(run_dir), "-o", str(tmp_path / "net.pt")]) == 0
    card = (tmp_path / "net.md").read_text()
    assert "Bits per byte" in card and "bits per byte of its own exit" in card
    assert "image" not in card


def test_evaluation_and_report_follow_the_metric(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(run_dir)]) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert main(["report", str(run_dir)]) == 0
    summary = RunDirectory(run_dir).summary()
    assert summary is not None
    assert summary["metric"]["name"] == "bits_per_byte" and summary["metric"]["value"] < 1
    assert len(summary["probe_metric_per_stage"]) == 2


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["model.name=resnet8"], "resnet8 takes images (C, H, W), but the inputs of bytes are"),
        (["task.name=classification"], "but task classification takes int64 of shape ()"),
        (["method=infopro"], "infopro is for images, and the task reads tokens"),
        (
            DIGITS,
            "gpt takes tokens (T,) of int64, but the inputs of digits are",
        ),
        (["model.num_classes=100"], "bytes needs 256 outputs, but model.num_classes is 100"),
        (["task.name=segmentation"], "segmentation takes images (C, H, W), but the inputs have"),
    ],
)
def test_what_does_not_go_with_tokens_is_one_line(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], text: str
) -> None:
    small = ["model.args={depth: 4, width: 8, heads: 2}", "data.length=16"]
    if "model.name=resnet8" in words:
        small = []
    arguments = ["train", "gpt_bytes", *small, f"run.dir={tmp_path / 'run'}", *words]
    assert main(arguments) == 2
    shown = capfd.readouterr().err
    assert shown.count("\n") == 1 and text in shown, shown
    assert not (tmp_path / "run" / "metrics.jsonl").exists()

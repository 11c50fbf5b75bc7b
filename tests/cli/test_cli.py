"""The commands as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from localpipe.cli.command_line import main
from localpipe.config import shipped
from localpipe.config.load import to_yaml
from localpipe.config.resume import flatten, read_recorded
from localpipe.runs.records import read_records
from tests import ROOT
from tests.harness import settings

TINY = [
    "model.name=resnet8", "data.train_subset=200", "data.batch_size=32",
    "optim.epochs=2", "optim.lr=0.05", "run.threads=1",
]  # fmt: skip


def command(*words: object, status: int = 0, module: tuple[str, ...] = ("-m", "localpipe")) -> str:
    """Run localpipe in a process of its own; return what it printed."""
    result = subprocess.run(
        [sys.executable, *module, *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == status, result.stdout + result.stderr
    assert "\x1b" not in result.stdout + result.stderr  # without a terminal nothing controls one
    return result.stdout


def summary(run_dir: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two processes."""
    run_dir = tmp_path_factory.mktemp("runs") / "two"
    command("train", "configs/demo.yaml", *TINY, f"run.dir={run_dir}")
    return run_dir


def test_a_run_leaves_its_files(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "checkpoints",
        "tensorboard",
        "lock",
    }
    result = summary(trained)
    assert (result["schema"], result["stages"]) == (1, 4)
    assert (result["processes"], result["steps"]) == (2, 14)
    assert (
        len(result["test_accuracy_per_stage"]) == 4
        and result["test_accuracy_per_stage"][-1] == result["test_accuracy"]
    )
    assert len(result["peak_memory_bytes"]) == 2 and result["deterministic"] is True
    records = list(read_records(trained / "metrics.jsonl"))
    assert records[0]["schema"] == 1
    evaluated = [(r["epoch"], r["stage"]) for r in records if r["kind"] == "eval"]
    assert sorted(evaluated) == [(epoch, stage) for epoch in (1, 2) for stage in range(4)]


def test_the_recorded_configuration_has_no_auto_left_and_reads_back(trained: Path) -> None:
    recorded = read_recorded(trained / "config.yaml")
    assert [
        key for key, value in flatten(recorded).items() if value == "auto" and key != "run.resume"
    ] == []


@pytest.mark.parametrize("processes", [1, 4])
def test_the_digest_does_not_depend_on_the_processes(
    trained: Path, tmp_path: Path, processes: int
) -> None:
    run_dir = tmp_path / "run"
    command(
        "train",
        "configs/demo.yaml",
        *TINY,
        f"run.dir={run_dir}",
        f"pipeline.processes={processes}",
        "pipeline.depth=1",
    )
    assert summary(run_dir)["weights_sha256"] == summary(trained)["weights_sha256"]
    assert (
        summary(run_dir)["test_accuracy_per_stage"] == summary(trained)["test_accuracy_per_stage"]
    )


def test_torchrun_gives_the_same_digest(trained: Path, tmp_path: Path) -> None:
    words = [
        "--standalone",
        "--nproc-per-node",
        4,
        "-m",
        "localpipe",
        "train",
        "configs/demo.yaml",
        *TINY,
    ]
    shown = command(*words, f"run.dir={tmp_path / 'run'}", module=("-m", "torch.distributed.run"))
    result = summary(tmp_path / "run")
    assert result["weights_sha256"] == summary(trained)["weights_sha256"]
    assert result["processes"] == 4
    assert result["weights_sha256"] in shown


def test_a_finished_run_prints_its_summary_and_changes_nothing(trained: Path) -> None:
    before = (trained / "summary.json").read_bytes()
    shown = command("train", "configs/demo.yaml", *TINY, f"run.dir={trained}")
    assert summary(trained)["weights_sha256"] in shown
    assert (trained / "summary.json").read_bytes() == before


def test_a_run_begins_with_another_runs_weights_at_another_number_of_stages(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "next"
    words = [
        *TINY,
        "pipeline.stages=2",
        "pipeline.processes=1",
        "optim.lr=0",
        f"run.init_from={trained}",
    ]
    assert main(["train", "demo", *words, f"run.dir={run_dir}"]) == 0
    shown = capsys.readouterr().out
    assert "88 of 88 tensors taken" in shown and "not used: aux.1.head" in shown
    for source in (trained, run_dir):
        assert main(["export", str(source), "-o", str(source / "net.pt")]) == 0
    before, after = (torch.load(path / "net.pt", weights_only=True) for path in (trained, run_dir))
    same = [
        torch.equal(before[name], after[name])
        for name in before
        if "running" not in name and "batches" not in name
    ]
    assert same and all(same)


def test_eval_finds_what_the_run_found(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(trained), "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [stage["accuracy"] for stage in stages] == summary(trained)["test_accuracy_per_stage"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_export_is_the_plain_network(trained: Path, tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"net{suffix}"
    assert main(["export", str(trained), "-o", str(target)]) == 0
    weights = torch.load(target, weights_only=True) if suffix == ".pt" else load_file(target)
    assert "layer1.0.conv1.weight" in weights and "fc.weight" in weights
    assert not [name for name in weights if name.startswith("aux")]


def test_export_of_an_exit_has_the_blocks_up_to_it_and_its_head(
    trained: Path, tmp_path: Path
) -> None:
    assert main(["export", str(trained), "--exit", "1", "-o", str(tmp_path / "exit.pt")]) == 0
    weights = torch.load(tmp_path / "exit.pt", weights_only=True)
    assert any(name.startswith("exit.") for name in weights) and "layer1.0.conv1.weight" in weights
    assert not [name for name in weights if name.startswith(("layer2", "layer3", "fc", "aux"))]


def test_plan_of_the_published_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = tmp_path / "tiny.npz"
    images, labels = np.zeros((10, 32, 32, 3), np.uint8), np.arange(10)
    np.savez(archive, x_train=images, y_train=labels, x_test=images, y_test=labels)
    assert (
        main(
            [
                "plan",
                str(ROOT / "configs/cifar10_resnet32_dgl_k4.yaml"),
                "--json",
                f"data.root={archive}",
            ]
        )
        == 0
    )
    plan = json.loads(capsys.readouterr().out)
    assert plan["totals"]["params"] == 466_906
    assert plan["totals"]["macs"] == pytest.approx(69.12e6, rel=1e-3)
    assert [len(stage["blocks"]) for stage in plan["stages"]] == [4, 4, 4, 4]
    assert plan["predicted"] is None
    assert plan["stages"][0]["sends"][0] == {
        "name": "h.0",
        "shape": [16, 32, 32],
        "dtype": "float32",
    }


MISTAKES = {
    "no command": ([], "command line"),
    "no configuration": (["train"], "required: config; see"),
    "empty command": ([""], "'' is no command"),
    "path that is too long": (["eval", "x" * 5000], "File name too long; give another path"),
    "unknown command": (["trian", "x.yaml"], "did you mean train?"),
    "unknown configuration": (["train", "dmeo"], "did you mean demo?"),
    "unknown section": (
        ["train", "configs/demo.yaml", "stages=3"],
        "did you mean pipeline.stages?",
    ),
    "unknown choice": (
        ["train", "configs/demo.yaml", "optim.schedule=cosin"],
        "did you mean cosine_step?",
    ),
    "missing file": (["train", "nowhere.yaml"], "nowhere.yaml"),
    "unknown key": (
        ["train", "configs/demo.yaml", "pipeline.stage=3"],
        "did you mean pipeline.stages?",
    ),
    "unknown flag": (["plan", "configs/demo.yaml", "--jsn"], "--jsn; did you mean --json?"),
    "no override": (["train", "configs/demo.yaml", "pipeline.stages"], "section.key=value"),
    "depth 0": (["train", "configs/demo.yaml", "pipeline.depth=0"], "pipeline.depth"),
    "too many processes": (["train", "configs/demo.yaml", "pipeline.processes=5"], "at most 4"),
    "too many stages": (["train", "configs/demo.yaml", "pipeline.stages=40"], "at most 7"),
    "no such network": (
        ["train", "configs/demo.yaml", "model.name=resnet_32"],
        "did you mean resnet32?",
    ),
    "no such module": (
        ["train", "configs/demo.yaml", "model.name=nowhere.at_all:net"],
        "nowhere.at_all",
    ),
    "too few classes": (["train", "configs/demo.yaml", "model.num_classes=4"], "4"),
    "no CUDA": (["train", "configs/demo.yaml", "run.device=cuda"], "run.device"),
    "no data": (
        ["train", "configs/demo.yaml", "data.name=npz", "data.root=nowhere.npz"],
        "nowhere.npz",
    ),
    "no run": (["eval", "nowhere"], "nowhere"),
    "no such system": (["bench", "configs/demo.yaml", "--systems", "gpip"], "did you mean gpipe?"),
    "no such picture": (["bench", "configs/demo.yaml", "--picture", "a.gif"], ".png, .svg, .pdf"),
    "no folder for the figures": (
        ["bench", "configs/demo.yaml", "--json", "no/such/b.json"],
        "there is no folder no/such",
    ),
    "no folder for the picture": (
        ["bench", "configs/demo.yaml", "--picture", "no/b.png"],
        "there is no folder no",
    ),
    "no number": (["bench", "configs/demo.yaml", "--micro-batches", "4,x"], "write 4 or 2,4,8"),
    "indivisible batch": (
        ["bench", "configs/demo.yaml", "--micro-batches", "5"],
        "does not divide data.batch_size",
    ),
    "too many micro-batches": (
        ["bench", "configs/demo.yaml", "--micro-batches", "512"],
        "more than the",
    ),
    "no micro-batch": (["bench", "configs/demo.yaml", "--micro-batches", "0"], "at least 1"),
    "a pipeline of one": (
        ["bench", "configs/demo.yaml", "pipeline.processes=1", "--systems", "zb"],
        "two processes",
    ),
    "run dir is a file": (["train", "configs/demo.yaml", "run.dir=setup.py"], "setup.py"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(
    mistake: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words, message = MISTAKES[mistake]
    before = set(os.listdir(ROOT))
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("localpipe: ") and message in captured.err
    assert set(os.listdir(ROOT)) <= before | {"runs"}


def test_export_to_an_unknown_kind_of_file_is_refused(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(trained), "-o", "net.onnx"]) == 2
    assert ".safetensors" in capsys.readouterr().err
    assert main(["export", str(trained), "-o", "net.pt", "--exit", "4"]) == 2
    assert "0 to 3" in capsys.readouterr().err


def test_code_of_a_run_directory_is_not_imported_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolved = settings(tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(resolved))
    assert main(["eval", str(tmp_path)]) == 2
    assert "--trust" in capsys.readouterr().err
    assert main(["eval", str(tmp_path), "--trust"]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err


def test_bench_prints_the_pipeline_beside_its_bound_and_a_peer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "data.name=synthetic",
        "data.image_size=8",
        "data.batch_size=16",
        "model.name=resnet8",
        "run.threads=1",
    ]
    words += ["pipeline.cuts=equal", "data.augment=none", "data.root=data"]
    words += ["--json", f"{tmp_path}/b.json", "--picture", f"{tmp_path}/b.svg"]
    words += ["--window-s=0.1"]
    words += ["--systems=1f1b,localpipe", "--micro-batches=2"]
    assert main(["bench", "bench/cifar10_resnet32_k2", *words]) == 0
    shown = capsys.readouterr().out
    assert "localpipe" in shown and "--micro-batches 2 --systems localpipe|1f1b" in shown
    ours, messages, peer = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert messages["system"] == "localpipe" and messages["micro_batches"] == 2
    assert messages["note"] is None and messages["samples_per_s"] > 0
    assert (
        ours["system"] == "localpipe"
        and ours["processes"] == 2
        and len(ours["samples_per_s_runs"]) >= 7
    )
    assert ours["samples_per_s"] > 0 and ours["bound_samples_per_s"] > 0 and ours["cut"] == [1]
    assert (
        peer["system"] == "1f1b"
        and peer["micro_batches"] == 2
        and peer["note"] is None
        and len(peer["cut"]) == 1
    )
    assert len(ours["ratio_to_best_peer_runs"]) >= 7 and peer["ratio_to_best_peer"] == 1
    assert peer["wire_bytes_per_step"] > 0 and all(0 < share < 1.01 for share in peer["busy"])
    assert ours["predicted_samples_per_s"] > 0 and "plan --measure predicts" in shown
    assert (
        len(ours["predicted_samples_per_s_runs"]) == 3
        and peer["predicted_samples_per_s_runs"] == []
    )
    drawn = (tmp_path / "b.svg").read_text()
    assert all(f'id="bar-{stage}-' in drawn for stage in (0, 1))
    keys = {
        "system",
        "processes",
        "micro_batches",
        "cut",
        "samples_per_s",
        "samples_per_s_runs",
        "peak_memory_bytes",
    }
    assert keys | {"bound_samples_per_s", "efficiency"} <= ours.keys() & peer.keys()


def test_the_list_of_configurations_is_folded_for_a_terminal_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["configs"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(shipped.list_names())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["configs"]) == 0
    folded = capsys.readouterr().out
    assert max(map(len, folded.splitlines())) <= 80
    assert " ".join(folded.split()) == " ".join(
        f"{name} {shipped.describe(name)}" for name in shipped.list_names()
    )

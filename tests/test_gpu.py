"""Tests that need a CUDA device: NCCL edges, constant memory, InfoPro's published peaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from localpipe.errors import RunError
from localpipe.fields import Schema
from localpipe.pipeline.channels.channel import Endpoint
from localpipe.pipeline.channels.nccl import NcclReceiver, NcclSender
from localpipe.pipeline.workers.mesh import open_file_store
from tests.emulated_gpu import DEVICE_NAME
from tests.pipeline.channels.test_channel import FACTS, RECEIVER, SCHEMA, SENDER, Thread

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

EMULATED = torch.cuda.is_available() and torch.cuda.get_device_name() == DEVICE_NAME
SMALL = [
    "data.name=synthetic", "pipeline.stages=4", "run.device=cuda", "run.deterministic=true",
    "run.threads=1",
]  # fmt: skip
if EMULATED:
    SMALL += [
        "model.name=tests.sample_networks:small", "data.samples=72", "data.image_size=8",
        "data.batch_size=16", "optim.epochs=1",
    ]  # fmt: skip
else:
    SMALL += [
        "model.name=resnet20", "data.samples=512", "data.image_size=32", "data.batch_size=64",
        "optim.epochs=2",
    ]  # fmt: skip
MANY_STEPS = 60 if EMULATED else 1000
MANY_EPOCHS = 2 if EMULATED else 20


def shared_gpu(ranks: int) -> dict[str, str]:
    """Return the environment in which several ranks may use one GPU; skip where NCCL cannot."""
    if torch.cuda.device_count() >= ranks:
        return {}
    from localpipe.pipeline.channels.nccl_library import find_loaded_nccl

    if tuple(map(int, find_loaded_nccl()[0].split(".")[:2])) < (2, 30):
        pytest.skip(f"{ranks} ranks on {torch.cuda.device_count()} GPU need NCCL 2.30")
    return {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_CTAS": "2"}


def train(folder: Path, *words: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Train by the command line; return the summary."""
    config = folder / "config.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    config.write_text("{}\n")
    command = [
        sys.executable,
        "-m",
        "localpipe",
        "train",
        str(config),
        *SMALL,
        f"run.dir={folder / 'run'}",
        *words,
    ]
    done = subprocess.run(
        command, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    summary: dict[str, Any] = json.loads((folder / "run" / "summary.json").read_text())
    return summary


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("depth", [1, 3])
def test_nccl_pipelines_have_the_digest_of_one_process(
    tmp_path: Path, ranks: int, depth: int
) -> None:
    env = shared_gpu(ranks)
    words = ["method={objective: {name: dgl}, context: R1E, reconcile: cosine}"]
    alone = train(tmp_path / "1", *words, "pipeline.processes=1")
    many = train(
        tmp_path / "n", *words, f"pipeline.processes={ranks}", f"pipeline.depth={depth}", env=env
    )
    assert many["weights_sha256"] == alone["weights_sha256"]


def test_gloo_between_gpu_workers_has_the_digest_of_one_process(tmp_path: Path) -> None:
    alone = train(tmp_path / "1", "pipeline.processes=1")
    many = train(tmp_path / "2", "pipeline.processes=2", "pipeline.backend=gloo")
    assert many["weights_sha256"] == alone["weights_sha256"]


def test_replicas_over_nccl_give_one_digest(tmp_path: Path) -> None:
    env = shared_gpu(4)
    words = ["pipeline.replicas=2", "pipeline.batch_norm=sync"]
    two = train(tmp_path / "2", *words, "pipeline.processes=2", env=env)
    four = train(tmp_path / "4", *words, "pipeline.processes=4", env=env)
    assert two["weights_sha256"] == four["weights_sha256"]


def test_uneven_replicas_start_and_give_one_digest_at_any_depth(tmp_path: Path) -> None:
    """Their normalisation needs both replicas in the first forward pass.

    At that moment their successor still opens its edges.
    """
    env = shared_gpu(4)
    words = [
        "pipeline.stages=3",
        "pipeline.replicas=[1,2,1]",
        "pipeline.batch_norm=sync",
        "pipeline.processes=4",
    ]
    one, three = (
        train(tmp_path / str(depth), *words, f"pipeline.depth={depth}", env=env) for depth in (1, 3)
    )
    assert one["weights_sha256"] == three["weights_sha256"]


def test_captured_pipelines_have_the_digest_of_one_process(
    tmp_path: Path, record_property: Any
) -> None:
    """Their speed and that of eager ones are recorded, not asserted (pytest --junit-xml)."""
    env = shared_gpu(2)
    words = [f"optim.epochs={MANY_EPOCHS}", f"run.evaluate_every={MANY_EPOCHS}"]
    alone = train(tmp_path / "1", *words, "pipeline.processes=1", "run.capture=graphs")
    many = train(tmp_path / "2", *words, "pipeline.processes=2", "run.capture=graphs", env=env)
    assert many["weights_sha256"] == alone["weights_sha256"]
    eager = train(tmp_path / "eager", *words, "pipeline.processes=1")
    record_property(
        "captured_over_eager", alone["train_samples_per_s"] / eager["train_samples_per_s"]
    )


@pytest.mark.parametrize("whose", ["sender", "receiver"])
def test_an_edge_whose_ends_differ_raises_on_both_sides(tmp_path: Path, whose: str) -> None:
    device, other = torch.device("cuda", 0), Schema(SCHEMA.fields, 2 * SCHEMA.batch)
    sends, receives = (other, SCHEMA) if whose == "sender" else (SCHEMA, other)
    sender = Thread(
        lambda: NcclSender(
            Endpoint(open_file_store(tmp_path), sends, 2, RECEIVER, device, True, FACTS)
        )
    )
    receiver = Thread(
        lambda: NcclReceiver(
            Endpoint(open_file_store(tmp_path), receives, 2, SENDER, device, True, FACTS)
        )
    )
    for end, peer in ((sender.ended(), RECEIVER), (receiver.ended(), SENDER)):
        assert type(end.error) is RunError and str(end.error).startswith(
            f"handshake with {peer}: batch is "
        )


def test_the_benchmark_runs_every_system_on_the_device(tmp_path: Path) -> None:
    """A peak is the device's, and the same whether other systems are measured or not."""
    config, target = tmp_path / "config.yaml", tmp_path / "bench.json"
    config.write_text("{}\n")
    peaks = []
    for systems in ("[e2e]", "[sequential,e2e]"):
        command = [sys.executable, "-m", "localpipe", "bench", str(config), *SMALL]
        command += ["pipeline.processes=1", "bench.windows=1", "bench.window_s=0.1"]
        command += [f"bench.systems={systems}", "--json", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        result = json.loads(target.read_text())
        assert result["machine"]["device"] == torch.cuda.get_device_name(0)
        rows = {row["system"]: row for row in result["rows"]}
        assert all(row["samples_per_s"] for row in rows.values())
        peaks.append(rows["e2e"]["peak_memory_bytes"])
    assert peaks[0] == peaks[1]


def test_memory_is_flat_over_many_steps(tmp_path: Path) -> None:
    env = shared_gpu(2)
    peaks = []
    for steps in (20, MANY_STEPS):
        words = [
            "pipeline.processes=2",
            "optim.epochs=200",
            f"optim.max_steps={steps}",
            "run.evaluate_every=1000",
        ]
        peaks.append(max(train(tmp_path / str(steps), *words, env=env)["peak_memory_bytes"]))
    assert peaks[1] <= 1.02 * peaks[0]


def test_mixed_precision_trains_on_the_device(tmp_path: Path) -> None:
    for precision in ("bf16", "fp16", "tf32"):
        summary = train(tmp_path / precision, "pipeline.processes=1", f"run.precision={precision}")
        assert all(loss is not None for loss in summary["loss_per_stage"])


@pytest.mark.skipif(EMULATED, reason="it takes a device to compute batches of this size")
@pytest.mark.parametrize(("stages", "published"), [(2, 0.428), (3, 0.551), (4, 0.626)])
def test_infopro_saves_the_memory_that_its_paper_says(
    tmp_path: Path, stages: int, published: float
) -> None:
    """ResNet-110 with balanced cuts. The paper's batch is 1024; this one is smaller."""
    cuts = {2: "15", 3: "10,21", 4: "7,15,27"}[stages]
    words = [
        "model.name=resnet110",
        "data.batch_size=512",
        "optim.epochs=2",
        "pipeline.processes=1",
    ]
    whole = train(tmp_path / "e2e", *words, "pipeline.stages=1")
    contrast = "method={objective: {name: infopro, task: contrast}}"
    cut = train(tmp_path / "cut", *words, contrast, "pipeline.stages=null", f"pipeline.cuts={cuts}")
    saving = 1 - cut["peak_memory_bytes"][0] / whole["peak_memory_bytes"][0]
    assert saving == pytest.approx(published, abs=0.08)

"""A system of the benchmark needs one class and one line, and gets a row of the table."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from localpipe.bench.measure import measure_group
from localpipe.bench.request import choose_cut, group_requests
from localpipe.bench.rows import build_rows
from localpipe.bench.systems.spec import System, SystemRequest, SystemSpec
from localpipe.bench.systems.step_timer import StepTimer
from localpipe.bench.turns import CommandReceiver
from localpipe.bench.worker import REQUEST_KEY, serve
from localpipe.config import registry
from localpipe.config.resolved import Resolved
from localpipe.pipeline.launch.job import Job
from localpipe.pipeline.workers.mesh import Mesh
from tests.harness import settings


class Exponential(System):
    """A system that trains no network: autograd stores one float a sample."""

    def __init__(self, mesh: Mesh, config: Resolved, request: SystemRequest) -> None:
        self.timer = StepTimer()
        self.weight = torch.ones(config.data.batch_size, requires_grad=True)

    def step(self) -> None:
        torch.autograd.backward(self.weight.exp().sum())

    def weights(self) -> dict[str, Tensor]:
        return {"weight": self.weight}


EXPONENTIAL = SystemSpec(build=Exponential, one_process=True)


class WorkersHere:
    """The worker of a system as a thread of this process, which has the new line."""

    stop_signal = 0

    def __init__(self, config: Resolved, job: Job, module: str, **_: object) -> None:
        self.config = config
        self.folder = Path(tempfile.mkdtemp())
        self.store = dist.HashStore()

    def __enter__(self) -> WorkersHere:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.folder)

    def _serve(self) -> None:
        request = SystemRequest.from_json(json.loads(self.store.get(REQUEST_KEY)))
        mesh = Mesh(0, 1, self.store, local=True)
        serve(mesh, self.config, request, CommandReceiver(self.folder, 0))

    def cause(self) -> str | None:
        return None


def test_a_new_system_is_measured_and_has_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    systems = {**registry.SYSTEMS, "exponential": "tests.bench.test_systems:EXPONENTIAL"}
    monkeypatch.setattr(registry, "SYSTEMS", systems)
    monkeypatch.setattr("localpipe.bench.processes.Workers", WorkersHere)
    bench = {"systems": ["exponential"], "windows": 2, "window_s": 0.01}
    config = settings(tmp_path, bench=bench)
    (group,) = group_requests(config)
    requests = [choose_cut(request, config, {}) for request in group]
    (row,) = build_rows(measure_group(config, requests, False, None), "localpipe bench")
    assert row["system"] == row["best_peer"] == "exponential" and row["note"] is None
    assert len(row["samples_per_s_runs"]) == 2 and row["samples_per_s"] > 0
    assert row["saved_activation_bytes_per_sample"] == [4]
    assert row["cut"] is None and row["wire_bytes_per_step"] == 0

"""Benchmark systems and the keys of an update: who clips and averages, and who refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from localpipe.bench.request import list_systems, system_config
from localpipe.bench.systems.plain import EndToEnd
from localpipe.bench.systems.spec import SystemRequest
from localpipe.config.load import update
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.pipeline.workers.mesh import Mesh
from localpipe.plan.memory import parameter_memory
from localpipe.plan.profile import profile_facts
from tests.harness import settings, train_here

CLIPPED: dict[str, Any] = {"clip": 0.1, "ema": 0.9, "decay": "matrices", "weight_decay": 0.5}


def configured(folder: Path, **optim: Any) -> Resolved:
    return settings(folder, pipeline={"stages": 2, "processes": 2}, optim=optim)


def test_end_to_end_makes_the_updates_of_one_stage(tmp_path: Path) -> None:
    steps = 3
    keys = {"optim": {**CLIPPED, "max_steps": steps}, "data": {"drop_last": True}}
    model = {"name": "tests.sample_networks:plain"}
    config = settings(tmp_path, model=model, pipeline={"stages": 1}, **keys)
    (stage,) = train_here(config)
    mesh = Mesh(0, 1, dist.HashStore(), local=True)
    system = EndToEnd(mesh, config, SystemRequest("e2e"))
    for _ in range(steps):
        system.step()
    system.close()
    expected = stage.weights()
    for name, tensor in system.weights().items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name
    assert system.update.average is not None


def test_pipelines_of_micro_batches_know_no_norm_of_the_whole_network(tmp_path: Path) -> None:
    config = configured(tmp_path, clip=0.1)
    names = list_systems(config)
    assert {"localpipe", "e2e", "ddp"} <= set(names) and not {"gpipe", "1f1b"} & set(names)
    listed = update(config, {"bench.systems": ["localpipe", "gpipe"]})
    with pytest.raises(UserError, match="^bench: gpipe cannot clip .* optim.clip is 0.1; leave it"):
        list_systems(listed)
    averaging = update(listed, {"optim.clip": None, "optim.ema": 0.9})
    assert list_systems(averaging) == ["localpipe", "gpipe"]
    assert system_config(SystemRequest("gpipe", 2), averaging).optim.ema == 0.9


def test_an_average_counts_as_one_more_state_of_every_trained_parameter(tmp_path: Path) -> None:
    plain, averaging = configured(tmp_path), configured(tmp_path, ema=0.9)
    before, now = (parameter_memory(100, config, frozen=40) for config in (plain, averaging))
    assert now.optimizer_bytes - before.optimizer_bytes == 4 * 60
    assert now.total_bytes - before.total_bytes == 4 * 60


def test_a_profile_tells_updates_apart(tmp_path: Path) -> None:
    facts = profile_facts(configured(tmp_path, clip=0.1))
    assert (facts["clips"], facts["averages"]) == (True, False)

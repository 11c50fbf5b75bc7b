"""How many messages an edge keeps for recovery, and the shared memory that it takes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from localpipe.pipeline.channels.persistent_ring import ring_bytes
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.workers.feedback import back_schemas
from localpipe.pipeline.workers.persistent_edges import create_edges
from localpipe.plan.costs import count_costs
from localpipe.plan.memory import fit_replay, recovery_memory
from localpipe.plan.tables import describe_recovery
from localpipe.plan.whole_plan import WholePlan
from tests.harness import settings

MIB = 2**20
RECOVERS = {"recover": "stage"}


@pytest.mark.parametrize(
    ("message_bytes", "expected"), [(MIB // 2, 64), (10 * MIB, 25), (100 * MIB, 8)]
)
def test_an_edge_keeps_what_fits_256_mib(tmp_path: Path, message_bytes: int, expected: int) -> None:
    """The fewest are 2 x (depth + 2), whatever their size."""
    config = settings(tmp_path, run=RECOVERS)
    assert fit_replay(config, message_bytes) == expected


def test_the_automatic_number_is_decided_by_the_largest_message(tmp_path: Path) -> None:
    config = settings(tmp_path, run=RECOVERS, pipeline={"stages": 2, "processes": 2})
    assert config.pipeline.replay == 64
    large = {"samples": 20_000, "batch_size": 16_000}
    config = settings(tmp_path, run=RECOVERS, data=large, pipeline={"stages": 2, "processes": 2})
    _, plans = build_plans(config)
    assert plans[0].sends is not None
    assert config.pipeline.replay == 256 * MIB // plans[0].sends.nbytes < 64


def test_plan_counts_rings_and_snapshots(tmp_path: Path) -> None:
    """The rings to the byte. The snapshots within 5 %, once they are not small."""
    wide = {"name": "tests.sample_networks:small", "args": {"width": 96}}
    pipeline = {"stages": 3, "processes": 2}
    optim = {"ema": 0.9, "name": "adamw"}
    config = settings(tmp_path / "run", run=RECOVERS, model=wide, pipeline=pipeline, optim=optim)
    blueprint, plans = build_plans(config)
    costs = count_costs(blueprint, plans, config)
    memory = recovery_memory(plans, costs, config)
    assert memory is not None and config.pipeline.replay == memory.messages
    create_edges(tmp_path, config, plans)
    rings = [path.stat().st_size for path in tmp_path.glob("edge_*/ring")]
    assert sum(rings) == memory.rings_bytes == ring_bytes(plans[2].receives, memory.messages)

    written = 0
    for plan in plans:
        stage = Stage(plan, blueprint, config)
        for parameter in stage.parameters():
            parameter.grad = torch.zeros_like(parameter)
        assert stage.optimizer is not None
        stage.optimizer.step()
        content = io.BytesIO()
        torch.save(stage.state(), content)
        written += content.tell()
    assert written == pytest.approx(memory.snapshots_bytes, rel=0.05)

    whole = WholePlan(config, plans, costs, {}, None)
    assert json.loads(json.dumps(whole.as_json()))["recovery"] == {
        "messages": memory.messages,
        "rings_bytes": memory.rings_bytes,
        "snapshots_bytes": memory.snapshots_bytes,
    }
    (line,) = describe_recovery(plans, costs, config)
    assert "MiB of shared memory for rings of" in line


def test_a_run_that_does_not_recover_plans_nothing_for_it(tmp_path: Path) -> None:
    config = settings(tmp_path)
    blueprint, plans = build_plans(config)
    costs = count_costs(blueprint, plans, config)
    assert recovery_memory(plans, costs, config) is None
    assert describe_recovery(plans, costs, config) == []
    assert "recovery" not in WholePlan(config, plans, costs, {}, None).as_json()


@pytest.mark.parametrize("mode", ["block", "readout"])
def test_plan_counts_the_rings_of_edges_back(tmp_path: Path, mode: str) -> None:
    config = settings(
        tmp_path / "run",
        run=RECOVERS,
        model={"name": "tests.sample_networks:small", "args": {"width": 96}},
        method={"feedback": {"mode": mode, "lag": 6, "every": 2}},
        pipeline={"stages": 3, "processes": 2},
    )
    blueprint, plans = build_plans(config)
    memory = recovery_memory(plans, count_costs(blueprint, plans, config), config)
    schemas = back_schemas(config, blueprint, plans)
    # Stages 0 and 1 are in one process.
    assert list(schemas) == ([(2, 1)] if mode == "block" else [(2, 0), (2, 1)])
    create_edges(tmp_path, config, plans, schemas)
    rings = [path.stat().st_size for path in tmp_path.glob("*/ring")]
    assert memory is not None and len(rings) == 1 + len(schemas)
    assert sum(rings) == pytest.approx(memory.rings_bytes, rel=0.05)

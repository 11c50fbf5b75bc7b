"""Benchmark systems and frozen blocks: who trains the others alone, and who refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from localpipe import data
from localpipe.bench.memory import memory_cases
from localpipe.bench.request import list_systems, system_config
from localpipe.bench.systems.plain import EndToEnd
from localpipe.bench.systems.spec import SystemRequest, find_system
from localpipe.config import registry
from localpipe.config.load import parse, to_dict, update
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.pipeline.stages.stage_plan import build_blueprint
from localpipe.pipeline.workers.mesh import Mesh
from localpipe.plan.whole_plan import make_plan
from tests.harness import settings

FROZEN = ("0", "3")


def configured(folder: Path) -> Resolved:
    model = {"name": "tests.sample_networks:small", "freeze": list(FROZEN)}
    return settings(folder, model=model, pipeline={"stages": 2, "processes": 2})


def test_end_to_end_trains_the_other_blocks_alone(tmp_path: Path) -> None:
    config = system_config(SystemRequest("e2e"), configured(tmp_path))
    mesh = Mesh(0, 1, dist.HashStore(), local=True)
    system = EndToEnd(mesh, config, SystemRequest("e2e"))
    before = {name: tensor.clone() for name, tensor in system.weights().items()}
    system.warm_up()
    system.close()
    now = system.weights()
    kept = {name[0] for name in before if torch.equal(before[name], now[name])}
    assert kept == set(FROZEN)


def test_an_all_reduce_has_the_gradients_of_what_is_trained(tmp_path: Path) -> None:
    config = configured(tmp_path)
    plain = update(config, {"model.freeze": []})
    request = SystemRequest("ddp")
    count = request.spec.count_sent_bytes
    frozen = sum(
        tensor.numel()
        for index in (0, 3)
        for name, tensor in build_blueprint(config).state[index].items()
        if name.endswith(("weight", "bias"))
    )
    assert count(plain, request) - count(config, request) == 2 * 4 * frozen


def test_pipelines_of_micro_batches_and_checkpointing_are_left_out(tmp_path: Path) -> None:
    config = configured(tmp_path)
    names = [name for name in registry.SYSTEMS if find_system(name).trains_frozen]
    names.remove("frozen-copies")  # without method.feedback there are none
    assert list_systems(config) == names == ["localpipe", "sequential", "e2e", "e2e-1", "ddp"]
    for name in ("checkpoint", "gpipe"):
        with pytest.raises(UserError, match=rf"{name} cannot freeze blocks, .*\['0', '3'\]; leave"):
            list_systems(update(config, {"bench.systems": ["localpipe", name]}))


def test_memory_is_counted_without_what_cannot_freeze(tmp_path: Path) -> None:
    config = configured(tmp_path)
    dataset = data.load(config.data, config.run.seed)
    given = parse(to_dict(config), "test")
    cases = list(memory_cases(given, dataset, build_blueprint(config), {}))
    methods = {case.method for case in cases}
    assert methods == {"e2e"} | registry.METHODS.keys() - {"sgr"}


def test_what_is_measured_on_trained_blocks_is_refused(tmp_path: Path) -> None:
    config = configured(tmp_path)
    with pytest.raises(UserError, match="a prediction knows blocks that are trained"):
        make_plan(config, measure=True)
    with pytest.raises(UserError, match="--cluster knows blocks that are trained"):
        make_plan(config, cluster="clusters/internet_8")
    with pytest.raises(UserError, match="set pipeline.cuts=memory, or list the cuts"):
        update(config, {"pipeline.cuts": "time"})
    plan = make_plan(update(config, {"pipeline.cuts": "memory"}))
    assert plan.predictions == {} and plan.config.model.freeze == FROZEN
    totals = plan.as_json()["totals"]
    assert totals["frozen_params"] == sum(cost.frozen_params for cost in plan.costs) > 0
    assert (
        "frozen_params" not in make_plan(update(config, {"model.freeze": []})).as_json()["totals"]
    )

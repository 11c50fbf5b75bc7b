"""Frozen blocks: evaluation mode, a graph only where one is needed, no update, and the counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.methods.auglocal import AugLocal
from localpipe.pipeline.channels.message import Header, Kind, Message
from localpipe.pipeline.stages.batch_norm import SyncBatchNorm, TwiceBatchNorm
from localpipe.pipeline.stages.replicas import Replicas
from localpipe.pipeline.stages.stage import Stage, mark_nothing, send_nothing, train_step
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.workers.trial import try_stages
from localpipe.plan.costs import count_costs, count_saved_bytes
from localpipe.plan.measure_worker import make_message
from localpipe.plan.memory import worker_memory
from tests.harness import differences, run, settings, train_here

PREFIX = ["0", "1", "2"]  # blocks of tests.sample_networks:small, which has five


def configured(folder: Path, freeze: list[str], **sections: Any) -> Resolved:
    model = {"name": "tests.sample_networks:small", "freeze": freeze}
    pipeline = sections.pop("pipeline", {"cuts": [1]})
    sections["pipeline"] = {"stages": len(pipeline["cuts"]) + 1, **pipeline}
    return settings(folder, model=model, **sections)


def built(config: Resolved, replicas: Replicas | None = None) -> list[Stage]:
    blueprint, plans = build_plans(config)
    return [Stage(plan, blueprint, config, replicas=replicas) for plan in plans]


def train(stage: Stage, steps: int = 2) -> None:
    for _ in range(steps):
        train_step(stage, make_message(stage), 0.1, send_nothing, mark_nothing)


def copied(stage: Stage) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in stage.weights().items()}


def moved(stage: Stage, before: dict[str, Tensor]) -> set[str]:
    """Return the first part of the names of what has moved: a block, or `aux`."""
    now = stage.weights()
    return {name.partition(".")[0] for name in before if not torch.equal(before[name], now[name])}


def test_frozen_blocks_do_not_move_and_the_others_do(tmp_path: Path) -> None:
    """Their running statistics do not move either."""
    expected = [{"aux"}, {"3", "4", "5"}]
    for stage, trained in zip(built(configured(tmp_path, PREFIX)), expected, strict=True):
        before = copied(stage)
        train(stage)
        assert moved(stage, before) == trained
        for position, block in enumerate(stage.blocks):
            is_frozen = position in stage.frozen
            assert block.training != is_frozen
            assert all(p.requires_grad != is_frozen for p in block.parameters())
            assert all((p.grad is None) == is_frozen for p in block.parameters())
        optimised = {id(p) for group in stage.optimizer.param_groups for p in group["params"]}  # type: ignore[union-attr]
        assert optimised == {id(p) for p in stage.parameters()}


def test_an_evaluation_between_two_steps_leaves_the_mode(tmp_path: Path) -> None:
    stage = built(configured(tmp_path, PREFIX))[0]
    before = copied(stage)
    message = make_message(stage)
    stage.forward(Message(Header(Kind.TEST, 1, 1, 16), message.fields))
    assert not any(block.training for block in stage.blocks)
    train(stage)
    assert moved(stage, before) == {"aux"}


def graph_of(stage: Stage) -> bool:
    return stage.forward(make_message(stage)).requires_grad


def test_frozen_blocks_have_a_graph_only_where_one_is_needed(tmp_path: Path) -> None:
    first, second = built(configured(tmp_path, ["0", "1", "2", "3", "4"]))
    assert not graph_of(first) and not graph_of(second)

    # An adapter stands before the frozen blocks, so its gradient goes through them.
    method = {"objective": {"name": "dgl"}, "context": {"mode": "R1E"}}
    _, second = built(configured(tmp_path, ["0", "1", "2", "3", "4"], method=method))
    assert second.adapter is not None and graph_of(second)
    before = copied(second)
    train(second)
    assert moved(second, before) == {"context", "5"}
    assert all(p.grad is not None for p in second.adapter.parameters())


def test_the_features_of_frozen_blocks_are_those_of_evaluation(tmp_path: Path) -> None:
    """Dropout and batch statistics are off, also in a training step."""
    stage = built(configured(tmp_path, PREFIX))[0]
    message = make_message(stage)
    trained = stage.forward(message)
    evaluated = stage.forward(Message(Header(Kind.TEST, 1, 1, 16), message.fields))
    assert torch.equal(trained, evaluated)


@pytest.mark.parametrize("freeze", [PREFIX, ["3"], ["0", "1", "2", "3", "4"]])
def test_recomputation_changes_no_bit(tmp_path: Path, freeze: list[str]) -> None:
    states = []
    for checkpointing in ("none", "block"):
        config = configured(tmp_path, freeze, run={"checkpointing": checkpointing})
        stages = built(config)
        for stage in stages:
            torch.manual_seed(0)
            train(stage)
        states.append([stage.state() for stage in stages])
    assert differences(states[0], states[1]) == []


def test_a_frozen_batch_norm_stays_in_evaluation_mode_when_it_is_replaced(tmp_path: Path) -> None:
    method = {"objective": {"name": "dgl"}, "reconcile": {"distance": "cosine"}}
    config = configured(tmp_path, ["3"], method=method)
    stage = built(config)[1]
    (frozen,) = stage.frozen
    kinds = [type(layer) for layer in stage.blocks.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert kinds == []  # all are replaced
    replaced = [m for m in stage.blocks[frozen].modules() if isinstance(m, TwiceBatchNorm)]
    assert replaced and not any(layer.training for layer in replaced)
    before = copied(stage)
    train(stage)
    assert moved(stage, before) == {"2", "4", "5"}

    # No row of another replica is asked for, so a replica that cannot be reached is no harm.
    sync = {"cuts": [1], "replicas": 2, "batch_norm": "sync", "processes": 4}
    first = built(configured(tmp_path, PREFIX, pipeline=sync), Replicas(0, 2))[0]
    assert any(isinstance(layer, SyncBatchNorm) for layer in first.blocks.modules())
    assert not graph_of(first)


def test_reconciliation_differentiates_twice_through_frozen_blocks(tmp_path: Path) -> None:
    """What is trained gets the gradients that it has beside the same blocks without a freeze."""
    method = {"objective": {"name": "dgl"}, "reconcile": {"distance": "l2", "weight": 0.5}}
    frozen = built(configured(tmp_path, ["3"], method=method))[1]
    plain = built(configured(tmp_path, [], method=method))[1]
    plain.blocks[1].eval()
    message = make_message(frozen)
    for stage in (frozen, plain):
        loss = stage.local_loss(message, stage.forward(message))
        total = stage.add_distance(loss, message)
        assert total != loss
        total.backward()
    compared = zip(frozen.blocks, plain.blocks, strict=True)
    for position, (block, same_block) in enumerate(compared):
        for parameter, same in zip(block.parameters(), same_block.parameters(), strict=True):
            assert same.grad is not None
            if position in frozen.frozen:
                assert parameter.grad is None
            else:
                assert parameter.grad is not None and torch.equal(parameter.grad, same.grad)


@pytest.mark.parametrize("freeze", [["0", "1"], ["2", "3", "4"]])
def test_a_stage_of_frozen_blocks_alone_is_not_reconciled(
    tmp_path: Path, freeze: list[str]
) -> None:
    method = {"objective": {"name": "dgl"}, "reconcile": {"distance": "cosine"}}
    config = configured(tmp_path, freeze, method=method)
    with pytest.raises(UserError, match="all blocks of stage . are frozen, so none follows"):
        try_stages(config, *build_plans(config))
    try_stages(configured(tmp_path, freeze), *build_plans(config))


def test_auglocals_copies_of_frozen_blocks_are_trained(tmp_path: Path) -> None:
    method = {"objective": {"name": "auglocal", "aux_depth": 2}}
    stage = built(configured(tmp_path, ["0", "2", "3", "4"], method=method))[0]
    assert isinstance(stage.objective, AugLocal)
    assert all(p.requires_grad for p in stage.objective.parameters())
    assert all(module.training for module in stage.objective.modules())


# -- counts -------------------------------------------------------------------------------------


def test_plan_counts_what_is_trained(tmp_path: Path) -> None:
    frozen, plain = (configured(tmp_path, freeze) for freeze in (PREFIX, []))
    blueprint, plans = build_plans(frozen)
    costs, all_costs = count_costs(blueprint, plans, frozen), count_costs(blueprint, plans, plain)
    state = blueprint.state
    for cost, whole, blocks in zip(costs, all_costs, (state[:2], state[2:3]), strict=True):
        expected = sum(
            tensor.numel()
            for tensors in blocks
            for name, tensor in tensors.items()
            if name.endswith(("weight", "bias"))
        )
        assert cost.frozen_params == expected and whole.frozen_params == 0
        assert (cost.params, cost.macs, cost.aux_params) == (
            whole.params, whole.macs, whole.aux_params,
        )  # fmt: skip
        assert cost.activation_bytes_per_sample < whole.activation_bytes_per_sample
        # A frozen block has no gradient of its weights and none of its input.
        assert cost.macs < cost.train_macs < whole.train_macs
    memory, whole_memory = worker_memory(plans, costs, frozen), worker_memory(plans, costs, plain)
    trained = sum(p.numel() for stage in built(frozen) for p in stage.parameters())
    assert memory.gradients_bytes == memory.optimizer_bytes == 4 * trained
    assert memory.weights_bytes == whole_memory.weights_bytes


@pytest.mark.parametrize("freeze", [PREFIX, ["3"], ["1", "4"]])
@pytest.mark.parametrize("mode", ["none", "E"])
def test_the_saved_bytes_of_a_cut_are_those_of_its_stages(
    tmp_path: Path, freeze: list[str], mode: str
) -> None:
    """`cuts: memory` adds pieces up, and a piece after frozen blocks holds less."""
    method = {"objective": {"name": "dgl"}, "context": {"mode": mode}}
    for cuts in ([0], [3], [1, 2]):
        config = configured(tmp_path, freeze, method=method, pipeline={"cuts": cuts})
        blueprint, plans = build_plans(config)
        count = count_saved_bytes(blueprint, config, len(plans))
        counted = [int(count(plan.first, plan.last, plan.stage)) for plan in plans]
        costs = count_costs(blueprint, plans, config)
        assert counted == [cost.activation_bytes_per_sample for cost in costs], cuts


# -- whole runs ---------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "bf16": {"run": {"precision": "bf16", "checkpointing": "block"}},
    "fp16": {"run": {"precision": "fp16"}},
    "accumulate": {"optim": {"accumulate": 2, "name": "adamw"}},
    "infopro": {
        "method": {"objective": {"name": "infopro", "task": "contrast"}, "context": {"mode": "R1E"}}
    },
    "auglocal": {"method": {"objective": {"name": "auglocal"}}},
    "sgr": {"method": {"objective": {"name": "dgl"}, "reconcile": {"distance": "cosine"}}},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_all_but_the_frozen_part(tmp_path: Path, name: str) -> None:
    sections = {**RUNS[name], "optim": {"max_steps": 2, "lr": 0.1, **RUNS[name].get("optim", {})}}
    config = configured(tmp_path, ["0", "2"], **sections)
    before = [copied(stage) for stage in built(config)]
    trained: set[str] = set()
    for stage, weights in zip(train_here(config), before, strict=True):
        trained |= moved(stage, weights)
    assert {"1", "3", "4", "5"} == trained - {"aux", "context"}


def test_replicas_sum_the_gradients_of_what_is_trained(tmp_path: Path) -> None:
    """Both replicas end with the same bits, and their frozen part is that of one replica."""
    pipeline = {"cuts": [1], "processes": 4, "replicas": 2, "batch_norm": "sync"}
    states = run(configured(tmp_path / "two", PREFIX, pipeline=pipeline))
    alone = run(configured(tmp_path / "one", PREFIX, pipeline={"cuts": [1], "processes": 1}))
    for stage, state in states.items():
        for name, tensor in state["weights"].items():
            if name.partition(".")[0] in PREFIX:
                assert torch.equal(tensor, alone[stage]["weights"][name]), name
    assert differences(states, run(configured(tmp_path / "again", PREFIX, pipeline=pipeline))) == []

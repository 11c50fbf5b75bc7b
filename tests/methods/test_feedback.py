"""Copies of later parameters: a step by hand, when they move, isolation, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localpipe.config.keys import Feedback
from localpipe.config.resolve import auto_lag
from localpipe.config.resolved import Resolved, ResolvedFeedback
from localpipe.errors import UserError
from localpipe.methods.feedback import BlockFeedback, FeedbackLoss, ReadoutFeedback, find_readout
from localpipe.networks.resnet_cifar import BasicBlock
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.plan.costs import count_costs
from localpipe.plan.memory import list_back, snapshot_memory, worker_memory
from localpipe.plan.notes import plan_notes
from localpipe.plan.tables import describe_back, plan_json
from tests.hand_made import registered
from tests.harness import settings, train_here
from tests.pipeline.stages.test_stage import batch, stages_of

BLOCK = {"mode": "block", "every": 1, "lag": 1}
READOUT = {"mode": "readout", "every": 1, "lag": 1}


def fed_back(
    folder: Path, feedback: dict[str, Any], objective: str = "dgl", **sections: Any
) -> Resolved:
    method = {"objective": {"name": objective}, "feedback": feedback}
    return settings(folder, method=method, **{"model": {"name": "resnet8"}, **sections})


def normalise(x: Tensor, layer: nn.Module) -> Tensor:
    """Return what batch normalisation gives in training, from its formula."""
    assert isinstance(layer, nn.BatchNorm2d)
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = (x - mean).square().mean((0, 2, 3), keepdim=True)
    weight, bias = layer.weight[:, None, None], layer.bias[:, None, None]
    return (x - mean) / (variance + layer.eps).sqrt() * weight + bias


def run_block(x: Tensor, block: nn.Module) -> Tensor:
    """Return the output of a basic block that keeps the shape, from its formula."""
    assert isinstance(block, BasicBlock)
    hidden = normalise(F.conv2d(x, block.conv1.weight, padding=1), block.bn1).relu()
    return (x + normalise(F.conv2d(hidden, block.conv2.weight, padding=1), block.bn2)).relu()


@pytest.mark.parametrize("combine", ["sum", "scaled"])
def test_a_step_of_a_stage_is_that_of_the_formulas(tmp_path: Path, combine: str) -> None:
    """In float64: both copies, their sum, loss and gradients, and the move of the average."""
    feedback = {**BLOCK, "combine": combine, "momentum": 0.9, "every": 2, "lag": 2}
    config = fed_back(tmp_path, feedback, "greedy", pipeline={"stages": 4, "cuts": [0, 1, 2]})
    stage, later = stages_of(config)[:2]
    objective = stage.objective.double()
    assert isinstance(objective, BlockFeedback)
    torch.manual_seed(1)
    h = torch.randn(6, 16, 8, 8, dtype=torch.float64, requires_grad=True)
    target = torch.arange(6)

    # The stage's own computation. Its loss is fp32, so the cross-entropy is taken here.
    exit_logits = objective.exit(h)
    assert exit_logits is not None
    loss = F.cross_entropy(exit_logits, target)
    assert (loss - objective(h, {"target": target})).abs() < 1e-6
    trained = [p for p in objective.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [h, *trained])

    # The same by hand, with the parameters as leaves of their own.
    learned, average = run_block(h, objective.next), run_block(h, objective.average)
    y = learned + average
    if objective.scale is not None:
        y = objective.scale * learned + (2 - objective.scale) * average
    logits = objective.loss.head.linears(y.mean((2, 3)))  # type: ignore[union-attr, operator]
    log_probabilities = logits - logits.exp().sum(1, keepdim=True).log()
    expected = -log_probabilities[torch.arange(6), target].mean()
    by_hand = torch.autograd.grad(expected, [h, *trained])
    assert (loss - expected).abs() < 1e-12
    for one, other in zip(gradients, by_hand, strict=True):
        assert (one - other).abs().max() < 1e-12
    assert gradients[0].abs().max() > 0
    assert (combine == "scaled") == (objective.scale is not None)

    # The move: momentum ** every of the average stays.
    newest = {name: p.double() + 1 for name, p in later.shared_parameters().items()}
    before = {name: p.detach().clone() for name, p in objective.average.named_parameters()}
    stage.refresh(newest)
    for name, parameter in objective.average.named_parameters():
        moved = 0.9**2 * before[name] + (1 - 0.9**2) * newest[name]
        assert (parameter - moved).abs().max() < 1e-12


def test_gradients_go_through_the_average_and_reach_neither_it_nor_the_next_stage(
    tmp_path: Path,
) -> None:
    stages = stages_of(fed_back(tmp_path, BLOCK))
    message = batch(fed_back(tmp_path, BLOCK))
    stage, later = stages[:2]
    assert isinstance(stage.objective, BlockFeedback)
    # The average becomes the block, and shares no memory with it.
    stage.objective.momentum = 0.0
    stage.refresh(later.shared_parameters())
    for name, parameter in stage.objective.average.named_parameters():
        original = later.shared_parameters()[name]
        assert torch.equal(parameter, original)
        assert parameter.data_ptr() != original.data_ptr()

    # Without the trained copy the activation still gets a gradient.
    for parameter in stage.objective.next.parameters():
        nn.init.zeros_(parameter)
    h = stage.forward(message)
    loss = stage.local_loss(message, h)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stage.blocks.parameters())
    assert all(p.grad is None for p in stage.objective.average.parameters())
    for neighbour in stages[1:]:
        assert all(p.grad is None for p in neighbour.parameters())


def test_copies_have_buffers_of_their_own_and_batch_statistics_in_training(tmp_path: Path) -> None:
    config = fed_back(tmp_path, BLOCK)
    stage = stages_of(config)[0]
    assert isinstance(stage.objective, BlockFeedback)
    message = batch(config)
    stage.local_loss(message, stage.forward(message))
    weights = stage.weights()
    learned = weights["aux.0.next.bn1.running_var"]
    average = weights["aux.0.average.bn1.running_var"]
    assert stage.objective.average.training
    assert not torch.equal(learned, torch.ones_like(learned))
    assert not torch.equal(average, learned)  # their weights differ, and so do their statistics


def test_the_first_layer_of_a_copy_may_write_in_place(tmp_path: Path) -> None:
    """The blocks of `small` begin with a ReLU in place, and both copies read the activation."""
    model = {"name": "tests.sample_networks:plain"}
    config = fed_back(tmp_path, BLOCK, model=model, pipeline={"stages": 3})
    plain = stages_of(fed_back(tmp_path, BLOCK, model={"name": "tests.sample_networks:small"}))[0]
    assert isinstance(plain.objective, BlockFeedback)
    h = torch.randn(4, 8, 8, 8)
    before = h.clone()
    torch.manual_seed(0)
    y = plain.objective.eval().front(h.clone())
    relu = [plain.objective.next[1:], plain.objective.average[1:]]  # type: ignore[index]
    expected = relu[0](before.relu()) + relu[1](before.relu())
    assert torch.equal(y, expected)
    assert plain.objective._writes
    other = stages_of(config)[0].objective
    assert isinstance(other, BlockFeedback) and not other._writes


def test_the_readout_is_refreshed_and_its_adapter_trained(tmp_path: Path) -> None:
    stages = stages_of(fed_back(tmp_path, READOUT))
    first, last = stages[0], stages[-1]
    assert isinstance(first.objective, ReadoutFeedback)
    trained = {name for name, p in first.objective.named_parameters() if p.requires_grad}
    assert any(name.endswith("norm.weight") for name in trained)
    assert any(name.endswith("temperature") for name in trained)
    assert not any("readout" in name for name in trained)
    first.refresh(last.shared_parameters())
    readout = find_readout(last.objective)
    assert readout is not None
    assert torch.equal(first.weights()["aux.0.readout.weight"], readout[1].weight)
    # The exit ends in it: with a readout of zeros and a bias, all logits are that bias.
    nn.init.zeros_(first.objective.readout.weight)
    nn.init.ones_(first.objective.readout.bias)
    logits = first.objective.eval().exit(torch.randn(3, 16, 8, 8))
    assert logits is not None and torch.equal(logits, torch.ones(3, 10))


def test_names_are_those_of_the_loss_and_of_the_copies(tmp_path: Path) -> None:
    without = stages_of(fed_back(tmp_path, {"mode": "none"}))[0].weights()
    with_block = stages_of(fed_back(tmp_path, {**BLOCK, "combine": "scaled"}))[0].weights()
    new = with_block.keys() - without.keys()
    assert without.keys() <= with_block.keys()
    assert {name.split(".")[2] for name in new} == {"next", "average", "scale"}
    assert "aux.0.average.conv1.weight" in new


# When parameters are due


def test_what_is_due_is_a_lag_late_and_rounded_down_to_what_was_sent() -> None:
    feedback = ResolvedFeedback(mode="block", lag=7, every=3)
    newest = 0
    for step in range(1, 40):
        due = feedback.due(step)
        if due is not None:
            newest = due
        # By the rule: what stage k + 1 had after step t - lag, rounded down to a multiple.
        assert newest == max(0, (step - 7) // 3 * 3)
        assert (step % 3 == 0) == feedback.is_sent(step)


@pytest.mark.parametrize(
    ("mode", "every", "stages", "lag"),
    [
        ("block", 16, 8, 16),
        ("block", 1, 8, 8),
        ("block", 3, 2, 9),
        ("readout", 16, 8, 64),
        ("readout", 1, 3, 15),
        ("none", 16, 1, 16),
        ("readout", 16, 1, 16),
        ("block", 1_000_000, 4, 1_000_000),
    ],
)
def test_lag_auto_is_a_multiple_above_seven_a_stage(
    mode: Any, every: int, stages: int, lag: int
) -> None:
    assert auto_lag(Feedback(mode=mode, every=every), stages) == lag


def test_the_copies_of_a_run_are_what_the_rule_says(tmp_path: Path) -> None:
    """Training in one process against snapshots that a test keeps by itself."""
    feedback = {"mode": "readout", "every": 3, "lag": 4}
    sections = {"data": {"samples": 64, "batch_size": 8}, "model": {"name": "resnet8"}}
    last: dict[int, Tensor] = {}
    for steps in (6, 13):
        optim = {"max_steps": steps, "lr": 0.05, "epochs": 2}
        config = fed_back(tmp_path / str(steps), feedback, "greedy", optim=optim, **sections)
        stages = train_here(config)
        last[steps] = stages[-1].weights()["fc.weight"].clone()
    # Step 13 used what the last stage had after (13 - 4) // 3 * 3 = 9 steps, not after 6.
    optim = {"max_steps": 9, "lr": 0.05, "epochs": 2}
    config = fed_back(tmp_path / "9", feedback, "greedy", optim=optim, **sections)
    after_9 = train_here(config)[-1].weights()["fc.weight"]
    copies = [stage.weights()[f"aux.{i}.readout.weight"] for i, stage in enumerate(stages[:-1])]
    assert all(torch.equal(copy, after_9) for copy in copies)
    assert not torch.equal(after_9, last[6]) and not torch.equal(after_9, last[13])


# Where copies begin


def test_copies_begin_with_loaded_weights(tmp_path: Path) -> None:
    stage, later = stages_of(fed_back(tmp_path, BLOCK))[:2]
    before = stage.weights()["aux.0.next.conv1.weight"].clone()
    assert not torch.equal(before, stage.weights()["aux.0.average.conv1.weight"])
    given = {name: torch.full_like(value, 2) for name, value in later.weights().items()}
    stage.take_weights({name: value for name, value in given.items() if not name.startswith("aux")})
    for name, value in stage.weights().items():
        if name.startswith(("aux.0.next.", "aux.0.average.")):
            assert torch.equal(value, torch.full_like(value, 2)), name
    # Weights under the copies' own names go before.
    own = {"aux.0.average.conv1.weight": torch.full_like(before, 3), **given}
    stage.take_weights(own)
    assert torch.equal(stage.weights()["aux.0.average.conv1.weight"], torch.full_like(before, 3))

    first = stages_of(fed_back(tmp_path, READOUT))[0]
    first.take_weights({"fc.weight": torch.ones(10, 64)})
    assert torch.equal(first.weights()["aux.0.readout.weight"], torch.ones(10, 64))


# What is refused, and what is said


def test_what_has_no_rule_is_refused(tmp_path: Path) -> None:
    for feedback, objective, text in (
        (BLOCK, {"name": "auglocal"}, "feedback.mode block does not go with auglocal"),
        (READOUT, {"name": "predsim"}, "readout needs local losses of a classifier"),
        (READOUT, {"name": "infopro", "task": "contrast"}, "readout needs local losses"),
    ):
        method = {"objective": objective, "feedback": feedback}
        with pytest.raises(UserError, match=text):
            settings(tmp_path, method=method, model={"name": "resnet8"})
        settings(tmp_path, method=method, model={"name": "resnet8"}, pipeline={"stages": 1})
    # A loss without any classifier is seen when it is built.
    nothing = {"name": "infopro", "image_weight": [1, 1], "task_weight": [0, 0]}
    method = {"objective": nothing, "feedback": READOUT}
    with pytest.raises(UserError, match="its local loss has none"):
        stages_of(settings(tmp_path, method=method, model={"name": "resnet8"}))


def test_blocks_of_several_tensors_and_heads_without_a_linear_are_refused(tmp_path: Path) -> None:
    with registered():
        config = fed_back(
            tmp_path, BLOCK, "greedy", model={"name": "hand_skips"}, pipeline={"stages": 3}
        )
        with pytest.raises(UserError, match="takes or gives several tensors"):
            stages_of(config)
    config = fed_back(tmp_path, READOUT, "greedy", model={"name": "tests.sample_networks:places"})
    assert find_readout(nn.Sequential(nn.Conv2d(3, 3, 1))) is None
    assert config.feeds_back


def test_one_stage_and_a_short_lag_are_noted(tmp_path: Path) -> None:
    alone = fed_back(tmp_path, BLOCK, pipeline={"stages": 1})
    assert not alone.feeds_back
    assert plan_notes(alone) == [
        "note: one stage has no neighbour; method.feedback block changes nothing"
    ]
    (note,) = plan_notes(fed_back(tmp_path, BLOCK, pipeline={"stages": 4, "depth": 2}))
    assert "lag 1 a stage may wait" in note and "from a lag of 5 on" in note
    auto = {"mode": "block"}
    assert plan_notes(fed_back(tmp_path, auto, pipeline={"stages": 4, "depth": 4})) == []
    # As long as it says, and the largest depth without a note.
    lag = {"mode": "readout", "every": 1}
    assert plan_notes(fed_back(tmp_path, lag, pipeline={"stages": 4, "depth": 4})) == []
    assert plan_notes(fed_back(tmp_path, lag, pipeline={"stages": 4, "depth": 6})) != []


# Counts


def test_a_plan_counts_copies_bytes_and_snapshots(tmp_path: Path) -> None:
    keys = {"mode": "block", "every": 4, "lag": 6}
    pipeline = {"stages": 4, "cuts": [0, 1, 2]}
    config = fed_back(tmp_path, keys, "greedy", pipeline=pipeline)
    without = fed_back(tmp_path, {"mode": "none"}, "greedy", pipeline=pipeline)
    blueprint, plans = build_plans(config)
    costs = count_costs(blueprint, plans, config)
    plain = count_costs(blueprint, plans, without)

    block = 2 * (16 * 16 * 9) + 4 * 16
    assert costs[0].copied_params == block and costs[1].shared_bytes == 4 * block
    assert costs[0].aux_params - plain[0].aux_params == 2 * block
    assert costs[0].aux_macs - plain[0].aux_macs == 2 * 2 * 16 * 16 * 9 * 8 * 8
    assert costs[3].copied_params == 0 and costs[0].shared_bytes == 0
    back = list_back(plans, costs, config)[0]
    assert (back.later, back.earlier, back.nbytes) == (1, 0, 4 * block)
    assert back.bytes_per_step == block
    lines = describe_back(plans, costs, config)
    assert lines[0].startswith(f"0 <- 1: {block:,} parameters every 4 steps, 6 late")

    # Two snapshots are kept, and three are in the ring of an edge back to another worker.
    assert snapshot_memory(plans[1:2], costs[1:2], config) == (2 + 3) * 4 * block
    assert snapshot_memory(plans[:2], costs[:2], config) == 2 * 4 * block
    trained = worker_memory(plans[:1], costs[:1], config)
    assert trained.weights_bytes - trained.gradients_bytes == 4 * block

    # Nothing of it stands in another plan.
    assert "copied_params" in plan_json(plans, costs)["stages"][0]
    assert not {"copied_params", "shared_bytes"} & plan_json(plans, plain)["stages"][0].keys()
    assert list_back(plans, plain, without) == [] == describe_back(plans, plain, without)


def test_a_stage_on_the_meta_device_has_the_copies(tmp_path: Path) -> None:
    config = fed_back(tmp_path, BLOCK, "infopro")
    blueprint, plans = build_plans(config)
    stage, later = (Stage(plan, blueprint, config, "meta") for plan in plans[:2])
    assert isinstance(stage.objective, FeedbackLoss)
    assert stage.copied_parameters().keys() == later.shared_parameters().keys() != set()

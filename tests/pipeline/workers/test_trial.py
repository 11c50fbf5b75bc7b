"""Every stage runs its step and its evaluation without values, before a worker starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from localpipe import data
from localpipe.config.load import to_dict
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.methods.greedy import Greedy
from localpipe.plan.whole_plan import make_plan
from localpipe.runs.prepare import check_plan, prepare
from tests.harness import resolved, settings, train_here


class Once(torch.autograd.Function):
    """The sign, whose gradient is that of a clipped line. It has no second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        signs: Tensor = x.sign()
        return signs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gradient: Tensor = gradients[0] * (x.abs() < 1)
        return gradient


class Backwardless(torch.autograd.Function):
    """The identity without a backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()


class Calls(nn.Module):
    """A layer that applies a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.function(x)
        return output


def network(function: Any, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    """Return three blocks, a function in the last, and a head."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm(8)),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), norm(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), norm(8), Calls(function), nn.Conv2d(8, 8, 1)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    )


def once() -> nn.Sequential:
    return network(Once.apply)


def backwardless() -> nn.Sequential:
    return network(Backwardless.apply)


def detached() -> nn.Sequential:
    return network(torch.detach)


def needs_pairs() -> nn.Sequential:
    return network(lambda x: x.view(len(x) // 2, 2, *x.shape[1:]).flatten(0, 1))


def squeezed() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 8)),
        nn.Sequential(nn.Conv2d(8, 8, 1), Calls(torch.squeeze)),
        nn.Linear(8, 10),
    )


def counting() -> nn.Sequential:
    return network(nn.Identity(), lambda width: nn.BatchNorm2d(width, momentum=None))


class Constant(Greedy):
    """A local loss without a graph."""

    def forward(self, h: Tensor, fields: Any) -> Tensor:
        return torch.zeros((), device=h.device)


class BatchNormAct(nn.BatchNorm2d):
    """Batch normalisation and an activation in one layer."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def activated() -> nn.Sequential:
    return network(nn.Identity(), BatchNormAct)


def config_of(tmp_path: Path, function: str, **sections: dict[str, Any]) -> Resolved:
    sections.setdefault("method", {"objective": {"name": "greedy"}})
    sections.setdefault("pipeline", {"stages": 2})
    return settings(tmp_path / "run", model={"name": f"{__name__}:{function}"}, **sections)


def check(config: Resolved) -> None:
    check_plan(config, data.load(config.data, config.run.seed))


RECONCILE = {"objective": {"name": "greedy"}, "reconcile": {"distance": "cosine"}}


def test_a_block_without_a_second_derivative_is_refused_with_reconcile_alone(
    tmp_path: Path,
) -> None:
    check(config_of(tmp_path, "once"))
    config = config_of(tmp_path, "once", method=RECONCILE)
    text = "^model: block 2 of .*:once has no second derivative, .* set method.reconcile.distance"
    for run in (check, make_plan, prepare):
        with pytest.raises(UserError, match=text) as caught:
            run(config)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("function", "method", "text"),
    [
        ("backwardless", {}, "block 2 of .* has no derivative, which stage 1 needs"),
        ("detached", RECONCILE, "block 2 of .* has no derivative, which stage 1 needs"),
    ],
)
def test_a_block_without_a_derivative_is_refused(
    function: str, method: dict[str, Any], text: str, tmp_path: Path
) -> None:
    method = {"objective": {"name": "greedy"}, **method}
    with pytest.raises(UserError, match=text):
        check(config_of(tmp_path, function, method=method))


def test_a_loss_without_a_graph_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, "counting", method={"objective": {"name": f"{__name__}:Constant"}})
    with pytest.raises(UserError, match="^objective: .*:Constant fails at stage 0 in training"):
        check(config)


def test_the_last_batch_of_an_epoch_and_of_an_evaluation_is_tried(tmp_path: Path) -> None:
    """Of 45 images the last batch of 16 has 13, and of 17 held-out images the last one has 1."""
    check(config_of(tmp_path, "needs_pairs", data={"samples": 64}))
    with pytest.raises(UserError, match="block 2 of .* in training with 13 images"):
        check(config_of(tmp_path, "needs_pairs", data={"train_subset": 45}))
    check(config_of(tmp_path, "squeezed", data={"samples": 64, "train_subset": 32}))
    single = {"samples": 96, "validation": 17}
    with pytest.raises(UserError, match=r"block 1 of .* in evaluation with 1 images"):
        check(config_of(tmp_path, "squeezed", data=single))


def test_a_batch_norm_that_averages_over_all_batches_is_tried_and_trained(tmp_path: Path) -> None:
    config = config_of(tmp_path, "counting", method=RECONCILE, optim={"max_steps": 2})
    check(config)
    _, last = train_here(config)
    norm = last.blocks[0][1]  # type: ignore[index]
    assert norm.momentum is None and norm.num_batches_tracked == 2


def test_one_stage_may_fold_its_batch_and_pass_on_integers_inside(tmp_path: Path) -> None:
    for function in ("folded", "integers", "complex_numbers"):
        sections = to_dict(config_of(tmp_path, "counting", pipeline={"stages": 1}))
        sections["model"] = {"name": f"tests.networks.test_user_blocks:{function}", "args": {}}
        check(resolved(sections, (3, 8, 8)))


def test_a_batch_norm_with_a_forward_of_its_own_cannot_be_synchronised(tmp_path: Path) -> None:
    check(config_of(tmp_path, "activated", method=RECONCILE))
    pipeline = {"stages": 2, "replicas": 2, "processes": 4, "batch_norm": "sync"}
    config = config_of(tmp_path, "activated", pipeline=pipeline)
    text = "no rule for the BatchNormAct at 0.1 of stage 0, .*set pipeline.batch_norm=local"
    with pytest.raises(UserError, match=text):
        check(config)
    check(config_of(tmp_path, "activated", pipeline={**pipeline, "batch_norm": "local"}))


def test_a_trial_leaves_the_random_numbers_of_its_process(tmp_path: Path) -> None:
    config = config_of(tmp_path, "counting")
    before = torch.get_rng_state()
    check(config)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_configuration_is_tried_at_every_boundary_before_blocks_are_measured(
    tmp_path: Path,
) -> None:
    name = "tests.networks.test_user_blocks:integers"
    sections = to_dict(config_of(tmp_path, "counting"))
    sections["model"] = {"name": name, "args": {}}
    for cuts in ("memory", "time"):
        sections["pipeline"] = {"stages": 2, "cuts": cuts}
        config = resolved(sections, (3, 8, 8))
        with pytest.raises(UserError, match="block 1 of .* gives int64 numbers"):
            make_plan(config)

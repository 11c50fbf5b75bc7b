"""The synthetic chain: it waits in training only, and its messages have the configured size."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from localpipe.config.load import update
from localpipe.config.resolved import Resolved
from localpipe.environment import available_cores
from localpipe.errors import UserError
from localpipe.networks.chain import Wait, chain_blueprint
from localpipe.pipeline.channels.message import Header, Kind, Message
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.plan.predict import fits_cores
from tests.harness import differences, resolved, run, settings


def chained(run_dir: Path, args: dict[str, Any], **sections: dict[str, Any]) -> Resolved:
    """Return a resolved configuration of a chain of 4 stages on synthetic images."""
    given: dict[str, Any] = {
        "model": {"name": "chain", "args": {"time_ms": 0, "message_bytes": 4096, **args}},
        "method": {"objective": {"name": "greedy"}},
        "data": {"augment": "none", "drop_last": True},
        "optim": {"epochs": 1, "max_steps": 4},
    }
    return settings(run_dir, **{**given, **sections})


def slept(
    monkeypatch: pytest.MonkeyPatch, block: Wait, steps: int, training: bool = True
) -> list[float]:
    """Return what a block sleeps in each of some steps, without sleeping."""
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    block.train(training)
    for _ in range(steps):
        block(torch.zeros(2, 3, 4, 4))
    return naps


def test_a_message_has_the_bytes_that_were_asked_for() -> None:
    given = {
        "model": {"name": "chain", "num_classes": 10, "args": {"blocks": 3}},
        "pipeline": {"stages": 3},
    }
    images = {
        "data": {
            "name": "synthetic",
            "batch_size": 8,
            "image_size": 8,
            "mean": [0.5] * 3,
            "std": [0.2] * 3,
        }
    }
    _, plans = build_plans(resolved({**given, **images}, (3, 8, 8)))
    for plan in plans[:-1]:
        assert plan.sends is not None
        activation = plan.sends.fields[0]
        assert activation.nbytes * plan.sends.batch == 2**20 and activation.dtype == "float32"


def test_a_block_waits_once_a_training_step_and_never_in_evaluation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = Wait(0.02, 0.0, 64)
    assert slept(monkeypatch, block, 3) == [0.02] * 3
    assert slept(monkeypatch, block, 3, training=False) == []


def test_jitter_is_uniform_and_follows_from_the_random_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = Wait(0.02, 0.2, 64)
    torch.manual_seed(3)
    naps = slept(monkeypatch, block, 400)
    assert 0.016 <= min(naps) < 0.0165 and 0.0235 < max(naps) <= 0.024 and len(set(naps)) > 390
    torch.manual_seed(3)
    assert slept(monkeypatch, block, 400) == naps
    block.jittering = False
    assert slept(monkeypatch, block, 2) == [0.02, 0.02]


def test_every_block_has_a_time_of_its_own_where_they_are_listed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = chain_blueprint(
        "chain", (3, 8, 8), 10, batch_size=8, time_ms=(1.0, 2.0, 5.0), message_bytes=1024
    )
    blocks = network.build([0, 1, 2], 0)
    naps = []
    for block in blocks:
        assert isinstance(block, Wait)
        naps += slept(monkeypatch, block, 1)
    assert naps == [0.001, 0.002, 0.005]


def test_stages_of_a_chain_learn_and_plans_do_not_wait(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("a plan waited"))
    config = chained(tmp_path, {"time_ms": 1000})
    blueprint, plans = build_plans(config)
    meta = Stage(plans[1], blueprint, config, "meta")
    fields = {
        f.name: torch.empty(2, *f.shape, device="meta")
        for f in plans[1].receives.fields
        if f.name != "target"
    }
    assert meta.forward(Message(Header(Kind.TRAIN, 1, 1, 2), fields)).shape == (2, 1, 1, 64)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    stage = Stage(plans[1], blueprint, config)
    before = {name: tensor.clone() for name, tensor in stage.weights().items()}
    message = Message(
        Header(Kind.TRAIN, 1, 1, 2),
        {"h.0": torch.ones(2, 1, 1, 64), "target": torch.tensor([1, 2])},
    )
    stage.update(stage.local_loss(message, stage.forward(message)), message, 0.1)
    assert not any(torch.equal(before[name], tensor) for name, tensor in stage.weights().items())


def test_a_chain_of_two_processes_is_the_chain_of_one(tmp_path: Path) -> None:
    args = {"jitter": 0.2, "time_ms": 1}
    one = run(chained(tmp_path / "one", args))
    two = run(chained(tmp_path / "two", args, pipeline={"stages": 4, "processes": 2}))
    assert differences(one, two) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"tmie_ms": 3}, "did you mean model.args.time_ms?"),
        ({"batch_size": 3}, "choose one of"),
        ({"time_ms": "slow"}, "model.args.time_ms"),
        ({"jitter": 2}, "model.args.jitter"),
        ({"message_bytes": 1000}, "no multiple of 64"),
        ({"time_ms": [1, 2], "blocks": 3}, "lists 2 blocks; expected 3"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_it(
    args: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        build_plans(chained(tmp_path, args))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_network_without_arguments_refuses_them(tmp_path: Path) -> None:
    config = chained(tmp_path, {}, model={"name": "resnet8", "args": {"width": 3}})
    with pytest.raises(UserError, match="model.args.width is not a known key .resnet8."):
        build_plans(config)


def test_a_chain_may_have_more_processes_than_there_are_cores(tmp_path: Path) -> None:
    crowd = {"stages": 4, "processes": 4}
    assert fits_cores(chained(tmp_path, {}, pipeline=crowd))
    heavy = chained(
        tmp_path,
        {},
        model={"name": "resnet8"},
        pipeline=crowd,
        run={"threads": available_cores(), "dir": "x"},
    )
    assert not fits_cores(heavy)


def test_a_chain_takes_the_settings_of_its_task(tmp_path: Path) -> None:
    """Its messages are ballast, but its losses are those of the configuration."""
    soft = update(chained(tmp_path, {}), {"task.targets": "probabilities"})
    blueprint, plans = build_plans(soft)
    assert blueprint.task.target.dtype == "float32"
    assert plans[-1].receives.fields[-1].shape == (10,)
    smooth = build_plans(chained(tmp_path, {}, task={"label_smoothing": 0.5}))[0].task
    logits, target = torch.tensor([[9.0] + [0.0] * 9]), torch.tensor([0])
    assert smooth.losses(logits, target) > 4 > blueprint_loss(tmp_path, logits, target)


def blueprint_loss(tmp_path: Path, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return build_plans(chained(tmp_path, {}))[0].task.losses(logits, target)

"""Captured stages against eager ones. Most of it needs a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from localpipe.config.keys import Optim
from localpipe.config.load import update
from localpipe.config.resolve import MachineFacts
from localpipe.config.resolved import Resolved
from localpipe.pipeline.channels import streams
from localpipe.pipeline.channels.message import Flag, Kind, Message
from localpipe.pipeline.stages.captured import CapturedStage, CompiledStage, stage_class
from localpipe.pipeline.stages.optimizer import build_optimizer, set_rate
from localpipe.pipeline.stages.stage import Stage
from tests.harness import differences, resolved, settings
from tests.pipeline.stages.test_precision import cuda_stages, on_cuda, on_gpu
from tests.pipeline.stages.test_stage import loader


def test_the_configuration_says_which_stages_are_made() -> None:
    gpu = MachineFacts(cores=1, cuda_devices=1)
    kinds = {
        name: stage_class(resolved({"run": {"capture": name}}, machine=gpu))
        for name in ("none", "graphs", "compile")
    }
    assert kinds == {"none": Stage, "graphs": CapturedStage, "compile": CompiledStage}


def configuration(
    folder: Path, device: str = "cuda", stages: int = 2, **sections: dict[str, Any]
) -> Resolved:
    """Return a configuration for a device, without asking this machine's launcher for one."""
    base: dict[str, Any] = {
        "method": {"objective": {"name": "dgl"}},
        "pipeline": {"stages": stages},
    }
    base["data"] = {"samples": 72, "batch_size": 16}
    run = {"device": device, "deterministic": False, **sections.pop("run", {})}
    config = settings(folder, **{**base, **sections})
    return update(config, {f"run.{key}": value for key, value in run.items()})


def messages_of(config: Resolved) -> list[Message]:
    """Return every message of a run: full batches, the epoch's shorter last one, evaluations."""
    inbox, found = loader(config), []
    while not (message := inbox.receive()).header.flags & Flag.STOP:
        if message.header.kind is not Kind.EMPTY:
            found.append(
                Message(
                    message.header,
                    {name: tensor.clone() for name, tensor in message.fields.items()},
                )
            )
    assert (
        len({message.header.count for message in found if message.header.kind is Kind.TRAIN}) == 2
    )
    return found


def trained(
    stages: list[Stage], messages: list[Message], rates: list[float] | None = None
) -> list[Tensor]:
    """Take every message through all stages; return the losses."""
    losses = []
    for index, message in enumerate(messages):
        for stage in stages:
            h = stage.forward(message)
            sent = {name: tensor.clone() for name, tensor in stage.outgoing(message, h).items()}
            if message.header.kind is Kind.TRAIN:
                loss = stage.local_loss(message, h)
                stage.update(loss, message, rates[index] if rates is not None else 0.05)
                losses.append(loss.detach().clone())
            message = Message(message.header, sent)
    return losses


# --- CUDA graphs

METHODS = {
    "dgl": {"method": {"objective": {"name": "dgl"}}},
    "infopro + R1": {
        "method": {"objective": {"name": "infopro", "task": "contrast"}, "context": {"mode": "R1"}}
    },
    "class weights": {"task": {"class_weights": [1, 2, 1, 2, 1, 2, 1, 2, 1, 2]}},
    "adamw": {"optim": {"name": "adamw"}},
    "adamw, clip, ema": {"optim": {"name": "adamw", "clip": 0.1, "ema": 0.5, "decay": "matrices"}},
    "fp16": {"run": {"precision": "fp16"}},
    "fp16, clip, ema": {"run": {"precision": "fp16"}, "optim": {"clip": 0.1, "ema": 0.5}},
    "bf16": {"run": {"precision": "bf16"}},
}


@on_gpu
@pytest.mark.parametrize("sections", METHODS.values(), ids=METHODS)
def test_replayed_steps_are_eager_ones_to_the_tolerance_of_the_kernels(
    tmp_path: Path, sections: dict[str, Any]
) -> None:
    """Dropout, a shorter batch, evaluations and another rate at every step among them."""
    config = configuration(
        tmp_path, **{**sections, "run": {**sections.get("run", {}), "capture": "graphs"}}
    )
    messages = [on_cuda(message) for message in messages_of(config)]
    rates = [0.01 * (1 + index % 5) for index in range(len(messages))]
    if config.optim.name == "adamw":
        rates = [rate / 10 for rate in rates]
    eager, captured = cuda_stages(config), cuda_stages(config, CapturedStage)
    losses, replayed = (
        torch.stack(trained(stages, messages, rates)) for stages in (eager, captured)
    )
    assert all(stage._graphs is not None for stage in captured if isinstance(stage, CapturedStage))
    torch.testing.assert_close(replayed, losses, rtol=0.05, atol=0.02)
    for captured_stage, eager_stage in zip(captured, eager, strict=True):
        for name, weight in eager_stage.weights().items():
            torch.testing.assert_close(
                captured_stage.weights()[name].float(), weight.float(), rtol=0.05, atol=0.02
            )


@on_gpu
def test_the_stages_of_a_process_share_a_stream_for_their_captures(tmp_path: Path) -> None:
    """torch has 32 streams a device, and a process may host more stages."""
    config = configuration(tmp_path, run={"capture": "graphs"})
    before = len(streams._taken)
    stages = cuda_stages(config, CapturedStage)
    trained(stages, [on_cuda(message) for message in messages_of(config)[:2]])
    assert all(stage._graphs is not None for stage in stages if isinstance(stage, CapturedStage))
    assert len(stages) == 2 and len(streams._taken) <= before + 1


@on_gpu
def test_the_first_capture_takes_nothing_with_it(tmp_path: Path) -> None:
    config = configuration(tmp_path, run={"capture": "graphs"})
    (stage, _), message = cuda_stages(config, CapturedStage), on_cuda(messages_of(config)[0])
    before = {name: tensor.clone() for name, tensor in stage.weights().items()}
    assert isinstance(stage, CapturedStage)
    stage._capture(message)
    assert differences(dict(stage.weights()), before) == []


@on_gpu
def test_a_resumed_captured_stage_goes_on_like_one_that_was_never_stopped(tmp_path: Path) -> None:
    config = configuration(tmp_path, run={"capture": "graphs"})
    messages = [
        on_cuda(message) for message in messages_of(config) if message.header.kind is Kind.TRAIN
    ]
    undisturbed, resumed = cuda_stages(config, CapturedStage), cuda_stages(config, CapturedStage)
    trained(undisturbed, messages[:4])
    for stage, other in zip(undisturbed, resumed, strict=True):
        file = tmp_path / "state.pt"
        torch.save(stage.state(), file)
        other.load_state(torch.load(file, map_location="cpu", weights_only=True))
    for stages in (undisturbed, resumed):
        trained(stages, messages[4:])
    for stage, other in zip(undisturbed, resumed, strict=True):
        for name, weight in stage.weights().items():
            torch.testing.assert_close(other.weights()[name], weight, rtol=0.01, atol=1e-3)


@on_gpu
def test_replayed_dropout_differs_from_step_to_step_and_repeats_with_its_step(
    tmp_path: Path,
) -> None:
    config = configuration(tmp_path, run={"capture": "graphs"}, optim={"lr": 0.0})
    (_, stage), messages = cuda_stages(config, CapturedStage), messages_of(config)
    first = cuda_stages(config)[0]
    full = on_cuda(messages[0])
    h = first.forward(full)
    sent = Message(
        full.header, {name: tensor.clone() for name, tensor in first.outgoing(full, h).items()}
    )
    other = Message(messages[1].header, sent.fields)
    found = [stage.forward(message).clone() for message in (sent, other, sent)]
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


@on_gpu
def test_a_captured_optimizer_reads_its_rate_from_the_device() -> None:
    for name in ("sgd", "adamw"):
        weight = torch.nn.Parameter(torch.ones(3, device="cuda"))
        found = build_optimizer(Optim(name=name), [weight], captured=True)
        assert found is not None
        rate = found.param_groups[0]["lr"]
        set_rate(found, 0.5)
        assert rate.is_cuda and float(rate) == 0.5 and found.param_groups[0]["fused"]


# --- torch.compile


@on_gpu
def test_compiled_steps_are_eager_ones_to_the_tolerance_of_the_kernels(tmp_path: Path) -> None:
    config = configuration(
        tmp_path, run={"capture": "compile"}, model={"name": "tests.sample_networks:dry"}
    )
    messages = [on_cuda(message) for message in messages_of(config)]
    eager, compiled = cuda_stages(config), cuda_stages(config, CompiledStage)
    losses, others = (torch.stack(trained(stages, messages)) for stages in (eager, compiled))
    torch.testing.assert_close(others, losses, rtol=0.05, atol=0.02)

"""The precision of a stage's arithmetic and of a boundary.

The result is the same for any number of processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from localpipe import config as configs
from localpipe.config.keys import Config
from localpipe.config.load import update
from localpipe.config.resolved import Resolved
from localpipe.config.rules import check_precision
from localpipe.errors import RunError, UserError
from localpipe.methods.infopro import supervised_contrastive_loss
from localpipe.methods.predsim import similarity_matrix
from localpipe.methods.reconcile import gradient_distance
from localpipe.pipeline.channels.channel import MemoryChannel
from localpipe.pipeline.channels.message import Header, Kind, Message
from localpipe.pipeline.stages.precision import set_precision_flags
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.workers.meter import Meter
from localpipe.plan.costs import count_costs
from localpipe.plan.tables import describe_crossings, plan_json
from tests.harness import digests, settings, train_here
from tests.pipeline.stages.test_stage import batch, stages_of

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def on_gpu(test: Any) -> Any:
    for mark in gpu:
        test = mark(test)
    return test


SGR = {
    "objective": {"name": "dgl"},
    "context": {"mode": "R1E"},
    "reconcile": {"distance": "cosine"},
}
INSIDE: dict[str, dict[str, Any]] = {
    "plain": {},
    "wire bf16": {"pipeline": {"wire_dtype": "bf16"}},
    "wire fp16, sgr": {"pipeline": {"wire_dtype": "fp16"}, "method": SGR},
    "bf16": {"run": {"precision": "bf16"}, "pipeline": {"wire_dtype": "bf16"}},
    "fp16, sgr": {"run": {"precision": "fp16"}, "method": SGR},
    "channels last": {"run": {"channels_last": True}},
    "accumulate": {"optim": {"accumulate": 4}},
    "accumulate, sgr": {"optim": {"accumulate": 2}, "method": SGR},
    "checkpointing": {"run": {"checkpointing": "block"}},
    "all": {
        "run": {"precision": "fp16", "checkpointing": "block", "channels_last": True},
        "pipeline": {"wire_dtype": "bf16"},
        "optim": {"accumulate": 2},
    },
}


def inside(folder: Path, processes: int = 1, **sections: Any) -> Resolved:
    sections["pipeline"] = {"stages": 4, "processes": processes, **sections.get("pipeline", {})}
    sections["optim"] = {"epochs": 1, **sections.get("optim", {})}
    return settings(folder / "run", data={"samples": 40}, **sections)


def test_whatever_happens_inside_a_stage_is_one_digest_on_1_2_and_4_processes(
    tmp_path: Path,
) -> None:
    def jobs(processes: int) -> list[Config]:
        return [
            inside(tmp_path / f"{i}-{processes}", processes, **each)
            for i, each in enumerate(INSIDE.values())
        ]

    found = {
        p: dict(zip(INSIDE, digests(jobs(p), p, tmp_path / f"all-{p}"), strict=True))
        for p in (1, 2, 4)
    }
    for processes in (2, 4):
        assert [name for name in INSIDE if found[1][name] != found[processes][name]] == [], (
            f"{processes} processes"
        )
    assert found[1]["checkpointing"] == found[1]["plain"], (
        "what is computed again is what was computed"
    )
    assert len(set(found[1].values())) == len(INSIDE) - 1, "two settings computed the same"


# --- What crosses


def crossing(config: Resolved) -> list[dict[str, str]]:
    _, plans = build_plans(config)
    return [
        {field.name: field.dtype for field in plan.sends.fields}
        for plan in plans
        if plan.sends is not None
    ]


def test_activations_contexts_and_gradients_cross_in_the_wire_dtype_and_nothing_else(
    tmp_path: Path,
) -> None:
    config = settings(
        tmp_path, method={**SGR, "context": {"mode": "R2"}}, pipeline={"wire_dtype": "bf16"}
    )
    assert crossing(config) == [
        {"h.0": "bfloat16", "target": "int64", "image": "uint8", "grad.0": "bfloat16"},
        {
            "h.1": "bfloat16",
            "target": "int64",
            "image": "uint8",
            "ctx.0": "bfloat16",
            "grad.1": "bfloat16",
        },
        {
            "h.2": "bfloat16",
            "target": "int64",
            "ctx.0": "bfloat16",
            "ctx.1": "bfloat16",
            "grad.2": "bfloat16",
        },
    ]


def test_plan_shows_the_wire_dtype_and_its_bytes(tmp_path: Path) -> None:
    sizes = []
    for dtype in ("fp32", "fp16"):
        config = settings(tmp_path, method={"objective": "dgl"}, pipeline={"wire_dtype": dtype})
        blueprint, plans = build_plans(config)
        plan = plan_json(plans, count_costs(blueprint, plans, config))
        sizes.append(plan["totals"]["message_bytes"])
    assert [field["dtype"] for field in plan["stages"][0]["sends"]] == ["float16", "int64"]
    assert "h.0 8x8x8 float16" in describe_crossings(plans)[0]
    assert 0.5 < sizes[1] / sizes[0] < 0.6


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_next_stage_sees_what_was_sent_rounded_once_and_computes_in_fp32(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    config = settings(
        tmp_path, method={**SGR, "context": {"mode": "R1"}}, pipeline={"wire_dtype": name}
    )
    first, second, third = stages_of(config)[:3]
    message = batch(config)
    h = first.forward(message)
    gradient = first.boundary_gradient(first.local_loss(message, h), h)
    sent = through(first, message, first.outgoing(message, h, gradient))
    assert sent.fields["h.0"].dtype is dtype and torch.equal(
        sent.fields["h.0"], h.detach().to(dtype)
    )
    assert torch.equal(sent.fields["grad.0"], gradient.to(dtype))
    assert torch.equal(sent.fields["image"], message.fields["image"])
    assert second.adapter is not None
    merged = second.adapter(h.detach().to(dtype).float(), images(second, sent))
    assert torch.equal(second.boundary.read_input(sent.fields, False), merged)
    h = second.forward(sent)
    assert h.dtype is torch.float32 and second.local_loss(sent, h).dtype is torch.float32
    passed = through(second, sent, second.outgoing(sent, h, torch.zeros_like(h)))
    assert passed.fields["ctx.0"].dtype is dtype
    assert third.forward(passed).dtype is torch.float32


def images(stage: Stage, message: Message) -> dict[str, Tensor]:
    return {"image": stage.entry(message.fields["image"])}


def through(stage: Stage, message: Message, fields: Any) -> Message:
    assert stage.plan.sends is not None
    channel = MemoryChannel(stage.plan.sends, 1)
    channel.send(message.header, fields)
    return channel.receive()


# --- fp16: a loss scale inside every stage


def scaled_stage(folder: Path, scale: float | None = None, **method: Any) -> tuple[Stage, Message]:
    config = settings(folder, method={"objective": "dgl", **method}, run={"precision": "fp16"})
    stage = stages_of(config)[0]
    if scale is not None:
        rescale(stage, scale)
    return stage, batch(config)


def rescale(stage: Stage, scale: float) -> None:
    state = stage.state()
    stage.load_state({**state, "scaler": {**state["scaler"], "scale": scale}})


def scale_of(stage: Stage) -> float:
    return float(stage.state()["scaler"]["scale"])


def step(stage: Stage, message: Message) -> None:
    stage.update(stage.local_loss(message, stage.forward(message)), message, 0.1)


def test_an_update_whose_gradients_overflow_is_skipped_and_halves_the_scale(tmp_path: Path) -> None:
    stage, message = scaled_stage(tmp_path, 2.0**40)
    before = [parameter.detach().clone() for parameter in stage.parameters()]
    step(stage, message)
    assert all(torch.equal(a, b) for a, b in zip(before, stage.parameters(), strict=True))
    assert scale_of(stage) == 2.0**39
    stage.check_finite()
    rescale(stage, 2.0**8)
    step(stage, message)
    assert not all(torch.equal(a, b) for a, b in zip(before, stage.parameters(), strict=True))
    assert scale_of(stage) == 2.0**8


def test_the_loss_scale_is_part_of_a_stages_state(tmp_path: Path) -> None:
    stage, message = scaled_stage(tmp_path, 2.0**40)
    step(stage, message)
    copy, _ = scaled_stage(tmp_path)
    copy.load_state(stage.state())
    assert scale_of(copy) == 2.0**39
    assert stages_of(settings(tmp_path))[0].state()["scaler"] is None


def test_the_loss_scale_is_divided_out_of_the_gradient_at_the_boundary(tmp_path: Path) -> None:
    found = []
    for scale in (2.0**8, 2.0**11):
        stage, message = scaled_stage(tmp_path, scale, reconcile="cosine")
        h = stage.forward(message)
        found.append(stage.boundary_gradient(stage.local_loss(message, h), h))
    exact = stages_of(settings(tmp_path, method={"objective": "dgl", "reconcile": "cosine"}))[0]
    h = exact.forward(message)
    wanted = exact.boundary_gradient(exact.local_loss(message, h), h)
    for gradient in found:
        assert gradient.dtype is torch.float32
        assert (gradient - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_the_loss_scale_is_divided_out_of_what_reconciles(tmp_path: Path, distance: str) -> None:
    method = {"objective": "dgl", "reconcile": {"distance": distance, "weight": 0.5}}
    fields = {
        "h.0": torch.randn(16, 8, 8, 8, generator=torch.Generator().manual_seed(0)),
        "grad.0": torch.randn(16, 8, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.05,
        "target": torch.arange(16) % 10,
    }
    message = Message(Header(Kind.TRAIN, 1, 1, 16), fields)
    found = {}
    for name in ("fp32", "fp16"):
        stage = stages_of(settings(tmp_path, method=method, run={"precision": name}))[1]
        if name == "fp16":
            rescale(stage, 2.0**8)
        before = [parameter.detach().clone() for parameter in stage.parameters()]
        loss = stage.local_loss(message, stage.forward(message))
        whole = stage.add_distance(loss, message)
        found[name] = float((whole - loss).detach())
        stage.update(whole, message, 0.1)
        assert not all(torch.equal(a, b) for a, b in zip(before, stage.parameters(), strict=True))
        stage.check_finite()
    assert found["fp16"] == pytest.approx(found["fp32"], rel=0.03)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_a_run_in_every_precision_learns_and_keeps_fp32_weights(tmp_path: Path, name: str) -> None:
    config = inside(tmp_path, run={"precision": name}, optim={"epochs": 4})
    before = [stage.weights() for stage in stages_of(config)]
    for old, stage in zip(before, train_here(config), strict=True):
        new = stage.weights()
        assert {tensor.dtype for tensor in new.values()} <= {torch.float32, torch.int64}
        assert not all(torch.equal(old[key], new[key]) for key in old if key.endswith("weight"))
        stage.check_finite()


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_a_received_gradient_that_overflowed_draws_nothing(distance: str) -> None:
    own_gradient = torch.randn(4, 6, requires_grad=True)
    received = torch.randn(4, 6)
    wanted = gradient_distance(distance, own_gradient, received)
    received[2, 1], received[3, 0] = float("inf"), float("nan")
    apart = gradient_distance(distance, own_gradient, received)
    (gradient,) = torch.autograd.grad(apart, own_gradient)
    assert apart.isfinite() and gradient.isfinite().all()
    assert not gradient[2:].any() and gradient[:2].any() and apart != wanted


def test_products_in_a_loss_are_fp32_whatever_the_arithmetic(tmp_path: Path) -> None:
    z, y = torch.randn(16, 32), torch.arange(16) % 3
    for loss in (similarity_matrix, lambda z: supervised_contrastive_loss(z, y)):
        wanted = loss(z)
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(z)
        assert found.dtype is torch.float32 and torch.equal(found, wanted)


# --- What a device has


def test_a_device_is_not_asked_for_numbers_that_it_lacks() -> None:
    def refusal(device: str, **sections: Any) -> str:
        with pytest.raises(UserError) as error:
            check_precision(configs.parse(sections, "test"), device, cuda_has_bf16=False)
        return str(error.value)

    message = "config: run.precision is tf32, which cpu does not have; set run.precision=fp32"
    assert refusal("cpu", run={"precision": "tf32"}) == message
    assert "run.capture is graphs, which cpu does not have" in refusal(
        "cpu", run={"capture": "graphs"}
    )
    assert "run.precision is bf16, which this CUDA device" in refusal(
        "cuda", run={"precision": "bf16"}
    )
    message = (
        "config: pipeline.wire_dtype is bf16, which this CUDA device does not have; "
        "set pipeline.wire_dtype=fp16"
    )
    assert refusal("cuda", pipeline={"wire_dtype": "bf16"}) == message
    check_precision(
        configs.parse({"run": {"precision": "bf16"}, "pipeline": {"wire_dtype": "fp16"}}, "test"),
        "cpu",
        cuda_has_bf16=False,
    )


def test_numbers_that_the_device_lacks_are_known_before_a_worker_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run.precision is tf32, which cpu does not have"):
        settings(tmp_path, run={"precision": "tf32", "device": "cpu"})


# --- On a GPU


def cuda_config(folder: Path, **run: Any) -> Resolved:
    """Return a configuration for a device, without asking this machine's launcher for one."""
    config = settings(folder, method={"objective": "dgl"})
    return update(config, {f"run.{key}": value for key, value in {"device": "cuda", **run}.items()})


def cuda_stages(config: Resolved, kind: type[Stage] = Stage) -> list[Stage]:
    set_precision_flags(config)
    blueprint, plans = build_plans(config)
    return [kind(plan, blueprint, config, "cuda") for plan in plans]


def on_cuda(message: Message) -> Message:
    return Message(message.header, {name: tensor.cuda() for name, tensor in message.fields.items()})


@on_gpu
@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16", "fp16"])
def test_every_precision_trains_a_stage_on_a_gpu(tmp_path: Path, name: str) -> None:
    config = cuda_config(tmp_path, precision=name)
    stage = cuda_stages(config)[0]
    assert (
        torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == (name == "tf32")
    )
    message = on_cuda(batch(config))
    losses = []
    for _ in range(20):
        h = stage.forward(message)
        assert h.dtype is torch.float32
        loss = stage.local_loss(message, h)
        stage.update(loss, message, 0.1)
        losses.append(loss.detach())
    assert float(losses[-1]) < float(losses[0])
    stage.check_finite()
    copy = cuda_stages(config)[0]
    copy.load_state(stage.state())
    assert copy.optimizer is not None and all(
        group["fused"] for group in copy.optimizer.param_groups
    )


@on_gpu
@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_no_step_waits_for_a_gpu(tmp_path: Path, name: str) -> None:
    config = cuda_config(tmp_path, precision=name)
    stage, meter, message = cuda_stages(config)[0], Meter(), on_cuda(batch(config))
    for number in range(1, 9):
        if number == 4:  # what is made in the first steps is there
            torch.cuda.set_sync_debug_mode("error")
        try:
            loss = stage.local_loss(message, stage.forward(message))
            stage.update(loss, message, 0.1)
            meter.add(number, loss, 16)
        finally:
            if number == 8:
                torch.cuda.set_sync_debug_mode("default")
    assert meter.mean_loss() is not None and meter.samples == 8 * 16


@on_gpu
def test_a_loss_on_a_gpu_that_is_not_finite_is_told() -> None:
    meter = Meter()
    meter.add(1, torch.tensor(float("nan"), device="cuda"), 4)
    with pytest.raises(RunError, match="the local loss of step 1 is nan"):
        meter.settle()

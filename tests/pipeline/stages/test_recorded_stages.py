"""Stages of networks with layouts, orders in memory and several tensors at a cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localpipe import seeds
from localpipe.errors import UserError
from localpipe.methods.objective import LocalLoss, Site
from localpipe.networks.blueprint import BlockOutput
from localpipe.pipeline.channels.channel import MemoryChannel
from localpipe.pipeline.channels.message import Header, Kind, Message
from localpipe.pipeline.stages.blocks import Blocks, split_activation
from localpipe.pipeline.stages.boundary import Normalise
from localpipe.pipeline.stages.stage import Stage, TailLoss
from localpipe.pipeline.stages.stage_plan import build_plans
from tests.hand_made import NAMES, permuted_blueprint, settings

pytestmark = pytest.mark.usefixtures("hand_made")

ROWS = 8


def build_stages(folder: Path, name: str, **sections: dict[str, Any]) -> list[Stage]:
    """Return four stages of a network without dropout, so that no draw differs."""
    config = settings(folder, name, **sections)
    blueprint, plans = build_plans(config)
    stages = [Stage(plan, blueprint, config) for plan in plans]
    for stage in stages:
        for module in stage.blocks.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return stages


def first_message(kind: Kind = Kind.TRAIN) -> Message:
    """Return random images and targets."""
    with seeds.preserved_generators():
        torch.manual_seed(0)
        image = torch.randint(0, 256, (ROWS, 3, 8, 8), dtype=torch.uint8)
    target = torch.arange(ROWS) % 10
    return Message(Header(kind, 1, 1, ROWS), {"image": image, "target": target})


def run_stages(stages: list[Stage], kind: Kind) -> Tensor:
    """Return the logits of a pipeline in memory, whose messages are copied."""
    message = first_message(kind)
    for stage in stages:
        h = stage.forward(message)
        if stage.plan.sends is None:
            break
        channel = MemoryChannel(stage.plan.sends, 1)
        channel.send(message.header, stage.outgoing(message, h))
        message = channel.receive()
    assert isinstance(stage.objective, TailLoss)
    return stage.objective.exit(h, *stage.companions)


def run_plainly(stages: list[Stage], kind: Kind) -> Tensor:
    """Return the logits of the same modules in a row, without a boundary."""
    last = stages[-1]
    assert isinstance(last.objective, TailLoss)
    blocks = [block for stage in stages for block in stage.blocks]
    network = Blocks(*blocks, last.objective.tail)
    network.train(kind is Kind.TRAIN)
    assert isinstance(last.entry, Normalise)
    with torch.set_grad_enabled(kind is Kind.TRAIN):
        logits, _ = split_activation(network(last.entry(first_message().fields["image"])))
    return logits


@pytest.mark.parametrize("kind", [Kind.TRAIN, Kind.TEST])
@pytest.mark.parametrize("name", NAMES)
def test_stages_compute_the_network_bit_for_bit(tmp_path: Path, name: str, kind: Kind) -> None:
    stages = build_stages(tmp_path, name)
    assert torch.equal(run_stages(stages, kind), run_plainly(stages, kind))


def test_a_permuted_boundary_made_contiguous_gives_other_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without this the equality above would prove nothing."""

    def without_order(*arguments: Any) -> Any:
        blueprint = permuted_blueprint(*arguments)
        outputs = [replace(output, order=()) for output in blueprint.recorded_outputs]
        return replace(blueprint, recorded_outputs=tuple(outputs))

    monkeypatch.setattr("tests.hand_made.permuted_blueprint", without_order)
    stages = build_stages(tmp_path, "hand_permuted")
    differs = []
    for kind in (Kind.TRAIN, Kind.TEST):
        differs.append(not torch.equal(run_stages(stages, kind), run_plainly(stages, kind)))
    assert any(differs)


@pytest.mark.parametrize("name", ["hand_permuted"])
def test_the_recorded_order_is_that_of_the_blocks(tmp_path: Path, name: str) -> None:
    stages = build_stages(tmp_path, name)
    message = first_message()
    h = stages[0].forward(message)
    assert stages[0].plan.sends is not None
    assert h.stride() == stages[0].plan.sends.fields[0].strides


def test_channels_last_keeps_its_rule(tmp_path: Path) -> None:
    """Maps are put into channels_last, and (B, H, W, D) stays as it is."""
    for name in ("hand_permuted", "hand_hwc"):
        stages = build_stages(tmp_path, name, run={"channels_last": True})
        seen: list[Any] = []
        stages[1].blocks.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs))
        run_stages(stages, Kind.TRAIN)
        (x,) = seen[0]
        if name == "hand_hwc":
            assert x.is_contiguous()
        else:
            assert x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("wire_dtype", ["fp32", "bf16"])
def test_companions_arrive_in_their_dtypes(tmp_path: Path, wire_dtype: str) -> None:
    stages = build_stages(tmp_path, "hand_skips", pipeline={"wire_dtype": wire_dtype})
    assert stages[1].plan.sends is not None and stages[1].plan.last == 1
    crossing = {"fp32": "float32", "bf16": "bfloat16"}[wire_dtype]
    got = [(field.name, field.dtype) for field in stages[1].plan.sends.fields]
    assert got == [
        ("h.1", crossing),
        ("h.1.1", crossing),
        ("h.1.2", "int64"),
        ("h.1.3", "bool"),
        ("target", "int64"),
    ]
    seen: list[Any] = []
    stages[2].blocks.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    run_stages(stages, Kind.TRAIN)
    main, skip, places, mask = seen[0]
    assert main.dtype == skip.dtype == torch.float32
    assert places.dtype == torch.int64 and mask.dtype == torch.bool
    assert not any(tensor.requires_grad for tensor in seen[0])
    assert 0 < mask.sum() < mask.numel() and places.max() > 0


def test_a_companion_that_passes_a_stage_is_sent_on_untouched(tmp_path: Path) -> None:
    stages = build_stages(tmp_path, "hand_skips", pipeline={"cuts": [0, 1, 2]})
    message = first_message()
    skips = []
    for stage in stages[:3]:
        h = stage.forward(message)
        outgoing = stage.outgoing(message, h)
        skips.append(outgoing[f"h.{stage.plan.stage}.1"].clone())
        message = Message(message.header, {k: v.clone() for k, v in outgoing.items()})
    assert torch.equal(skips[0], skips[1]) and torch.equal(skips[1], skips[2])


def test_the_head_of_the_last_stage_sends_its_gradient_through_companions(tmp_path: Path) -> None:
    stages = build_stages(tmp_path, "hand_skips")
    message = first_message()
    for stage in stages[:3]:
        outgoing = stage.outgoing(message, stage.forward(message))
        message = Message(message.header, {k: v.clone() for k, v in outgoing.items()})
    last = stages[-1]
    loss = last.local_loss(message, last.forward(message))
    loss.backward()
    assert all(p.grad is not None for p in last.parameters())
    sums = last.measure(message, last.forward(message))
    assert sums is not None and torch.allclose(
        sums["loss"], loss.double() * len(message.fields["target"])
    )


def test_auglocal_copies_blocks_of_one_tensor_alone(tmp_path: Path) -> None:
    method = {"objective": {"name": "auglocal", "aux_depth": 3, "pyramid": 0.0}}
    stages = build_stages(tmp_path, "hand_skips", method=method)
    network: Any = stages[0].objective.network
    assert [type(layer).__name__ for layer in network] == ["MapAdapter", "Conv2d", "Exit"]


def test_auglocal_without_a_block_of_one_tensor_is_refused(tmp_path: Path) -> None:
    """After b4 only a block follows that gives two tensors."""
    with pytest.raises(UserError) as caught:
        build_stages(
            tmp_path,
            "hand_skips",
            method={"objective": {"name": "auglocal"}},
            pipeline={"stages": 2, "cuts": [4]},
        )
    text = str(caught.value)
    assert text.startswith("objective: auglocal finds no block to copy after stage 0")
    assert "\n" not in text


class Writes(LocalLoss):
    """Its head begins with a layer that writes in place."""

    @dataclass(frozen=True)
    class Options:
        pass

    def __init__(self, options: Options, site: Site) -> None:
        super().__init__()
        self.task = site.blueprint.task
        self.shape = site.shape
        features = self.task.features(site.shape)
        self.head = site.unit("head", lambda: nn.Linear(features, self.task.num_classes))

    def exit(self, h: Tensor) -> Tensor:
        assert tuple(h.shape[1:]) == self.shape
        logits: Tensor = self.head(self.task.pool(h.relu_()))
        return logits


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_that_writes_in_place_gets_a_copy(tmp_path: Path, name: str) -> None:
    stages = build_stages(tmp_path, name, method={"objective": {"name": f"{__name__}:Writes"}})
    message = first_message()
    h = stages[0].forward(message)
    before = h.detach().clone()
    stages[0].local_loss(message, h).backward()
    assert torch.equal(h, before) and bool((before < 0).any()) == (name != "hand_skips")
    assert all(p.grad is not None for p in stages[0].parameters())


def test_auglocal_converts_before_and_after_its_copies(tmp_path: Path) -> None:
    method = {"objective": {"name": "auglocal", "aux_depth": 3, "pyramid": 0.0}}
    stages = build_stages(tmp_path, "hand_hwc", method=method)
    network: Any = stages[0].objective.network
    names = [type(layer).__name__ for layer in network]
    assert names[:5] == ["FromStandard", "HwcBlock", "ToStandard", "MapAdapter", "FromStandard"]
    message = first_message()
    stages[0].local_loss(message, stages[0].forward(message)).backward()
    assert all(p.grad is not None for p in stages[0].parameters())


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        (name, objective)
        for name in NAMES
        for objective in ("greedy", "dgl", "predsim", "infopro", "auglocal")
        if (name, objective) != ("hand_sequence", "infopro")
    ],
)
def test_every_objective_trains_every_layout(tmp_path: Path, name: str, objective: str) -> None:
    options: dict[str, Any] = {"name": objective}
    if objective == "infopro":
        options["task_weight"] = [1, 1]
    stages = build_stages(tmp_path, name, method={"objective": options})
    message = first_message()
    for stage in stages:
        h = stage.forward(message)
        stage.local_loss(message, h).backward()
        outgoing = stage.outgoing(message, h)
        message = Message(message.header, {k: v.clone() for k, v in outgoing.items()})
        reached = [p for p in stage.parameters() if p.grad is not None]
        assert len(reached) >= len(list(stage.objective.parameters()))


def test_a_site_has_the_standard_shape(tmp_path: Path) -> None:
    output = BlockOutput((4, 6, 3), "hwc", (2, 0, 1))
    h = output.from_standard(torch.arange(2 * 72.0).view(2, 3, 4, 6))
    assert h.shape == (2, 4, 6, 3) and h.stride() == (72, 6, 1, 24)
    assert output.standard_shape == (3, 4, 6)
    assert torch.equal(output.to_standard(h), torch.arange(2 * 72.0).view(2, 3, 4, 6))

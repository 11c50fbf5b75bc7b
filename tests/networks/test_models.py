"""The published networks, measured on plans; initial weights; and networks of a user's own."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.networks.blueprint import Blueprint
from localpipe.networks.resnet_cifar import resnet_cifar_blueprint
from localpipe.networks.user_network import user_blueprint
from localpipe.pipeline.channels.message import Header, Kind, Message
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import plan_stages
from localpipe.plan.costs import StageCost, count_costs
from tests.harness import resolved

IMAGE = (3, 32, 32)
KIB = 1024


def resnet(name: str = "resnet8") -> Blueprint:
    return resnet_cifar_blueprint(name, IMAGE, 10)


def settings(head: str = "mlp", seed: int = 0) -> Resolved:
    sections = {
        "method": {"objective": {"name": "dgl", "head": head}},
        "data": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
        "run": {"seed": seed},
    }
    return resolved(sections)


def costs(name: str, stages: int, head: str = "mlp") -> list[StageCost]:
    blueprint = resnet(name)
    return count_costs(blueprint, plan_stages(blueprint, stages, "equal", 64), settings(head))


def stages_of(
    blueprint: Blueprint,
    stages: int,
    cuts: str | tuple[int, ...] = "equal",
    seed: int = 0,
    head: str = "mlp",
) -> list[Stage]:
    return [
        Stage(each, blueprint, settings(head, seed))
        for each in plan_stages(blueprint, stages, cuts, 4)
    ]


def weights_of(stages: list[Stage]) -> dict[str, Tensor]:
    """Return the weights of all stages under their names, auxiliary networks included."""
    found: dict[str, Tensor] = {}
    for stage in stages:
        assert not found.keys() & stage.weights().keys()
        found.update(stage.weights())
    return found


def backbone(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if not name.startswith("aux.")}


def equal(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(
        torch.equal(some[name], others[name]) for name in some
    )


# --- Published costs


@pytest.mark.parametrize(
    ("name", "params", "mmacs", "kib"),
    [("resnet32", 466_906, 69.12, 2428), ("resnet110", 1_730_714, 253.15, 8253)],
)
def test_network_end_to_end_has_the_published_cost(
    name: str, params: int, mmacs: float, kib: int
) -> None:
    (whole,) = costs(name, 1)
    assert whole.params == params
    assert whole.macs / 1e6 == pytest.approx(mmacs, abs=0.005)
    assert whole.activation_bytes_per_sample / KIB == pytest.approx(kib, rel=0.05)
    assert (whole.aux_params, whole.aux_macs, whole.context_params, whole.context_macs) == (
        0,
        0,
        0,
        0,
    )


@pytest.mark.parametrize("per_stage", [1, 5])
def test_multiplications_are_those_of_all_convolutions_and_the_linear_layer(per_stage: int) -> None:
    def stage(inputs: int, outputs: int, side: int) -> int:
        convolutions = inputs + (2 * per_stage - 1) * outputs
        shortcut = inputs * outputs if inputs != outputs else 0
        return side * side * (9 * convolutions * outputs + shortcut)

    expected = (
        1024 * 9 * 3 * 16 + stage(16, 16, 32) + stage(16, 32, 16) + stage(32, 64, 8) + 64 * 10
    )
    for stages in (1, 3):
        assert sum(cost.macs for cost in costs(f"resnet{6 * per_stage + 2}", stages)) == expected


@pytest.mark.parametrize(
    ("stages", "kib", "aux_params"),
    [(2, 1741, None), (4, 973, None), (8, 641, 180_102), (16, 385, 388_374)],
)
def test_convolutional_head_has_the_published_cost(
    stages: int, kib: int, aux_params: int | None
) -> None:
    found = costs("resnet32", stages, "1c2f")
    assert max(cost.activation_bytes_per_sample for cost in found) / KIB == pytest.approx(
        kib, rel=0.05
    )
    assert sum(cost.params for cost in found) == 466_906
    assert sum(cost.macs for cost in found) / 1e6 == pytest.approx(69.12, abs=0.005)
    assert found[-1].aux_params == found[-1].aux_macs == 0
    if aux_params is not None:
        assert sum(cost.aux_params for cost in found) == aux_params


@pytest.mark.parametrize(("stages", "aux_params"), [(8, 400_230), (16, 838_294)])
def test_pooled_head_has_the_published_parameters(stages: int, aux_params: int) -> None:
    assert sum(cost.aux_params for cost in costs("resnet32", stages, "mlp")) == aux_params


def test_cost_of_a_sample_does_not_depend_on_the_batch() -> None:
    small, large = (
        count_costs(resnet(), plan_stages(resnet(), 2, "equal", batch), settings())
        for batch in (4, 512)
    )
    assert small == large


# --- The CIFAR ResNets


class Plain(nn.Module):
    """The same network put together from torchvision's own blocks."""

    def __init__(self, per_stage: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        inputs = 16
        for stage, width in enumerate((16, 32, 64), start=1):
            blocks: list[nn.Module] = []
            for index in range(per_stage):
                stride, shortcut = 1, None
                if index == 0 and stage > 1:
                    stride = 2
                    shortcut = nn.Sequential(
                        nn.Conv2d(inputs, width, 1, 2, bias=False), nn.BatchNorm2d(width)
                    )
                blocks.append(BasicBlock(inputs, width, stride, shortcut))
                inputs = width
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3):
            x = getattr(self, f"layer{stage}")(x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def through(stages: list[Stage], images: Tensor) -> Tensor:
    """Return the logits of a chain of stages."""
    header = Header(Kind.TEST, 1, 1, len(images))
    fields = {"image": images, "target": torch.zeros(len(images), dtype=torch.int64)}
    for stage in stages:
        message = Message(header, fields)
        h = stage.forward(message)
        fields = dict(stage.outgoing(message, h))
    logits = stages[-1].objective.exit(h)
    assert logits is not None
    return logits


def test_stages_in_a_row_compute_what_torchvisions_blocks_compute() -> None:
    stages = stages_of(resnet("resnet14"), 3)
    plain = Plain(2)
    plain.load_state_dict(backbone(weights_of(stages)))
    plain.eval()
    images = torch.randint(0, 256, (4, *IMAGE)).to(torch.uint8)
    with torch.no_grad():
        expected = plain((images.float() / 255 - 0.5) / 0.25)
    assert torch.allclose(through(stages, images), expected, atol=1e-4)


def test_parameter_names_are_torchvisions() -> None:
    with torch.device("meta"):
        known = torchvision.models.resnet18().state_dict()
    # Two blocks a stage, like resnet14's, but one stage more.
    expected = {name for name in known if not name.startswith("layer4.")}
    assert backbone(weights_of(stages_of(resnet("resnet14"), 4))).keys() == expected


@pytest.mark.parametrize(
    ("stages", "cuts"), [(1, "equal"), (2, "equal"), (4, "equal"), (3, "layerwise"), (2, (0,))]
)
def test_names_and_initial_weights_do_not_depend_on_the_cut(
    stages: int, cuts: str | tuple[int, ...]
) -> None:
    whole = weights_of(stages_of(resnet(), 1))
    assert not any(name.startswith("aux.") for name in whole)
    assert equal(backbone(weights_of(stages_of(resnet(), stages, cuts))), whole)


def test_auxiliary_networks_lie_under_the_number_of_their_stage() -> None:
    names = [name for name in weights_of(stages_of(resnet(), 3)) if name.startswith("aux.")]
    assert {name.split(".")[1] for name in names} == {"0", "1"}


def test_convolutions_start_from_the_published_distribution() -> None:
    weights = weights_of(stages_of(resnet("resnet14"), 2, head="1c2f"))
    convolutions = {
        name: tensor
        for name, tensor in weights.items()
        if tensor.dim() == 4 and tensor.numel() > 2000
    }
    assert any(name.startswith("aux.") for name in convolutions)
    for name, tensor in convolutions.items():
        expected = math.sqrt(2 / (tensor.shape[2] * tensor.shape[3] * tensor.shape[0]))
        assert tensor.std().item() == pytest.approx(expected, rel=0.06), name
        assert abs(tensor.mean().item()) < expected / 10, name
    for name, tensor in weights.items():
        if "bn" in name and name.endswith((".weight", ".bias")):
            assert torch.equal(tensor, torch.full_like(tensor, float(name.endswith(".weight"))))


# --- Initial weights


def test_initial_weights_follow_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = weights_of(stages_of(resnet(), 2))
    torch.manual_seed(2)
    torch.rand(7)
    assert equal(weights_of(stages_of(resnet(), 2)), first)


def test_stage_built_alone_or_last_has_the_weights_it_has_in_a_row() -> None:
    plans = plan_stages(resnet(), 3, "equal", 4)
    backwards = [Stage(each, resnet(), settings()) for each in reversed(plans)]
    assert equal(weights_of(backwards[::-1]), weights_of(stages_of(resnet(), 3)))


def test_another_seed_gives_other_weights_everywhere() -> None:
    first, second = (weights_of(stages_of(resnet(), 2, seed=seed)) for seed in (0, 1))
    drawn = [name for name, tensor in first.items() if tensor.dim() > 1]
    assert len(drawn) > 10
    assert not any(torch.equal(first[name], second[name]) for name in drawn)


def test_units_of_the_same_shape_have_weights_of_their_own() -> None:
    weights = weights_of(stages_of(resnet("resnet20"), 4, (1, 2, 3)))
    assert not torch.equal(weights["layer1.0.conv1.weight"], weights["layer1.1.conv1.weight"])
    heads = [weights[f"aux.{stage}.head.convolutions.0.weight"] for stage in (1, 2)]
    assert heads[0].shape == heads[1].shape and not torch.equal(*heads)


def test_backbone_does_not_depend_on_the_head_beside_it() -> None:
    some, others = (
        backbone(weights_of(stages_of(resnet(), 3, head=head))) for head in ("mlp", "1c2f")
    )
    assert equal(some, others)


@pytest.mark.parametrize("name", ["resnet8", f"{__name__}:network"])
def test_building_leaves_the_callers_generator_alone(name: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    stages_of(resnet() if name == "resnet8" else build_user_network("network"), 2)
    assert torch.equal(torch.get_rng_state(), before)


# --- A network of one's own


def network(num_classes: int, width: int = 4) -> nn.Sequential:
    def block(inputs: int) -> nn.Sequential:
        conv = nn.Conv2d(inputs, width, 3, padding=1)
        return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())

    net = nn.Sequential()
    net.add_module("stem", block(3))
    net.add_module("middle", block(width))
    net.add_module("end", block(width))
    net.add_module(
        "classifier",
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes)),
    )
    return net


def flat(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(3 * 8 * 8, 10))


def shares() -> nn.Sequential:
    first, second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
    second.weight = first.weight
    return flat(first, nn.ReLU(), second)


def shares_within_a_block() -> nn.Sequential:
    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1))
    block[1].weight = block[0].weight
    return flat(block)


def reuses() -> nn.Sequential:
    relu = nn.ReLU()
    return flat(nn.Conv2d(3, 3, 3, padding=1), relu, nn.Conv2d(3, 3, 3, padding=1), relu)


def no_network() -> list[nn.Module]:
    return [nn.Linear(2, 2)]


def seven() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 7))


def one_child() -> nn.Sequential:
    return nn.Sequential(seven())


def wrong_images() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(5, 10))


def needs(depth: int) -> nn.Sequential:
    return seven()


class Refuses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError(f"no images of {tuple(x.shape)}")


def refuses() -> nn.Sequential:
    return nn.Sequential(Refuses(), nn.Linear(1, 10))


def tokens() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 192), nn.Linear(192, 10))


NOT_CALLABLE = 3


def build_user_network(function: str, **args: Any) -> Blueprint:
    return user_blueprint(f"{__name__}:{function}", (3, 8, 8), 10, args)


def refusal(name: str, **args: Any) -> str:
    """Return the one line with which a network is refused."""
    with pytest.raises(UserError) as caught:
        user_blueprint(name, (3, 8, 8), 10, args)
    text = str(caught.value)
    assert text.startswith("model: ") and "\n" not in text
    return text


def test_children_are_the_blocks_and_the_last_one_is_the_head() -> None:
    blueprint = build_user_network("network")
    assert [block.name for block in blueprint.blocks] == ["stem", "middle", "end"]
    assert blueprint.tail.name == "classifier"
    assert blueprint.shapes() == [(4, 8, 8)] * 3


def test_function_gets_its_arguments_and_the_number_of_classes() -> None:
    assert build_user_network("network", width=6).shapes() == [(6, 8, 8)] * 3
    weights = weights_of(stages_of(build_user_network("network", width=6), 2))
    assert weights["classifier.2.weight"].shape == (10, 6)
    assert "gives (2, 3) for 2 images; expected (2, 10)" in refusal(
        f"{__name__}:network", num_classes=3
    )


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_parts_that_stages_build_are_those_of_the_whole_network(stages: int) -> None:
    found = backbone(weights_of(stages_of(build_user_network("network"), stages)))
    assert found.keys() == network(10).state_dict().keys()
    assert equal(found, backbone(weights_of(stages_of(build_user_network("network"), 1))))
    plain = network(10)
    plain.load_state_dict(found)
    plain.eval()
    images = torch.randint(0, 256, (4, 3, 8, 8)).to(torch.uint8)
    with torch.no_grad():
        expected = plain((images.float() / 255 - 0.5) / 0.25)
    assert torch.allclose(
        through(stages_of(build_user_network("network"), stages), images), expected, atol=1e-5
    )


def test_another_seed_gives_another_whole_network() -> None:
    first, second = (
        weights_of(stages_of(build_user_network("network"), 2, seed=seed)) for seed in (0, 1)
    )
    assert not torch.equal(first["stem.0.weight"], second["stem.0.weight"])


def test_parameter_shared_between_blocks_is_refused_with_both_names() -> None:
    assert "children 0 and 2 of" in refusal(f"{__name__}:shares")


def test_parameter_shared_within_a_block_is_fine() -> None:
    assert len(build_user_network("shares_within_a_block").blocks) == 2


def test_module_used_twice_is_refused_or_runs_twice() -> None:
    try:
        blueprint = build_user_network("reuses")
    except UserError:
        return
    parts = blueprint.build(range(len(blueprint.parts)), 0)
    assert [type(part) for part in parts] == [type(child) for child in reuses()]


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ("no_network", "returned list; expected an nn.Module"),
        ("one_child", "has 1 children; expected at least one block and a head"),
        ("seven", "gives (2, 7) for 2 images; expected (2, 10)"),
        ("wrong_images", "does not take images of shape (3, 8, 8)"),
        (
            "needs",
            "cannot be called: TypeError: "
            "needs() missing 1 required positional argument: 'depth'; see model.args",
        ),
        ("nothing", "has no function 'nothing'; expected package.module:function"),
        ("NOT_CALLABLE", "has no function 'NOT_CALLABLE'"),
    ],
)
def test_network_that_cannot_be_cut_is_refused(function: str, text: str) -> None:
    assert text in refusal(f"{__name__}:{function}")


def test_argument_that_the_function_does_not_take_is_refused() -> None:
    assert "cannot be called" in refusal(f"{__name__}:network", depth=3)


@pytest.mark.parametrize(
    "name", ["no_such_module:f", "no_such_package.module:f", "torch.no_such_module:f"]
)
def test_module_that_cannot_be_imported_is_refused(name: str) -> None:
    assert f"cannot import {name.split(':')[0]} of model.name {name}" in refusal(name)


@pytest.mark.parametrize(
    ("name", "content"),
    [(":f", ""), (".x:f", ""), ("broken:f", "def f(:\n"), ("dict:dict", "dict = dict\n")],
)
def test_module_that_cannot_even_be_read_is_refused(
    name: str, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = name.partition(":")[0]
    if module:
        (tmp_path / f"{module.strip('.')}.py").write_text(content)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    refusal(name)


def test_network_whose_forward_raises_anything_is_refused() -> None:
    assert "does not take images" in refusal(f"{__name__}:refuses")


# --- Both


def test_network_that_a_name_gives_is_built_anew_every_time() -> None:
    first, second = (resnet().build([0], 0)[0] for _ in range(2))
    assert first is not second and equal(first.state_dict(), second.state_dict())
    with torch.no_grad():
        next(first.parameters()).zero_()
    assert not equal(first.state_dict(), second.state_dict())


def test_head_without_a_rule_for_a_shape_is_refused_by_its_stage() -> None:
    with pytest.raises(
        UserError, match=r"head 1c2f has no rule for stage 0's output of shape \(192,\)"
    ):
        stages_of(build_user_network("tokens"), 2, head="1c2f")

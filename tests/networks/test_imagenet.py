"""The networks of ImageNet against torchvision, and the costs of the auxiliary networks on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from localpipe import config as configs
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.methods.auglocal import AugLocal, Exit, nominal_depth, select_blocks
from localpipe.methods.infopro import InfoPro, LargeDecoder, LargeHead
from localpipe.networks.blueprint import Blueprint
from localpipe.networks.resnet_imagenet import SHAPES, resnet_imagenet_blueprint
from localpipe.pipeline.stages.stage import Stage
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.plan.costs import BATCH, StageCost, _macs_of, count_costs
from tests import harness
from tests.harness import digests, settings, train_here

LARGE = (3, 224, 224)


def network(name: str, image: tuple[int, int, int] = LARGE, classes: int = 1000) -> Blueprint:
    return resnet_imagenet_blueprint(name, image, classes)


def resolved(
    name: str, objective: dict[str, Any], cuts: Any, stages: int | None = None
) -> Resolved:
    """Return the configuration of a plan at 224x224 and 1,000 classes, with published defaults."""
    parsed = configs.parse({"method": {"objective": objective}}, "test")
    cls, options = parsed.objective
    count = stages or len(cuts) + 1
    decided = cls.resolved(
        options, name, "imagenet", tuple(cuts) if stages is None else cuts, count
    )
    return harness.resolved(
        {
            "model": {"name": name, "num_classes": 1000},
            "method": {"objective": {"name": objective["name"], **vars(decided)}},
            "pipeline": {"stages": count, "cuts": cuts},
            "data": {"name": "synthetic", "image_size": 224, "mean": [0.5] * 3, "std": [0.2] * 3},
        },
        (3, 224, 224),
    )


def costs(config: Resolved) -> list[StageCost]:
    return count_costs(*build_plans(config), config)


def total(found: list[StageCost], what: str) -> int:
    return sum(getattr(cost, what) for cost in found)


# --- The networks


def meta_state(name: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        return getattr(torchvision.models, name)().state_dict()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", SHAPES)
def test_names_and_shapes_of_all_weights_are_torchvisions(name: str) -> None:
    blueprint = network(name)
    own = {
        part.prefix + key: tensor.shape
        for part, module in zip(
            blueprint.parts, blueprint.build_meta(range(len(blueprint.parts))), strict=True
        )
        for key, tensor in module.state_dict().items()
    }
    assert own == {key: tensor.shape for key, tensor in meta_state(name).items()}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvisions_weights_fit_and_give_its_logits(name: str) -> None:
    torch.manual_seed(0)
    reference = getattr(torchvision.models, name)(num_classes=7).eval()
    blueprint = network(name, (3, 64, 64), 7)
    parts = nn.Sequential(*blueprint.build(range(len(blueprint.parts)), 0)).eval()
    state = reference.state_dict()
    for part, module in zip(blueprint.parts, parts, strict=True):
        module.load_state_dict({key: state[part.prefix + key] for key in module.state_dict()})
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(parts(images), reference(images))


def test_a_block_has_the_weights_of_its_seed_and_name_and_starts_as_torchvisions_does() -> None:
    (alone,) = network("resnet18").build([4], 3)
    among = network("resnet18").build([1, 4, 5], 3)[1]
    other = network("resnet18").build([4], 4)[0]
    weights, same, differs = (block.state_dict()["conv2.weight"] for block in (alone, among, other))
    assert torch.equal(weights, same) and not torch.equal(weights, differs)
    reference = torchvision.models.resnet18().state_dict()["layer2.1.conv2.weight"]
    assert weights.shape == reference.shape and float(weights.std()) == pytest.approx(
        float(reference.std()), rel=0.01
    )


@pytest.mark.parametrize(
    ("name", "blocks"), [("resnet34", 17), ("resnet101", 34), ("resnext101_32x8d", 34)]
)
def test_the_stem_is_one_block_and_so_is_every_residual_block(name: str, blocks: int) -> None:
    blueprint = network(name)
    assert len(blueprint.blocks) == blocks
    assert blueprint.shapes()[0] == (64, 56, 56) and blueprint.shapes()[-1][1:] == (7, 7)


# --- InfoPro


@pytest.mark.parametrize(
    ("name", "cut", "residual_blocks", "overhead", "weights"),
    [
        ("resnet101", 4, (4, 29), 5.73, (5, 0.75)),
        ("resnet152", 9, (9, 41), 3.88, (5, 1.0)),
        ("resnext101_32x8d", 6, (6, 27), 2.72, (5, 0.75)),
    ],
)
def test_infopro_costs_what_was_published(
    name: str,
    cut: int,
    residual_blocks: tuple[int, int],
    overhead: float,
    weights: tuple[float, float],
) -> None:
    config = resolved(name, {"name": "infopro"}, [cut])
    blueprint, plans = build_plans(config)
    assert plans[0].output_shape == (512, 28, 28)
    assert (len(plans[0].blocks) - 1, len(plans[1].blocks)) == residual_blocks
    first = Stage(plans[0], blueprint, config, "meta").objective
    assert isinstance(first, InfoPro) and (first.image_weight, first.task_weight) == weights
    found = count_costs(blueprint, plans, config)
    assert 100 * total(found, "aux_macs") / total(found, "macs") == pytest.approx(
        overhead, abs=0.005
    )


def test_infopros_decoder_and_head_for_imagenet_have_the_published_products() -> None:
    def mmacs(module: nn.Module) -> float:
        return _macs_of(lambda: module(torch.empty(BATCH, 512, 28, 28, device="meta"))) / 1e6

    with torch.device("meta"):
        decoder, head = LargeDecoder((512, 28, 28), LARGE), LargeHead(512, 1000)
    assert (mmacs(decoder), mmacs(head)) == pytest.approx((226.6, 220.4), abs=0.05)


@pytest.mark.parametrize("side", [7, 14, 28, 56, 112, 224])
def test_infopros_decoder_for_imagenet_ends_at_the_image_and_never_goes_beyond(side: int) -> None:
    decoder = LargeDecoder((4, side, side), LARGE)
    upsamplings = [layer for layer in decoder.layers if isinstance(layer, nn.Upsample)]
    sides = [layer.size[0] for layer in upsamplings]  # type: ignore[index]
    assert sides == [min(2 * side, 224), min(4 * side, 224), 224]
    with torch.device("meta"):
        meta = LargeDecoder((4, side, side), LARGE)
    assert meta(torch.empty(2, 4, side, side, device="meta")).shape == (2, *LARGE)


# --- AugLocal: what it imitates, as (block, width, stride)

R34 = {
    0: [(4, 128, 2), (8, 256, 2), (12, 256, 1), (16, 512, 2)],
    1: [(5, 128, 2), (8, 256, 2), (12, 256, 1), (16, 512, 2)],
    2: [(6, 128, 2), (9, 256, 2), (12, 256, 1), (16, 512, 2)],
    3: [(6, 128, 2), (10, 256, 2), (13, 256, 1), (16, 512, 2)],
    4: [(7, 128, 1), (10, 256, 2), (13, 256, 1), (16, 512, 2)],
    5: [(8, 256, 2), (10, 256, 1), (13, 256, 1), (16, 512, 2)],
    6: [(8, 256, 2), (11, 256, 1), (14, 512, 2), (16, 512, 1)],
    7: [(9, 256, 2), (12, 256, 1), (14, 512, 2), (16, 512, 1)],
    8: [(10, 256, 1), (12, 256, 1), (14, 512, 2), (16, 512, 1)],
    9: [(11, 256, 1), (12, 256, 1), (14, 512, 2), (16, 512, 1)],
    10: [(12, 256, 1), (13, 256, 1), (14, 512, 2), (16, 512, 1)],
    11: [(12, 256, 1), (14, 512, 2), (15, 512, 1), (16, 512, 1)],
    12: [(13, 256, 1), (14, 512, 2), (15, 512, 1), (16, 512, 1)],
    13: [(14, 512, 2), (15, 512, 1), (16, 512, 1)],
    14: [(15, 512, 1), (16, 512, 1)],
    15: [(16, 512, 1)],
}
R101 = {
    0: [(8, 256, 2), (16, 256, 2), (25, 256, 1), (33, 512, 2)],
    7: [(14, 256, 2), (20, 256, 1), (26, 256, 1), (33, 512, 2)],
    30: [(31, 512, 2), (32, 512, 1), (33, 512, 1)],
    32: [(33, 512, 1)],
}


@pytest.mark.parametrize(("name", "table"), [("resnet34", R34), ("resnet101", R101)])
def test_auglocal_imitates_the_published_blocks(
    name: str, table: dict[int, list[tuple[int, int, int]]]
) -> None:
    blueprint = network(name)
    blocks = len(blueprint.blocks)
    config = resolved(name, {"name": "auglocal", "aux_depth": 4}, "layerwise", blocks)
    assert config.method.objective["pyramid"] == 0
    _, plans = build_plans(config)
    for last, expected in table.items():
        chosen = select_blocks(
            last, blocks, nominal_depth(AugLocal.Options(4, pyramid=0.0), last, blocks)
        )
        assert chosen == [index for index, *_ in expected]
        objective = Stage(plans[last], blueprint, config, "meta").objective
        assert isinstance(objective, AugLocal)
        imitations: list[Any] = [*objective.network]
        leave = imitations.pop()
        built = [(block.conv1.out_channels, stride_of(block)) for block in imitations]
        assert built == [(width, stride) for _, width, stride in expected]
        kind = SHAPES[name].block
        assert all(type(block) is kind for block in imitations)
        assert isinstance(leave, Exit) and isinstance(leave.norm, nn.Identity)
        assert imitations[0].conv1.in_channels == plans[last].output_shape[0]
        assert leave.fc.in_features == 512 * kind.expansion


@pytest.mark.parametrize(("name", "normalised"), [("resnet34", False), ("resnet32", True)])
def test_auglocal_of_depth_1_normalises_no_features_on_imagenets_networks(
    name: str, normalised: bool
) -> None:
    config = resolved(name, {"name": "auglocal", "aux_depth": 1}, "equal", 3)
    blueprint, plans = build_plans(config)
    objective = Stage(plans[0], blueprint, config, "meta").objective
    assert isinstance(objective, AugLocal)
    assert isinstance(objective.network[-1].norm, nn.BatchNorm1d) is normalised


def stride_of(block: nn.Module) -> int:
    return max(layer.stride[0] for layer in block.children() if isinstance(layer, nn.Conv2d))


@pytest.mark.parametrize(("name", "params"), [("resnet34", 154e6), ("resnet101", 407e6)])
def test_auglocal_has_the_published_auxiliary_parameters(name: str, params: float) -> None:
    blocks = len(network(name).blocks)
    config = resolved(name, {"name": "auglocal", "aux_depth": 4}, "layerwise", blocks)
    blueprint, plans = build_plans(config)
    auxiliary = [
        p.numel() for plan in plans for p in Stage(plan, blueprint, config, "meta").auxiliary()
    ]
    assert sum(auxiliary) == pytest.approx(params, rel=0.005)


def test_auglocal_costs_what_was_published() -> None:
    found = costs(resolved("resnet34", {"name": "auglocal", "aux_depth": 4}, "layerwise", 17))
    assert total(found, "macs") / 1e9 == pytest.approx(3.66, abs=0.005)
    assert total(found, "aux_macs") / total(found, "macs") == pytest.approx(3.30, abs=0.005)


def test_auglocal_imitates_grouped_convolutions_as_they_are() -> None:
    block = network("resnext101_32x8d").rebuild
    assert block is not None
    with torch.device("meta"):
        conv = block(64, 256, 2).conv2
    assert isinstance(conv, nn.Conv2d) and (conv.groups, conv.out_channels, conv.stride) == (
        32,
        1024,
        (2, 2),
    )


# --- Everything runs on them


TINY: dict[str, dict[str, Any]] = {
    "pipeline": {"stages": None, "cuts": [1, 3, 6]},
    "data": {"samples": 8, "image_size": 32, "batch_size": 4, "augment": "resized_crop_flip"},
    "optim": {"epochs": 1, "max_steps": 2},
}


@pytest.mark.parametrize(
    "method",
    [
        {"objective": "greedy", "context": "R1"},
        {"objective": "dgl", "context": "R1E", "reconcile": "cosine"},
        {"objective": "predsim", "context": "E"},
        {"objective": "infopro"},
        {"objective": {"name": "auglocal", "aux_depth": 1}, "reconcile": "cosine"},
    ],
    ids=lambda method: str(method["objective"]),
)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_every_method_trains_to_finite_weights(
    name: str, method: dict[str, Any], tmp_path: Path
) -> None:
    if name == "resnet50" and method["objective"] != "infopro":
        method = (
            {"objective": {"name": "auglocal", "aux_depth": 1}}
            if "aux" in str(method)
            else {"objective": "greedy"}
        )
    stages = train_here(settings(tmp_path, model={"name": name}, method=method, **TINY))
    for stage in stages:
        stage.check_finite()
    assert len(stages) == 4


def test_any_number_of_processes_gives_the_weights_of_one(tmp_path: Path) -> None:
    method = {"objective": {"name": "auglocal", "aux_depth": 1}, "context": "E"}
    found = []
    for processes in (1, 2):
        config = settings(
            tmp_path / str(processes), model={"name": "resnet18"}, method=method, **TINY
        )
        found += digests([config], processes, tmp_path / f"work-{processes}")
    assert found[0] == found[1]


def test_a_name_that_is_nearly_one_is_told_the_one() -> None:
    with pytest.raises(UserError, match="did you mean resnet101?"):
        configs.parse({"model": {"name": "resnet1001"}}, "test")

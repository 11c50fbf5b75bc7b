"""Cuts, checked against the published tables, and which tensors cross them."""

from __future__ import annotations

import dataclasses

import pytest

from localpipe.errors import UserError
from localpipe.fields import Field, Schema
from localpipe.networks.blueprint import Blueprint
from localpipe.networks.cuts import cut_blocks, split_evenly, split_layerwise
from localpipe.networks.resnet_cifar import resnet_cifar_blueprint
from localpipe.pipeline.stages.stage_plan import StagePlan, plan_stages

# Units per module of the published equal cuts (InfoPro and ContSup, released code). The stem is
# a unit.
PUBLISHED = {
    (16, 2): [8, 8],
    (16, 3): [6, 5, 5],
    (16, 4): [4, 4, 4, 4],
    (16, 8): [2] * 8,
    (16, 16): [1] * 16,
    (55, 2): [28, 27],
    (55, 3): [19, 18, 18],
    (55, 4): [13, 14, 14, 14],
    (55, 8): [6] + [7] * 7,
    (55, 16): [3] * 9 + [4] * 7,
}


def bounds(sizes: list[int]) -> list[tuple[int, int]]:
    """Return (first, last) of consecutive stages of these sizes."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [(end - size, end - 1) for size, end in zip(sizes, ends, strict=True)]


def network(name: str = "resnet8") -> Blueprint:
    return resnet_cifar_blueprint(name, (3, 32, 32), 10)


def sizes(plans: tuple[StagePlan, ...]) -> list[int]:
    return [len(stage.blocks) for stage in plans]


# --- Cuts


@pytest.mark.parametrize(("blocks", "stages"), PUBLISHED)
def test_equal_cut_is_the_published_one(blocks: int, stages: int) -> None:
    assert cut_blocks(blocks, stages, "equal") == bounds(PUBLISHED[blocks, stages])


def test_equal_cut_covers_every_block_once_with_sizes_that_differ_by_at_most_one() -> None:
    for blocks in range(1, 40):
        for stages in range(1, blocks + 1):
            found = split_evenly(blocks, stages)
            lengths = [last - first + 1 for first, last in found]
            assert [i for first, last in found for i in range(first, last + 1)] == list(
                range(blocks)
            )
            assert len(found) == stages and max(lengths) - min(lengths) <= 1


def test_longer_stages_come_first_up_to_three_stages_and_last_beyond() -> None:
    assert split_evenly(8, 3) == bounds([3, 3, 2])
    assert split_evenly(9, 4) == bounds([2, 2, 2, 3])
    assert split_evenly(7, 1) == [(0, 6)]


def test_layerwise_cut_is_one_block_a_stage_and_the_rest_in_the_last() -> None:
    assert split_layerwise(16, 14) == bounds([1] * 13 + [3])
    assert cut_blocks(16, 14, "layerwise") == bounds([1] * 13 + [3])
    assert split_layerwise(5, 5) == bounds([1] * 5) and split_layerwise(5, 1) == [(0, 4)]


def test_explicit_cut_names_the_last_block_of_every_stage_but_the_last() -> None:
    assert cut_blocks(16, 4, (3, 7, 10)) == [(0, 3), (4, 7), (8, 10), (11, 15)]
    assert cut_blocks(16, 2, (0,)) == [(0, 0), (1, 15)]
    assert cut_blocks(16, 2, (14,)) == [(0, 14), (15, 15)]
    assert cut_blocks(16, 1, ()) == [(0, 15)]


@pytest.mark.parametrize("cuts", ["equal", "layerwise"])
def test_more_stages_than_blocks_are_refused_with_the_most_there_can_be(cuts: str) -> None:
    with pytest.raises(
        UserError, match="cannot cut 16 blocks into 18 stages; set pipeline.stages to at most 16"
    ):
        cut_blocks(16, 18, cuts)


@pytest.mark.parametrize("end", [15, 16, 99])
def test_cut_at_or_beyond_the_end_is_refused(end: int) -> None:
    with pytest.raises(
        UserError, match=f"after block {end}, but the last of 16 blocks is 15.*at block 14"
    ) as caught:
        cut_blocks(16, 3, (3, end))
    assert "\n" not in str(caught.value)


# --- Plans


@pytest.mark.parametrize(("name", "blocks"), [("resnet32", 16), ("resnet110", 55)])
def test_plan_of_a_published_network_has_the_published_modules(name: str, blocks: int) -> None:
    for stages in (2, 3, 4, 8, 16):
        plans = plan_stages(network(name), stages, "equal", 8)
        assert sizes(plans) == PUBLISHED[blocks, stages]
        assert [(stage.first, stage.last) for stage in plans] == bounds(PUBLISHED[blocks, stages])


def test_resnet_32_in_four_stages_has_four_blocks_in_each() -> None:
    plans = plan_stages(network("resnet32"), 4, "equal", 8)
    assert [stage.blocks for stage in plans] == [
        ("stem", "layer1.0", "layer1.1", "layer1.2"),
        ("layer1.3", "layer1.4", "layer2.0", "layer2.1"),
        ("layer2.2", "layer2.3", "layer2.4", "layer3.0"),
        ("layer3.1", "layer3.2", "layer3.3", "layer3.4"),
    ]
    shapes = [(16, 32, 32), (32, 16, 16), (64, 8, 8), (64, 8, 8)]
    assert [stage.output_shape for stage in plans] == shapes
    assert [stage.sends.fields[0].shape for stage in plans if stage.sends is not None] == shapes[
        :-1
    ]


def test_balanced_published_cut_can_be_given_explicitly() -> None:
    assert sizes(plan_stages(network("resnet32"), 8, (2, 3, 4, 7, 8, 12, 13), 8)) == [
        3,
        1,
        1,
        3,
        1,
        4,
        1,
        2,
    ]


def test_only_activation_and_target_cross_a_boundary() -> None:
    plans = plan_stages(network(), 4, "equal", 6)
    target = Field("target", (), "int64")
    assert plans[0].receives == Schema((Field("image", (3, 32, 32), "uint8"), target), 6)
    assert [stage.sends for stage in plans] == [
        Schema((Field("h.0", (16, 32, 32), "float32"), target), 6),
        Schema((Field("h.1", (16, 32, 32), "float32"), target), 6),
        Schema((Field("h.2", (32, 16, 16), "float32"), target), 6),
        None,
    ]


def test_a_stage_receives_what_the_one_before_it_sends() -> None:
    plans = plan_stages(network(), 3, "equal", 6)
    for before, stage in zip(plans, plans[1:], strict=False):
        assert stage.receives == before.sends
        assert stage.input_shape == before.output_shape
        assert stage.input == f"h.{before.stage}"
        assert stage.first == before.last + 1
    assert plans[0].input == "image" and plans[0].input_shape == (3, 32, 32)
    assert plans[-1].output_shape == (64, 8, 8) and plans[-1].last == 3


def test_shapes_follow_the_image() -> None:
    blueprint = resnet_cifar_blueprint("resnet8", (1, 24, 16), 10)
    assert [stage.output_shape for stage in plan_stages(blueprint, 4, "equal", 2)] == [
        (16, 24, 16),
        (16, 24, 16),
        (32, 12, 8),
        (64, 6, 4),
    ]


def test_first_and_last_are_told() -> None:
    plans = plan_stages(network(), 3, "equal", 6)
    assert [stage.is_first for stage in plans] == [True, False, False]
    assert [stage.is_last for stage in plans] == [False, False, True]


def test_one_stage_is_first_and_last_and_sends_nothing() -> None:
    (only,) = plan_stages(network(), 1, "equal", 6)
    assert only.is_first and only.is_last and only.sends is None
    assert only.blocks == ("stem", "layer1.0", "layer2.0", "layer3.0")


def test_a_plan_is_frozen_data_that_depends_on_its_arguments_alone() -> None:
    assert plan_stages(network(), 2, "equal", 6) == plan_stages(network(), 2, (1,), 6)
    assert plan_stages(network(), 2, "equal", 6) != plan_stages(network(), 2, "equal", 7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan_stages(network(), 2, "equal", 6)[0].first = 1  # type: ignore[misc]


def test_a_list_of_too_many_cuts_is_to_be_shortened() -> None:
    """pipeline.stages follows from the list, so it is not what to change."""
    with pytest.raises(UserError, match="; end every stage but the last at block 14 or before"):
        cut_blocks(16, 18, tuple(range(17)))
    assert len(cut_blocks(16, 16, tuple(range(15)))) == 16
    with pytest.raises(UserError, match="; leave pipeline.cuts out, and set pipeline.stages=1"):
        cut_blocks(1, 2, (0,))
    assert cut_blocks(1, 1, "equal") == [(0, 0)]


def test_plan_refuses_more_stages_than_the_network_has_blocks() -> None:
    with pytest.raises(UserError, match="cannot cut 4 blocks into 5 stages"):
        plan_stages(network(), 5, "equal", 6)

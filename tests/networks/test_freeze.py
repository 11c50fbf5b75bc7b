"""Names of model.freeze: which blocks they cover, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

from localpipe.errors import UserError
from localpipe.networks.blueprint import Blueprint
from localpipe.networks.freeze import find_frozen_blocks, freeze_blocks
from localpipe.networks.resnet_imagenet import resnet_imagenet_blueprint
from localpipe.networks.user_network import user_blueprint


def resnet18() -> Blueprint:
    return resnet_imagenet_blueprint("resnet18", (3, 32, 32), 10)


def names(blueprint: Blueprint, *given: str) -> list[str]:
    return [blueprint.blocks[index].name for index in sorted(find_frozen_blocks(blueprint, given))]


def test_a_name_covers_a_block_and_a_prefix_covers_all_below() -> None:
    blueprint = resnet18()
    assert names(blueprint) == []
    assert names(blueprint, "stem") == ["stem"]
    assert names(blueprint, "layer2.1") == ["layer2.1"]
    assert names(blueprint, "layer4", "stem") == ["stem", "layer4.0", "layer4.1"]
    assert names(blueprint, "layer1", "layer1.0") == ["layer1.0", "layer1.1"]


def test_a_prefix_of_names_covers_no_longer_word() -> None:
    """`blocks.1` is not the beginning of `blocks.11`."""
    network = user_blueprint("tests.sample_networks:small", (3, 8, 8), 10, {})
    blocks = [replace(block, name=f"blocks.{11 * i}") for i, block in enumerate(network.blocks)]
    named = replace(network, blocks=tuple(blocks))
    assert names(named, "blocks.11") == ["blocks.11"]
    with pytest.raises(UserError, match="has no block 'blocks.1' for model.freeze; did you mean"):
        names(named, "blocks.1")


def test_a_prefix_of_parameters_covers_the_blocks_that_it_holds_whole() -> None:
    """A block may have another name than its parameters."""
    network = user_blueprint("tests.sample_networks:small", (3, 8, 8), 10, {})
    blocks = [replace(block, name=f"part{i}") for i, block in enumerate(network.blocks)]
    named = replace(network, blocks=tuple(blocks))
    assert names(named, "2", "part3") == ["part2", "part3"]
    with pytest.raises(UserError, match="freeze 2.1 is a part of block part2 of .*; give part2"):
        names(named, "2.1")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("conv1", "freeze conv1 is a part of block stem of resnet18; .*; give stem"),
        ("layer1.0.conv1", "is a part of block layer1.0 "),
        ("fc", "is of the head of resnet18, which is always trained"),
        ("head", "is of the head of resnet18, which is always trained"),
        ("layre1", "has no block 'layre1' for model.freeze; did you mean layer1"),
        ("", "has no block '' for model.freeze; choose one of layer1, layer1.0"),
    ],
)
def test_other_names_are_refused(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        names(resnet18(), name)


def test_a_parameter_that_a_trained_part_shares_cannot_be_frozen() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    with pytest.raises(UserError, match="block first is frozen and shares weight with a part"):
        freeze_blocks({"first": first}, [second])

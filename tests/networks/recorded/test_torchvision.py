"""Networks of torchvision at the smallest sizes, without their weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision

from localpipe.networks.recorded.recording import record
from tests.networks.recorded.equality import compose, images

# The name, the size of an image, the number of blocks, the last one's name, its layout and order.
CASES = [
    ("resnet18", 32, 9, "layer4.1", "chw", ()),
    ("mobilenet_v3_small", 32, 13, "features.12", "chw", ()),
    ("swin_t", 32, 16, "features.7.1", "hwc", ()),
    ("convnext_tiny", 32, 22, "features.7.2", "chw", ()),
    ("densenet121", 32, 8, "features.denseblock4", "chw", ()),
    ("googlenet", 32, 12, "inception5b", "chw", ()),
    ("vit_b_16", 32, 13, "encoder.layers.encoder_layer_11", "td", ()),
]


@pytest.mark.parametrize(("name", "size", "blocks", "last", "layout", "order"), CASES)
def test_a_network_of_torchvision(
    name: str, size: int, blocks: int, last: str, layout: str, order: tuple[int, ...]
) -> None:
    options: dict[str, Any] = {}
    if name == "googlenet":
        options = {"init_weights": False}
    if name == "vit_b_16":
        options = {"image_size": size}
    with torch.device("meta"):
        recording = record(torchvision.models.get_model(name, **options), (3, size, size))
    assert len(recording.names) == blocks and recording.names[-1] == last
    assert recording.outputs[-1].layout == layout

    network = torchvision.models.get_model(name, **options)
    pieces = recording.pieces(network)
    names = [key for piece in pieces for key in piece.state_dict()]
    assert sorted(names) == sorted(network.state_dict())
    sample = images(3, size, size)(2)
    for is_training in (False, True):
        if is_training and name == "googlenet":
            continue  # its auxiliary classifiers draw random numbers, and they are dropped
        network.train(is_training)
        for piece in pieces:
            piece.train(is_training)
        with torch.no_grad():
            torch.manual_seed(0)
            expected = network(*sample)
            torch.manual_seed(0)
            assert torch.equal(compose(pieces)(*sample), expected)

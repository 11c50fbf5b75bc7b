"""PredSim's and DGL's plain networks, against published sizes and a network made by hand."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localpipe.errors import UserError
from localpipe.networks.blueprint import Blueprint
from localpipe.networks.cuts import cut_blocks
from localpipe.networks.papers.mlp import mlp_blueprint
from localpipe.networks.papers.simple_cnn import simple_cnn_blueprint
from localpipe.networks.papers.vgg_b import vgg_b_blueprint

CIFAR, STL, MNIST = (3, 32, 32), (3, 96, 96), (1, 28, 28)
# The layers in the words of the released code, M for a max-pooling.
LAYERS = {
    "vgg8b": "128 256 M 256 512 M 512 M 512 M",
    "vgg11b": "128 128 128 256 M 256 512 M 512 512 M 512 M",
}


def count(blueprint: Blueprint) -> int:
    parts = blueprint.build_meta(range(len(blueprint.parts)))
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


# (name, image, classes, width): parameters, and the published number of millions.
VGG_B = [
    ("vgg8b", CIFAR, 10, 1, 8_903_434, 8.9),
    ("vgg8b", CIFAR, 100, 1, 8_995_684, 9.0),
    ("vgg8b", STL, 10, 1, 11_540_234, 11.5),
    ("vgg8b", MNIST, 10, 1, 7_328_266, 7.3),
    ("vgg8b", MNIST, 10, 2, 28_209_162, 28.2),
    ("vgg11b", CIFAR, 10, 1, 11_559_946, 11.6),
    ("vgg11b", CIFAR, 100, 1, 11_652_196, 11.7),
    ("vgg11b", CIFAR, 10, 2, 41_980_938, 42.0),
    ("vgg11b", CIFAR, 10, 3, 91_276_298, 91.3),
    ("vgg11b", CIFAR, 100, 3, 91_368_548, 91.4),
]


@pytest.mark.parametrize(("name", "image", "classes", "width", "params", "millions"), VGG_B)
def test_vgg_b_has_the_published_size(
    name: str, image: tuple[int, int, int], classes: int, width: int, params: int, millions: float
) -> None:
    found = count(vgg_b_blueprint(name, image, classes, width=width))
    assert found == params and round(found / 1e6, 1) == millions


def test_the_sizes_of_the_other_networks_are_those_of_their_layers() -> None:
    # The hidden layers have a batch normalisation, two numbers a unit.
    hidden = 3072 * 3000 + 2 * 3000 * 3000 + 3 * 3 * 3000
    found = count(mlp_blueprint("mlp", CIFAR, 10, width=3000))
    assert found == hidden + 3000 * 10 + 10 == 27_273_010  # 27.3M in the table
    found = count(mlp_blueprint("mlp", MNIST, 10))
    assert found == 2_919_434  # 2.9M in the table

    # Biases and batch normalisation are three numbers a channel, and a unit.
    channels = [3, 128, 256, 256, 512, 512, 512]
    convolutions = sum(9 * one * other + 3 * other for one, other in pairwise(channels))
    head = 2 * (2048 * 2048 + 3 * 2048) + 2048 * 10 + 10
    found = count(simple_cnn_blueprint("simple_cnn", CIFAR, 10))
    assert found == convolutions + head == 15_214_346
    # The layers of the released log of the learning curves.
    learning_curves = simple_cnn_blueprint("simple_cnn", CIFAR, 10, depth=4, width=64)
    assert learning_curves.shapes() == [(64, 32, 32), (128, 16, 16), (128, 16, 16), (256, 8, 8)]
    assert count(learning_curves) == 2_633_098


@pytest.mark.parametrize("name", LAYERS)
def test_the_blocks_of_vgg_b_are_the_released_layers_by_number(name: str) -> None:
    blueprint = vgg_b_blueprint(name, (3, 16, 16), 10, slope=0.01)
    parts = blueprint.build_meta(range(len(blueprint.parts)))
    numbers, channels = [], []
    for block, part in zip(blueprint.blocks, parts, strict=False):
        for child, module in part.named_children():
            if isinstance(module, nn.Conv2d):
                numbers.append(f"{block.prefix}{child}")
                channels.append(module.out_channels)
            if isinstance(module, nn.LeakyReLU):
                assert module.negative_slope == 0.01
    words = LAYERS[name].split()
    wanted = [(f"features.{i}.encoder", int(word)) for i, word in enumerate(words) if word != "M"]
    assert list(zip(numbers, channels, strict=True)) == wanted
    names = {key for state in blueprint.state for key in state}
    assert {"classifier.layers.0.encoder.weight", "classifier.layer_out.weight"} <= names


def test_vgg8b_computes_what_a_network_made_by_hand_does() -> None:
    blueprint = vgg_b_blueprint("vgg8b", (3, 16, 16), 10, dropout=0.2, slope=0.01)
    parts: list[Any] = blueprint.build(range(len(blueprint.parts)), seed=0)
    for part in parts:
        part.eval()
    x = torch.randn(2, 3, 16, 16)
    found: list[Tensor] = []
    h = x
    for part in parts:
        h = part(h)
        found.append(h.clone())

    expected: list[Tensor] = []
    blocks = iter(parts)
    for word in LAYERS["vgg8b"].split():
        if word == "M":
            x = F.max_pool2d(x, 2)
        else:
            block = next(blocks)
            x = F.leaky_relu(block.bn(block.encoder(x)), 0.01)
            expected.append(x)
    hidden, _, output = blocks
    x = F.leaky_relu(hidden.bn(hidden.encoder(x.flatten(1))), 0.01)
    expected += [x, x, output.layer_out(x)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_local_losses_see_a_layer_before_its_dropout_and_its_pooling() -> None:
    blueprint = vgg_b_blueprint("vgg8b", (3, 16, 16), 10, dropout=0.2)
    children = [
        [child for child, _ in part.named_children()] for part in blueprint.build_meta(range(8))
    ]
    layer = ["encoder", "bn", "nonlin"]
    dropped, pooled = ["dropout", *layer], ["dropout", "pool", *layer]
    linear = ["dropout", "pool", "flatten", *layer]
    assert children == [layer, dropped, pooled, dropped, pooled, pooled, linear, []]

    # Of maps, whole channels are left out.
    second: Any
    second, last = blueprint.build([1, 7], seed=0)
    torch.manual_seed(0)
    places = second.dropout(torch.ones(4, 128, 3, 3)).flatten(2)
    assert torch.equal(places.amin(2), places.amax(2))
    assert 0.1 < (places[..., 0] == 0).float().mean() < 0.3
    assert isinstance(last, nn.Dropout) and last.p == 0.2


def test_a_layerwise_cut_leaves_the_output_layer_a_stage_of_its_own() -> None:
    for blueprint, stages in (
        (vgg_b_blueprint("vgg8b", CIFAR, 10), 8),
        (vgg_b_blueprint("vgg11b", CIFAR, 10), 11),
        (mlp_blueprint("mlp", CIFAR, 10), 4),
    ):
        bounds = cut_blocks(len(blueprint.blocks), stages, "layerwise")
        assert bounds == [(index, index) for index in range(stages)]
        assert not list(blueprint.build_meta([stages - 1])[0].parameters())


def test_large_images_have_a_first_convolution_that_halves_them() -> None:
    blueprint = vgg_b_blueprint("vgg8b", STL, 10)
    (first,) = [m for m in blueprint.build_meta([0])[0].modules() if isinstance(m, nn.Conv2d)]
    assert (first.kernel_size, first.stride, first.padding) == ((7, 7), (2, 2), (3, 3))
    assert blueprint.shapes()[0] == (128, 48, 48) and blueprint.shapes()[5] == (512, 6, 6)
    assert vgg_b_blueprint("vgg8b", (3, 64, 64), 10).shapes()[0] == (128, 64, 64)
    assert vgg_b_blueprint("vgg8b", (3, 95, 65), 10).shapes()[0] == (128, 48, 33)


def test_an_output_layer_begins_at_0_where_it_is_asked_to() -> None:
    for zero_start in (False, True):
        blueprint = mlp_blueprint("mlp", (1, 4, 4), 10, width=8, zero_start=zero_start)
        head: Any = blueprint.build([len(blueprint.blocks)], seed=0)[0]
        layer = head.layer_out
        assert layer.weight.eq(0).all() == zero_start and layer.bias.abs().min() > 0


def test_the_head_of_dgls_network_pools_to_2x2() -> None:
    blueprint = simple_cnn_blueprint("simple_cnn", (3, 40, 24), 10, depth=4, width=4)
    head: Any = blueprint.build([4], seed=0)[0].eval()
    h = torch.randn(2, *blueprint.shapes()[-1])
    pooled = F.adaptive_avg_pool2d(F.adaptive_avg_pool2d(h, (3, 2)), 2)
    assert torch.allclose(head(h), head.classifier(pooled.flatten(1)), atol=1e-6)


def test_images_that_are_pooled_away_are_refused() -> None:
    with pytest.raises(UserError, match=r"^model: vgg8b halves its images four times, which 15x16"):
        vgg_b_blueprint("vgg8b", (3, 15, 16), 10)
    with pytest.raises(UserError, match=r"^model: simple_cnn halves its images twice, which 3x8"):
        simple_cnn_blueprint("simple_cnn", (3, 3, 8), 10)

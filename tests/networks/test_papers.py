"""Networks of the papers beside the ResNets, against torchvision's and against published tables."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import vgg

from localpipe.methods.auglocal import build_network, select_blocks
from localpipe.networks.blueprint import Blueprint
from localpipe.networks.cuts import cut_blocks
from localpipe.networks.papers.densenet import densenet_blueprint
from localpipe.networks.papers.vgg import AuxiliaryExit, vgg_blueprint

IMAGE = (3, 224, 224)
LETTERS = {"vgg13_bn": "B", "vgg19_bn": "E"}


def count(blueprint: Blueprint) -> int:
    parts = blueprint.build_meta(range(len(blueprint.parts)))
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


@pytest.mark.parametrize(
    ("name", "blocks", "params"),
    [("vgg13_bn", 10, 133_053_736), ("vgg19_bn", 16, 143_678_248)],
)
def test_a_vgg_is_torchvisions_cut_after_every_convolution(
    name: str, blocks: int, params: int
) -> None:
    blueprint = vgg_blueprint(name, IMAGE, 1000)
    assert len(blueprint.blocks) == blocks and count(blueprint) == params
    with torch.device("meta"):
        published = getattr(vgg, name)()
    names: dict[str, tuple[int, ...]] = {}
    for state in blueprint.state:
        names.update({key: tuple(value.shape) for key, value in state.items()})
    assert names == {key: tuple(value.shape) for key, value in published.state_dict().items()}


@pytest.mark.parametrize("name", ["vgg13_bn", "vgg19_bn"])
def test_the_blocks_of_a_vgg_compute_torchvisions_features(name: str) -> None:
    blueprint = vgg_blueprint(name, (3, 32, 32), 10)
    blocks = nn.Sequential(*blueprint.build(range(len(blueprint.blocks)), seed=0)).eval()
    features = vgg.make_layers(vgg.cfgs[LETTERS[name]], batch_norm=True).eval()
    state = {}
    for block, part in zip(blocks, blueprint.blocks, strict=True):
        state.update({f"{part.prefix}{key}": value for key, value in block.state_dict().items()})
    features.load_state_dict({key.removeprefix("features."): state[key] for key in state})
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(nn.MaxPool2d(2)(blocks(x)), features(x))


# {layer: the imitated layers' widths, P for a max-pooling before one}, of VGG13 with d = 3.
AUGLOCAL = {
    0: ([3, 6, 9], "P128 P512 512"),
    1: ([4, 6, 9], "P256 P512 512"),
    4: ([6, 7, 9], "P512 512 512"),
    8: ([9], "512"),
}


@pytest.mark.parametrize("layer", AUGLOCAL)
def test_auglocal_imitates_a_vgg_as_published(layer: int) -> None:
    indices, expected = AUGLOCAL[layer]
    blueprint = vgg_blueprint("vgg13_bn", IMAGE, 1000)
    assert select_blocks(layer, 10, 3) == indices
    shape = blueprint.shapes()[layer]
    with torch.device("meta"):
        network = build_network(blueprint, layer, shape, indices, 3)
    words = []
    for block in list(network)[:-1]:
        pools = isinstance(list(block.children())[0], nn.MaxPool2d)
        (conv,) = [child for child in block.children() if isinstance(child, nn.Conv2d)]
        assert conv.bias is not None
        words.append(f"{'P' if pools else ''}{conv.out_channels}")
    assert " ".join(words) == expected
    exit = network[-1]
    assert isinstance(exit, AuxiliaryExit)
    sizes = [layer.out_features for layer in exit.modules() if isinstance(layer, nn.Linear)]
    assert sizes == [512, 512, 1000]
    assert network(torch.empty(2, *shape, device="meta")).shape == (2, 1000)


def test_auglocals_exit_on_a_vgg_pools_the_flattened_activation() -> None:
    exit = AuxiliaryExit(512, 10).eval()
    h = torch.randn(2, 512, 6, 4)
    pooled = nn.AdaptiveAvgPool1d(512)(h.flatten(1))
    assert torch.allclose(exit(h), exit.linears(pooled), atol=1e-6)


def test_densenet_bc_has_the_published_size_and_a_block_for_every_layer() -> None:
    blueprint = densenet_blueprint("densenet_bc_100_12", (3, 32, 32), 10)
    assert count(blueprint) == 769_162  # 0.8M in the paper's table
    assert len(blueprint.blocks) == 1 + 3 * 16 + 2
    assert blueprint.shapes()[-1] == (342, 8, 8)
    bounds = cut_blocks(len(blueprint.blocks), 4, "equal")
    assert [last - first + 1 for first, last in bounds] == [12, 13, 13, 13]

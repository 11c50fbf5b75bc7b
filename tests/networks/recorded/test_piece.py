"""A piece is a module like any other: copied, moved, exported, its layers replaced."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from localpipe.networks.recorded.recording import Piece
from tests.networks.recorded import networks
from tests.networks.recorded.equality import compose, images, record_network, tokens

IMAGES = images(3, 8, 8)


class ScaledNorm(nn.Module):
    """A replacement of a batch normalisation."""

    def forward(self, x: Tensor) -> Tensor:
        """Return 10 x."""
        return 10 * x


def test_replaced_layers_are_the_ones_that_run() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), networks.Residual()).eval()
    network.append(nn.Sequential(nn.Flatten(), nn.Linear(512, 4)))
    pieces = record_network(network, IMAGES).pieces(network)
    expected = 10 * network[0](*IMAGES(2))
    for piece in pieces:
        for path, module in list(piece.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                parent, _, name = path.rpartition(".")
                setattr(piece.get_submodule(parent), name, ScaledNorm())
    assert torch.equal(pieces[0](*IMAGES(2)), expected)
    branch: Any = network[2]
    hidden = branch.conv2(branch.relu(10 * branch.conv1(expected)))
    assert torch.equal(pieces[1](expected.clone()), torch.relu(expected + hidden))


def test_a_copy_has_weights_of_its_own() -> None:
    network = networks.residual().eval()
    pieces = record_network(network, IMAGES).pieces(network)
    copies = copy.deepcopy(pieces)
    expected = compose(pieces)(*IMAGES(2))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(compose(copies)(*IMAGES(2)), expected)
    assert not torch.equal(compose(pieces)(*IMAGES(2)), expected)


def test_pieces_run_on_the_meta_device_and_in_another_precision() -> None:
    network = networks.Tokens().eval()
    recording = record_network(network, IMAGES)
    pieces = copy.deepcopy(recording.pieces(network))
    moved = compose([piece.to(torch.float64) for piece in pieces])(IMAGES(4)[0].double())
    assert moved.dtype == torch.float64
    moved = compose([piece.to("meta") for piece in pieces])(IMAGES(4)[0].double().to("meta"))
    assert moved.is_meta and moved.shape == (4, 10)


def test_pieces_of_one_architecture_take_the_weights_of_any_network() -> None:
    recording = record_network(networks.residual(), IMAGES)
    other = networks.residual().eval()
    assert torch.equal(compose(recording.pieces(other))(*IMAGES(3)), other(*IMAGES(3)))


def test_a_piece_can_be_computed_again_in_the_backward_pass() -> None:
    network = networks.residual()
    pieces = record_network(network, IMAGES).pieces(network)
    gradients = []
    for recomputes in (False, True):
        network.zero_grad()
        torch.manual_seed(0)
        h = pieces[0](*IMAGES(2))
        for piece in pieces[1:]:
            h = checkpoint(piece, h, use_reentrant=False) if recomputes else piece(h)
        h.sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for one, two in zip(*gradients, strict=True):
        assert one is not None and two is not None and torch.equal(one, two)


@pytest.mark.parametrize("kind", ["residual", "tokens", "language"])
def test_pieces_export_with_a_dynamic_batch(kind: str) -> None:
    sample = IMAGES
    network: nn.Module
    if kind == "residual":
        network = networks.residual()
    elif kind == "tokens":
        network = networks.Tokens()
    else:
        network, sample = networks.Language(is_tied=False), tokens(5)
    network.eval()
    crossing = sample(4)
    for piece in record_network(network, sample).pieces(network):
        batch = torch.export.Dim("batch", min=2, max=64)
        exported = torch.export.export(
            piece, crossing, dynamic_shapes={"crossing": ({0: batch},) * len(crossing)}
        )
        other = tuple(torch.cat([tensor, tensor])[:6] for tensor in crossing)
        assert torch.allclose(exported.module()(*other), piece(*other), atol=1e-6)
        crossing = (piece(*crossing),)


def test_pieces_compile_without_a_graph_break() -> None:
    network = networks.Contexts(networks.Residual()).eval()
    h = IMAGES(2)[0]
    for piece in record_network(network, IMAGES).pieces(network):
        torch._dynamo.reset()
        compiled = torch.compile(piece, backend="eager", fullgraph=True)
        assert torch.equal(compiled(h), piece(h))
        h = piece(h).detach()


def test_pieces_hold_the_networks_own_modules() -> None:
    network = networks.residual()
    pieces = record_network(network, IMAGES).pieces(network)
    assert isinstance(pieces[1], Piece)
    assert pieces[1].get_submodule("blocks.0") is network.blocks[0]
    assert set(pieces[1].state_dict()) == {
        name for name in network.state_dict() if name.startswith("blocks.0.")
    }

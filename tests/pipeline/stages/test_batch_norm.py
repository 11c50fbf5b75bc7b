"""Batch normalisations that replace a network's own, against torch's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from localpipe.pipeline.stages.batch_norm import (
    TwiceBatchNorm,
    find_own_batch_norms,
    replace_batch_norms,
)


def twice(layer: nn.Module, x: Tensor, received: Tensor) -> list[Tensor]:
    """Return the output and gradients at x and the parameters.

    First a loss's gradient at x, then those of the loss plus a distance between gradients.
    """
    x = x.clone().requires_grad_()
    y = layer(x)
    loss = y.sigmoid().square().sum()
    (input_gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    total = loss + (input_gradient - received).square().sum()
    return [
        y.detach(),
        input_gradient.detach(),
        *torch.autograd.grad(total, [x, *layer.parameters()]),
    ]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5, 2)])
def test_differentiated_twice_it_is_torchs(shape: tuple[int, ...], affine: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, received = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    plain = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(
        3, affine=affine, dtype=torch.float64
    )
    if affine:
        nn.init.uniform_(plain.weight, generator=generator)
        nn.init.uniform_(plain.bias, generator=generator)
    found = twice(TwiceBatchNorm(plain), 3 + x, received)
    statistics = {name: value.clone() for name, value in plain.state_dict().items()}
    plain.reset_running_stats()
    expected = twice(plain, 3 + x, received)
    assert torch.equal(found[0], expected[0])
    for actual, reference in zip(found, expected, strict=True):
        assert torch.allclose(actual, reference, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(statistics[name], value) for name, value in plain.state_dict().items())


def test_it_stands_inside_a_network_under_the_same_names() -> None:
    inner = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    network = nn.Sequential(nn.Conv2d(3, 4, 1), inner)
    names, x = list(network.state_dict()), torch.randn(2, 3, 4, 4)
    network.eval()
    before = network(x)
    replace_batch_norms(network, TwiceBatchNorm)
    assert list(network.state_dict()) == names and isinstance(inner[0], TwiceBatchNorm)
    assert torch.equal(network.eval()(x), before)


class Activated(nn.BatchNorm2d):
    """Batch normalisation with an activation, as timm's BatchNormAct2d."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class Frozen(nn.BatchNorm2d):
    """Batch normalisation that stays in evaluation mode."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(False)
        return self


class Narrow(nn.BatchNorm2d):
    """Batch normalisation that differs in its arguments alone."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-3)


def hooked(width: int) -> nn.Module:
    layer = nn.BatchNorm2d(width)
    layer.register_forward_hook(lambda *arguments: arguments[-1].relu())
    return layer


@pytest.mark.parametrize("build", [Activated, Frozen, hooked])
def test_a_layer_that_does_more_stays(build: Any) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), build(4))
    layer, x = network[1], 1 + torch.randn(3, 3, 4, 4)
    expected = copy.deepcopy(network).train()(x)
    replace_batch_norms(network, TwiceBatchNorm)
    assert network[1] is layer and torch.equal(network.train()(x), expected)
    assert find_own_batch_norms(network) == [("1", layer)]


def test_a_plain_layer_is_replaced_once_at_every_place() -> None:
    shared = Narrow(4)
    inner = nn.Sequential(shared, nn.ReLU(), shared)
    other = nn.Sequential(shared)
    network = nn.Sequential(inner, other)
    network.append(nn.SyncBatchNorm(4))
    assert find_own_batch_norms(network) == []
    replace_batch_norms(network, TwiceBatchNorm)
    first, last = inner[0], network[2]
    assert isinstance(first, TwiceBatchNorm) and isinstance(last, TwiceBatchNorm)
    assert first.eps == 1e-3 and inner[2] is first and other[0] is first
    replace_batch_norms(network, TwiceBatchNorm)
    assert inner[0] is first and find_own_batch_norms(network) == []

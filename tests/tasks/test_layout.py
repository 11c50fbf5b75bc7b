"""Layouts, orders in memory, and the grid that follows from the number of tokens."""

from __future__ import annotations

import pytest
import torch

from localpipe.methods.auglocal import build_adapter
from localpipe.methods.context import Adapter, context_sources, has_encoders
from localpipe.methods.heads import SequenceMLPHead
from localpipe.methods.predsim import TokenSimilarity
from localpipe.tasks.classification import Classification
from localpipe.tasks.layout import Grid, Layout, arrange, grid_of, map_shape

GRID = Grid(2, 3, prefix=1)


@pytest.mark.parametrize(
    ("name", "shape", "standard"),
    [
        ("chw", (3, 4, 5), (3, 4, 5)),
        ("hwc", (4, 5, 3), (3, 4, 5)),
        ("td", (6, 8), (6, 8)),
        ("ct", (8, 6), (6, 8)),
        ("d", (7,), (7,)),
        ("", (2, 3, 4, 5), (2, 3, 4, 5)),
    ],
)
def test_a_layout_has_a_standard_form_and_back(
    name: str, shape: tuple[int, ...], standard: tuple[int, ...]
) -> None:
    layout, h = Layout(name), torch.randn(2, *shape)
    form = layout.to_standard(h)
    assert tuple(form.shape[1:]) == layout.standard_shape(shape) == standard
    assert form.data_ptr() == h.data_ptr()
    assert torch.equal(layout.from_standard(form), h)
    assert layout.is_standard == (shape == standard)
    if layout.is_standard:
        assert form is h


def test_the_channels_of_a_map_come_first() -> None:
    h = torch.arange(24.0).view(1, 2, 3, 4)
    assert torch.equal(Layout("hwc").to_standard(h)[0, 1], h[0, :, :, 1])


@pytest.mark.parametrize("order", [(), (1, 2, 0), (2, 0, 1), (0, 1, 2)])
def test_a_tensor_is_arranged_in_an_order(order: tuple[int, ...]) -> None:
    h = torch.randn(2, 3, 4, 5, requires_grad=True)
    arranged = arrange(h, order)
    assert torch.equal(arranged, h)
    dims = [0, *[dim + 1 for dim in order or (0, 1, 2)]]
    assert arranged.permute(dims).is_contiguous()
    assert arrange(arranged, order) is arranged
    arranged.sum().backward()
    assert h.grad is not None and torch.equal(h.grad, torch.ones_like(h))


@pytest.mark.parametrize(
    ("count", "prefix"), [(5, None), (6, 0), (7, 1), (8, 2), (22, 16), (23, None)]
)
def test_the_prefix_follows_from_the_number_of_tokens(count: int, prefix: int | None) -> None:
    grid = GRID.at(count)
    assert GRID.prefix_of(count) == prefix
    if prefix is None:
        assert grid is None and map_shape((count, 8), GRID) == (count, 8)
        return
    assert grid == Grid(2, 3, prefix)
    assert map_shape((count, 8), GRID) == (8, 2, 3)
    tokens = torch.randn(2, count, 8)
    assert torch.equal(Classification(10, GRID).pool(tokens), tokens[:, prefix:].mean(1))


def test_tokens_that_are_no_patches_pool_as_a_whole() -> None:
    tokens = torch.randn(2, 5, 8)
    assert torch.equal(Classification(10, GRID).pool(tokens), tokens.mean(1))


def test_only_tokens_have_a_grid() -> None:
    assert grid_of((7, 8), GRID) == GRID
    assert grid_of((7, 8), None) is grid_of((7,), GRID) is grid_of((7, 2, 3), GRID) is None


@pytest.mark.parametrize("shape", [(7, 8), (6, 4), (5, 3, 2)])
@pytest.mark.parametrize("output", [(7, 6), (8, 6), (6, 4, 4), (5,)])
def test_auglocal_adapts_maps_and_tokens_on_a_grid(
    shape: tuple[int, ...], output: tuple[int, ...]
) -> None:
    adapter = build_adapter(shape, output, Classification(10, GRID))
    assert tuple(adapter(torch.randn(2, *shape)).shape) == (2, *output)


@pytest.mark.parametrize("shape", [(7, 8), (6, 4), (5, 3, 2)])
@pytest.mark.parametrize("output", [(7, 6), (8, 6), (6, 4, 4)])
def test_contexts_encode_maps_and_tokens_on_a_grid(
    shape: tuple[int, ...], output: tuple[int, ...]
) -> None:
    shapes = {"image": (3, 8, 8), "ctx.0": shape}
    sources = context_sources("R1E", 2)
    assert has_encoders(sources, shapes, output, GRID)
    adapter = Adapter(sources, shapes, output, GRID)
    fields = {name: torch.randn(2, *each) for name, each in shapes.items()}
    assert tuple(adapter(torch.randn(2, *output), fields).shape) == (2, *output)


@pytest.mark.parametrize(
    ("shape", "output"), [((5, 8), (7, 8)), ((7, 8), (5, 8)), ((5, 8), (6, 4, 4)), ((8,), (6, 4))]
)
def test_contexts_of_other_tokens_have_no_encoder(
    shape: tuple[int, ...], output: tuple[int, ...]
) -> None:
    sources = context_sources("R1", 2)
    assert not has_encoders(sources, {"ctx.0": shape}, output, GRID)


def test_tokens_without_a_grid_have_heads_of_their_own() -> None:
    tokens = torch.randn(4, 5, 8)
    assert SequenceMLPHead(8, 10)(tokens).shape == (4, 10)
    similarity = TokenSimilarity(None, 8)
    expected = similarity.linear(tokens).var(1).add(1e-8).sqrt()
    assert torch.equal(similarity(tokens), expected)

"""DGL's own heads and PredSim's published settings, by the numbers of the released codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from localpipe.errors import UserError
from localpipe.methods.dgl import DGL
from localpipe.methods.dgl_heads import HEADS
from localpipe.methods.objective import LocalLoss, Site
from localpipe.methods.predsim import PaddedPredictor, PredSim
from localpipe.networks.blueprint import Blueprint
from localpipe.networks.resnet_cifar import resnet_cifar_blueprint
from localpipe.pipeline.stages.replicas import Replicas
from tests import harness

SHAPES = [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def site_of(shape: tuple[int, ...], seed: int = 0) -> Site:
    """Return a site after the stem of a CIFAR ResNet with activations of a shape."""
    blueprint: Blueprint = resnet_cifar_blueprint("resnet8", (3, 32, 32), 10)

    def build(name: str, make: Any) -> Any:
        torch.manual_seed(seed)
        return make()

    return Site(0, 2, 0, shape, blueprint, build, Replicas())


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("shape", "expected"), list(zip(SHAPES, (14_378, 54_858, 214_154), strict=True))
)
def test_dgls_own_head_has_the_parameters_of_the_released_code_that_run(
    shape: tuple[int, ...], expected: int
) -> None:
    own = DGL(DGL.Options(head="dgl_mlp_sr"), site_of(shape))
    assert count(own) == expected
    # AugLocal's version has a hidden layer and biases fewer: 4C units.
    units = 4 * shape[0]
    published = DGL(DGL.Options(), site_of(shape))
    assert expected - count(published) == (units * units + 3 * units) + 2 * units


@pytest.mark.parametrize("shape", SHAPES)
def test_dgls_other_heads_have_the_parameters_of_their_layers(shape: tuple[int, ...]) -> None:
    channels = shape[0]
    units = 4 * channels
    linear = units * 10 + 10
    mlp = 3 * (units * units + 3 * units) + linear
    assert count(DGL(DGL.Options(head="dgl_mlp"), site_of(shape))) == mlp
    cnn = 2 * (9 * channels * channels + 2 * channels) + 2 * channels + linear
    assert count(DGL(DGL.Options(head="dgl_cnn"), site_of(shape))) == cnn


@pytest.mark.parametrize("head", HEADS)
def test_dgls_heads_pool_convolve_and_classify_in_the_published_order(head: Any) -> None:
    loss = DGL(DGL.Options(head=head), site_of((16, 24, 24))).eval()
    h = torch.randn(3, 16, 24, 24)
    layers = [layer for layer in loss.modules() if not list(layer.children())]
    x = h
    if head != "dgl_cnn":
        x = F.adaptive_avg_pool2d(x, 6)  # a quarter of the side
    for layer in layers:
        if isinstance(layer, nn.Linear | nn.BatchNorm1d) and x.dim() == 4:
            x = F.adaptive_avg_pool2d(x, 2).flatten(1)
        if isinstance(layer, nn.BatchNorm2d) and layer is layers[-2] and head == "dgl_cnn":
            x = F.adaptive_avg_pool2d(x, 2)
        x = layer(x)
    logits = loss.exit(h)
    assert logits.shape == (3, 10) and torch.allclose(logits, x, atol=1e-6)


@pytest.mark.parametrize("head", HEADS)
def test_dgls_heads_take_maps_alone(head: Any) -> None:
    with pytest.raises(UserError, match=f"^objective: head {head} has no rule for stage 0"):
        DGL(DGL.Options(head=head), site_of((64,)))


# --- PredSim


def predsim(shape: tuple[int, ...], **options: Any) -> PredSim:
    return PredSim(PredSim.Options(**options), site_of(shape))


@pytest.mark.parametrize(("features", "expected"), [(512, 7_434), (2048, 22_794), (4096, 43_274)])
def test_the_features_of_the_decoder_decide_the_parameters(features: int, expected: int) -> None:
    for padded in (False, True):
        options = {"dim_in_decoder": features, "padded_pooling": padded}
        assert count(predsim((16, 32, 32), **options)) == expected


def test_pooling_pads_24_rows_with_zeros_that_count() -> None:
    network = PaddedPredictor((64, 24, 24), 10, 512)
    assert network.kernel == (16, 8) and network.fc.in_features == 64 * 2 * 3
    network.fc = nn.Identity()  # type: ignore[assignment]
    h = torch.rand(2, 64, 24, 24)
    found = network(h).view(2, 64, 2, 3)
    columns = h.view(2, 64, 24, 3, 8).mean(4)
    expected = torch.stack([columns[:, :, :8].sum(2) / 16, columns[:, :, 8:].mean(2)], 2)
    assert torch.allclose(found, expected, atol=1e-6)


def test_pooling_that_divides_is_the_same_with_and_without_padding() -> None:
    h = torch.rand(2, 16, 32, 32)
    one, other = predsim((16, 32, 32)), predsim((16, 32, 32), padded_pooling=True)
    assert torch.equal(exit_of(one, h), exit_of(other, h))


def exit_of(loss: LocalLoss, h: Tensor) -> Tensor:
    logits = loss.exit(h)
    assert logits is not None
    return logits


def test_a_classifier_that_starts_at_0_gives_its_bias() -> None:
    loss = predsim((16, 32, 32), zero_start=True)
    logits = exit_of(loss, torch.rand(2, 16, 32, 32))
    assert torch.equal(logits[0], logits[1]) and logits.abs().max() > 0
    assert exit_of(predsim((16, 32, 32)), torch.rand(2, 16, 32, 32)).std(0).max() > 0


def test_sim_and_pred_are_the_parts_of_predsim() -> None:
    shape = (16, 8, 8)
    h, target = torch.rand(6, *shape), torch.tensor([0, 1, 1, 2, 0, 3])
    both, sim, pred = (predsim(shape, loss=name) for name in ("predsim", "sim", "pred"))
    losses = [loss(h, {"target": target}) for loss in (both, sim, pred)]
    assert torch.allclose(losses[0], 0.99 * losses[1] + 0.01 * losses[2])
    assert torch.equal(losses[2], F.cross_entropy(exit_of(pred, h), target))
    assert sim.exit(h) is None and count(both) == count(sim) + count(pred)
    kinds = [
        (PredSim.is_cross_entropy(options), PredSim.is_over_pairs(options))
        for options in (PredSim.Options(loss="sim"), PredSim.Options(loss="pred"))
    ]
    assert kinds == [(False, True), (True, False)]


def test_on_features_predsim_is_a_linear_layer_and_a_classifier() -> None:
    both = predsim((1024,), dim_in_decoder=16, padded_pooling=True)
    assert count(both) == 1024 * 1024 + 1024 * 10 + 10

    sim = predsim((12,), loss="sim")
    h, target = torch.rand(6, 12), torch.tensor([0, 1, 1, 2, 0, 3])
    assert sim.similarity is not None
    (weight,) = sim.parameters()
    found = torch.corrcoef(h @ weight.T)
    wanted = torch.corrcoef(F.one_hot(target, 10).float())
    assert torch.allclose(sim(h, {"target": target}), F.mse_loss(found, wanted), atol=1e-6)

    pred = predsim((12,), loss="pred", zero_start=True)
    logits = exit_of(pred, h)
    assert torch.equal(logits[0], logits[1]) and logits.abs().max() > 0


# --- The theorem: any number of processes gives the same weights

JOBS: dict[str, dict[str, dict[str, Any]]] = {
    "dgl_mlp_sr": {"method": {"objective": {"name": "dgl", "head": "dgl_mlp_sr"}}},
    "dgl_mlp": {"method": {"objective": {"name": "dgl", "head": "dgl_mlp"}}},
    "dgl_cnn": {"method": {"objective": {"name": "dgl", "head": "dgl_cnn"}}},
    "sim": {"method": {"objective": {"name": "predsim", "loss": "sim"}}},
    "predsim": {
        "method": {
            "objective": {
                "name": "predsim", "dim_in_decoder": 100, "zero_start": True,
                "padded_pooling": True,
            },
            "context": {"mode": "E"},
        },
    },
    "mlp": {
        "model": {"name": "mlp", "args": {"width": 8, "dropout": 0.2, "slope": 0.01}},
        "method": {"objective": {"name": "predsim", "zero_start": True}},
    },
    "simple_cnn": {
        "model": {"name": "simple_cnn", "args": {"depth": 4, "width": 4}},
        "method": {"objective": {"name": "dgl", "head": "dgl_mlp_sr"}},
    },
    "densenet": {
        "model": {"name": "densenet_bc_100_12"},
        "data": {"samples": 16, "batch_size": 8},
        "optim": {"schedule": "multistep", "milestones": [2], "factor": 0.2},
    },
}  # fmt: skip


def test_any_number_of_processes_gives_the_same_weights(tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        jobs = [
            harness.settings(
                folder / name,
                **{**sections, "pipeline": {"processes": processes}},
            )
            for name, sections in JOBS.items()
        ]
        found.append(harness.digests(jobs, processes, folder / "digests"))
    assert found[0] == found[1] and len(set(found[0])) == len(JOBS)

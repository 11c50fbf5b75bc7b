"""Objectives against their formulas and published tables."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from localpipe.errors import UserError
from localpipe.methods.auglocal import AugLocal, block_strides, nominal_depth, select_blocks
from localpipe.methods.infopro import InfoPro, stage_weights, supervised_contrastive_loss
from localpipe.methods.infopro_coefficients import Pair, Pairs
from localpipe.methods.objective import interpolate
from localpipe.methods.predsim import Similarity, pool_kernel, similarity_matrix
from localpipe.methods.reconcile import gradient_distance
from localpipe.networks.layers import normalise_rows


def contrast_by_hand(z: torch.Tensor, y: list[int], temperature: float) -> float:
    z = z / z.norm(dim=1, keepdim=True)
    total = 0.0
    for a in range(len(y)):
        positives = [p for p in range(len(y)) if p != a and y[p] == y[a]]
        bottom = math.log(
            sum(math.exp(float(z[a] @ z[j]) / temperature) for j in range(len(y)) if j != a)
        )
        total += -sum(float(z[a] @ z[p]) / temperature - bottom for p in positives) / max(
            len(positives), 1
        )
    return total / len(y)


def test_supervised_contrast_is_the_formula_with_anchors_that_have_no_positive() -> None:
    z = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    y = [0, 0, 1, 1, 1, 2, 3, 3, 0]  # class 2 is alone
    assert float(supervised_contrastive_loss(z, torch.tensor(y))) == pytest.approx(
        contrast_by_hand(z, y, 0.07), rel=1e-4
    )


def test_supervised_contrast_of_equal_projections_is_ln_of_the_others() -> None:
    z = torch.ones(32, 4)
    loss = supervised_contrastive_loss(z, torch.zeros(32, dtype=torch.int64))
    assert float(loss) == pytest.approx(math.log(31), rel=1e-4)


def test_supervised_contrast_without_any_positive_is_0_with_finite_gradient() -> None:
    z = torch.randn(4, 3, requires_grad=True)
    loss = supervised_contrastive_loss(z, torch.arange(4))
    loss.backward()
    assert float(loss.detach()) == 0.0 and z.grad is not None and z.grad.isfinite().all()


def test_weights_move_in_a_straight_line_over_the_local_stages() -> None:
    image = [round(interpolate((5, 0), stage, 8), 3) for stage in range(7)]
    task = [round(interpolate((0, 1), stage, 8), 3) for stage in range(7)]
    assert image == [5, 4.167, 3.333, 2.5, 1.667, 0.833, 0]
    assert task == [0, 0.167, 0.333, 0.5, 0.667, 0.833, 1]
    assert [interpolate((6, 1), stage, 4) for stage in range(3)] == [6, 3.5, 1]
    assert interpolate((5, 0.5), 0, 2) == 5  # two stages: the first pair alone


@pytest.mark.parametrize(
    ("network", "data", "cuts", "stages", "expected"),
    [
        ("resnet32", "cifar10", "equal", 2, ((5, 5), (1, 1))),
        ("resnet32", "cifar10", "equal", 4, ((6, 1), (0, 2))),
        ("resnet32", "cifar10", "equal", 16, ((5, 0.2), (0.05, 0.5))),
        ("resnet110", "cifar10", "equal", 8, ((5, 0), (0, 1))),
        ("resnet110", "cifar10", (7, 15, 27), 4, ((5, 5), (0, 0.1))),
        ("resnet110", "stl10", "equal", 4, ((20, 5), (0.2, 2))),
        ("resnet110", "svhn", "equal", 8, ((5, 0.5), (0, 2))),
        ("resnet101", "imagenet", (4,), 2, ((5, 5), (0.75, 0.75))),
        ("resnet152", "imagenet", (9,), 2, ((5, 5), (1, 1))),
        ("resnext101_32x8d", "imagenet", (6,), 2, ((5, 5), (0.75, 0.75))),
        ("resnet32", "cifar10", (3, 7, 11), 4, ((6, 1), (0, 2))),
        ("resnet32", "cifar10", "layerwise", 16, ((5, 0.2), (0.05, 0.5))),
        ("resnet110", "stl10", (27,), 2, ((10, 10), (1, 1))),
        ("resnet20", "digits", "equal", 5, ((5, 0.5), (0, 1))),
        ("resnet20", "digits", "equal", 2, ((5, 5), (1, 1))),
    ],
)
def test_the_published_weights_are_the_defaults(
    network: str, data: str, cuts: str | tuple[int, ...], stages: int, expected: Pairs
) -> None:
    options = InfoPro.resolved(InfoPro.Options(), network, data, cuts, stages)
    assert (options.image_weight, options.task_weight) == expected


def test_without_reconstruction_the_task_has_weight_1() -> None:
    options = InfoPro.resolved(
        InfoPro.Options(image_weight=(0.0, 0.0)), "resnet32", "cifar10", "equal", 8
    )
    assert [stage_weights(options, stage, 8) for stage in range(7)] == [(0, 1)] * 7


@pytest.mark.parametrize(
    ("image", "task", "stage"),
    [((0.0, 1.0), (0.0, 1.0), 0), ((1.0, 0.0), (1.0, 0.0), 2), ((0.0, 0.0), (0.0, 0.0), 0)],
)
def test_a_stage_without_a_loss_is_refused(image: Pair, task: Pair, stage: int) -> None:
    options = InfoPro.Options(image_weight=image, task_weight=task)
    with pytest.raises(UserError, match=f"gives stage {stage} of 4 no loss"):
        InfoPro.resolved(options, "resnet110", "cifar10", "equal", 4)


def test_a_pyramid_that_would_rise_is_refused() -> None:
    with pytest.raises(
        UserError, match="aux_min_depth must be at most aux_depth, which is 1; got 3"
    ):
        AugLocal.resolved(
            AugLocal.Options(aux_depth=1, aux_min_depth=3), "resnet32", "cifar10", "equal", 4
        )


DEPTHS = {
    (16, 1): [1] * 14, (16, 2): [2] * 13, (16, 3): [3] * 6 + [2] * 6,
    (16, 4): [4] * 4 + [3] * 6 + [2], (16, 5): [5] * 3 + [4] * 4 + [3] * 3,
    (16, 6): [6] * 2 + [5] * 3 + [4] * 4, (16, 7): [7] * 2 + [6] * 2 + [5] * 2 + [4] * 2,
    (16, 8): [8, 7, 7, 6, 6, 5, 4],
    (55, 1): [1] * 53, (55, 2): [2] * 52, (55, 3): [3] * 25 + [2] * 26,
    (55, 4): [4] * 17 + [3] * 32 + [2], (55, 5): [5] * 12 + [4] * 25 + [3] * 12,
    (55, 6): [6] * 10 + [5] * 19 + [4] * 19, (55, 7): [7] * 8 + [6] * 16 + [5] * 15 + [4] * 8,
    (55, 8): [8] * 7 + [7] * 13 + [6] * 13 + [5] * 12 + [4],
}  # fmt: skip


@pytest.mark.parametrize(("blocks", "d"), DEPTHS)
def test_the_pyramid_has_the_published_depths(blocks: int, d: int) -> None:
    stages = blocks - d
    options = AugLocal.resolved(
        AugLocal.Options(aux_depth=d), "resnet32", "cifar10", "layerwise", stages
    )
    assert [nominal_depth(options, stage, stages) for stage in range(stages - 1)] == DEPTHS[
        blocks, d
    ]


R32 = [16] * 6 + [32] * 5 + [64] * 5
R110 = [16] * 19 + [32] * 18 + [64] * 18
R34 = [64] * 4 + [128] * 4 + [256] * 6 + [512] * 3
R101 = [64] * 4 + [128] * 4 + [256] * 23 + [512] * 3


@pytest.mark.parametrize(
    ("widths", "last", "depth", "indices", "built"),
    [
        (R32, 0, 1, [15], [(64, 2)]),
        (R32, 11, 1, [15], [(64, 1)]),
        (R32, 0, 2, [8, 15], [(32, 2), (64, 2)]),
        (R32, 3, 2, [9, 15], [(32, 2), (64, 2)]),
        (R32, 6, 2, [10, 15], [(32, 1), (64, 2)]),
        (R32, 11, 2, [13, 15], [(64, 1), (64, 1)]),
        (R32, 0, 3, [5, 10, 15], [(16, 1), (32, 2), (64, 2)]),
        (R32, 1, 3, [6, 10, 15], [(32, 2), (32, 1), (64, 2)]),
        (R32, 2, 3, [6, 11, 15], [(32, 2), (64, 2), (64, 1)]),
        (R32, 5, 3, [8, 12, 15], [(32, 2), (64, 2), (64, 1)]),
        (R32, 0, 5, [3, 6, 9, 12, 15], [(16, 1), (32, 2), (32, 1), (64, 2), (64, 1)]),
        (R32, 9, 3, [11, 13, 15], [(64, 2), (64, 1), (64, 1)]),
        (
            R110,
            0,
            6,
            [9, 18, 27, 36, 45, 54],
            [(16, 1), (16, 1), (32, 2), (32, 1), (64, 2), (64, 1)],
        ),
        (R110, 10, 5, [19, 28, 36, 45, 54], [(32, 2), (32, 1), (32, 1), (64, 2), (64, 1)]),
        (R110, 47, 4, [49, 50, 52, 54], [(64, 1)] * 4),
        (R34, 0, 4, [4, 8, 12, 16], [(128, 2), (256, 2), (256, 1), (512, 2)]),
        (R34, 10, 4, [12, 13, 14, 16], [(256, 1), (256, 1), (512, 2), (512, 1)]),
        (R34, 14, 4, [15, 16], [(512, 1), (512, 1)]),
        (R101, 0, 4, [8, 16, 25, 33], [(256, 2), (256, 2), (256, 1), (512, 2)]),
    ],
)
def test_the_imitated_blocks_are_the_published_ones(
    widths: list[int], last: int, depth: int, indices: list[int], built: list[tuple[int, int]]
) -> None:
    chosen = select_blocks(last, len(widths), depth)
    chosen_widths = [widths[index] for index in chosen]
    assert chosen == indices
    assert (
        list(zip(chosen_widths, block_strides([widths[last], *chosen_widths]), strict=True))
        == built
    )


@pytest.mark.parametrize(
    ("shape", "kernel"), [((16, 32, 32), (8, 4)), ((32, 16, 16), (4, 4)), ((64, 8, 8), (4, 2))]
)
def test_predsim_pools_to_512_features(shape: tuple[int, ...], kernel: tuple[int, int]) -> None:
    assert pool_kernel(shape) == kernel


def test_predsim_of_one_place_keeps_its_channels() -> None:
    assert pool_kernel((1024, 1, 1)) == (1, 1)
    similarity, h = Similarity(4), torch.randn(2, 4, 1, 1)
    assert torch.equal(similarity(h), similarity.conv(h).flatten(1))


def test_similarities_of_mean_centred_rows() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [3.0, 2.0, 1.0]])
    expected = torch.tensor([[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])
    assert torch.allclose(similarity_matrix(x), expected, atol=1e-6)


def test_cosine_distance_leaves_flat_samples_out_with_finite_gradient() -> None:
    gradient = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]], requires_grad=True)
    received = torch.tensor([[1.0, 0.0], [1.0, 1.0], [3.0, 0.0]])
    apart = gradient_distance("cosine", gradient, received)
    assert float(apart.detach()) == pytest.approx(0.5)
    apart.backward()
    assert gradient.grad is not None and gradient.grad.isfinite().all()
    nothing = torch.zeros(2, 3, requires_grad=True)
    assert float(gradient_distance("cosine", nothing, nothing).detach()) == 0.0


def test_l2_distance_is_the_mean_squared_norm() -> None:
    assert (
        float(gradient_distance("l2", torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.zeros(2, 2)))
        == 2.5
    )


@pytest.mark.parametrize("kind", ["cosine", "l2"])
def test_the_double_backward_agrees_with_finite_differences(kind: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    received = torch.randn(5, 4)

    def objective() -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        loss = nn.functional.cross_entropy(module(leaf), y)
        (input_gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        a, b = input_gradient * 5, received.double()
        # The distance itself computes in fp32. The formula is repeated in fp64, so that finite
        # differences can be taken.
        if kind == "l2":
            exact = (a - b).square().sum(1).mean()
        else:
            exact = (1 - nn.functional.cosine_similarity(a, b)).mean()
        assert float(gradient_distance(kind, a, b).detach()) == pytest.approx(
            float(exact.detach()), rel=1e-5
        )
        return loss + 0.3 * exact

    weight = module[0].weight
    assert isinstance(weight, torch.Tensor)
    (gradient,) = torch.autograd.grad(objective(), weight)
    step = 1e-6
    for index in ((0, 0), (3, 2), (5, 1)):
        with torch.no_grad():
            weight[index] += step
        above = objective().item()
        with torch.no_grad():
            weight[index] -= 2 * step
        below = objective().item()
        with torch.no_grad():
            weight[index] += step
        assert (above - below) / (2 * step) == pytest.approx(float(gradient[index]), rel=1e-4)


def test_the_gradient_of_the_distance_is_the_one_of_its_formula() -> None:
    a = torch.randn(6, 7, requires_grad=True)
    b = torch.randn(6, 7)
    (gradient,) = torch.autograd.grad(gradient_distance("cosine", a, b), a)
    (reference,) = torch.autograd.grad((1 - nn.functional.cosine_similarity(a, b)).mean(), a)
    assert torch.allclose(gradient, reference, atol=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-9])
def test_rows_without_a_direction_have_finite_second_derivatives(size: float) -> None:
    x = torch.randn(4, 5)
    x[1] = size
    weight = torch.eye(5, requires_grad=True)
    h = x.clone().requires_grad_()
    rows = normalise_rows(h @ weight, eps=1e-8)
    assert torch.equal(rows, F.normalize(x, dim=1, eps=1e-8))
    (gradient,) = torch.autograd.grad((rows @ rows.T).square().sum(), h, create_graph=True)
    gradient.square().sum().backward()
    assert weight.grad is not None and bool(weight.grad.isfinite().all())

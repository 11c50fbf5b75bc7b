"""Segmentation: the loss of places, the confusion matrix, and what exits read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from localpipe.config.keys import TaskKeys
from localpipe.errors import UserError
from localpipe.tasks.layout import Grid
from localpipe.tasks.segmentation import Segmentation
from localpipe.tasks.task import measure_batch

IMAGE = (3, 2, 3)
# Three samples: all valid, one ignored, all ignored.
TARGET = torch.tensor(
    [[[0, 1, 1], [0, 0, 2]], [[255, 1, 2], [2, 0, 0]], [[255, 255, 255], [255, 255, 255]]],
    dtype=torch.uint8,
)


def outputs() -> torch.Tensor:
    return torch.randn(3, 3, 2, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("average", "divisors"), [("all", (6, 6, 6)), ("valid", (6, 5, 1))])
def test_a_loss_is_the_sum_over_the_valid_pixels(average: str, divisors: tuple[int, ...]) -> None:
    task = Segmentation(3, sample=IMAGE, options=TaskKeys.model_validate({"average": average}))
    maps = F.cross_entropy(outputs(), TARGET.long(), ignore_index=255, reduction="none")
    expected = maps.flatten(1).sum(1) / torch.tensor(divisors)
    losses = task.losses(outputs(), TARGET)
    assert torch.allclose(losses, expected) and losses[2] == 0 and losses[1] > 0


def test_every_pixel_counts_where_none_is_ignored() -> None:
    target = torch.where(TARGET == 255, 0, TARGET)
    maps = F.cross_entropy(outputs(), target.long(), reduction="none")
    for ignored in (None, 7):
        task = Segmentation(3, sample=IMAGE, options=TaskKeys(ignore_index=ignored))
        assert torch.allclose(task.losses(outputs(), target), maps.flatten(1).mean(1))


def test_the_loss_of_an_auxiliary_output_is_added_with_its_weight() -> None:
    main, aux = outputs(), 2 * outputs()
    for weight in (0.4, 1.0):
        task = Segmentation(3, sample=IMAGE, options=TaskKeys(aux_weight=weight))
        expected = task.losses(main, TARGET).mean() + weight * task.losses(aux, TARGET).mean()
        assert task.extra_outputs == ("aux",)
        assert torch.equal(task.loss((main, aux), TARGET), expected)
    assert Segmentation(3, sample=IMAGE, options=TaskKeys(aux_weight=0)).extra_outputs == ()


def test_a_sample_without_a_valid_pixel_has_no_gradient() -> None:
    logits = outputs().requires_grad_()
    for average in ("all", "valid"):
        task = Segmentation(3, sample=IMAGE, options=TaskKeys.model_validate({"average": average}))
        (gradient,) = torch.autograd.grad(task.loss(logits, TARGET), logits)
        assert gradient.isfinite().all() and not gradient[2].any() and gradient[0].all()


@pytest.mark.parametrize(
    ("classes", "ignored", "dtype"),
    [(3, 255, "uint8"), (256, None, "uint8"), (257, 255, "int64"), (3, -1, "int64"),
     (3, 256, "int64")],
)  # fmt: skip
def test_masks_cross_as_bytes_where_all_their_values_fit(
    classes: int, ignored: int | None, dtype: str
) -> None:
    target = Segmentation(classes, sample=IMAGE, options=TaskKeys(ignore_index=ignored)).target
    assert (target.shape, target.dtype) == ((2, 3), dtype)


def test_mean_iou_is_that_of_one_confusion_matrix_over_all_batches() -> None:
    """By hand: class 0 has 2 of 3, class 1 has 1 of 2, class 2 has 0 of 2, class 3 is absent."""
    task = Segmentation(4, sample=(3, 1, 3))
    target = torch.tensor([[[0, 0, 1]], [[2, 255, 0]]], dtype=torch.uint8)
    predicted = torch.tensor([[[0, 0, 1]], [[1, 2, 2]]])
    logits = F.one_hot(predicted, 4).movedim(-1, 1).float()
    first, second = (measure_batch(task, logits[i : i + 1], target[i : i + 1]) for i in range(2))
    sums = {name: first[name] + second[name] for name in first}
    assert sums["confusion"].tolist() == [[2, 0, 1, 0], [0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    figures = task.summarise(sums, 2)
    assert figures["mean_iou"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert figures["accuracy"] == pytest.approx(3 / 5)


def test_without_a_valid_pixel_there_is_no_figure() -> None:
    task = Segmentation(3, sample=IMAGE)
    sums = measure_batch(task, outputs()[2:], TARGET[2:])
    assert task.summarise(sums, 1) == {"mean_iou": None, "accuracy": None}


@pytest.mark.parametrize("shape", [(5, 4, 2), (9, 5)])
def test_exits_read_every_place_and_are_upsampled_to_the_image(shape: tuple[int, ...]) -> None:
    task = Segmentation(3, Grid(4, 2, prefix=1), sample=(3, 8, 6))
    rows = task.pool(torch.randn(2, *shape))
    assert rows.shape == (2, 4, 2, task.features(shape))
    coarse = torch.randn(2, 4, 2, 3)
    expected = F.interpolate(
        coarse.permute(0, 3, 1, 2), (8, 6), mode="bilinear", align_corners=True
    )
    assert torch.equal(task.to_outputs(coarse), expected)


def test_tokens_lie_on_the_grid_without_their_prefix() -> None:
    task = Segmentation(3, Grid(1, 2, prefix=1), sample=(3, 8, 6))
    tokens = torch.randn(2, 3, 5)
    assert torch.equal(task.pool(tokens), tokens[:, 1:].unflatten(1, (1, 2)))


@pytest.mark.parametrize("shape", [(5,), (7, 5)])
def test_an_activation_without_places_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="segmentation has no rule for an activation of shape"):
        Segmentation(3, sample=IMAGE).features(shape)


def test_a_pixel_that_is_no_class_is_refused() -> None:
    task = Segmentation(3, sample=IMAGE, options=TaskKeys(ignore_index=-1))
    task.check_target(torch.tensor([[[0, -1, 2]]]))
    for wrong in (-2, 3):
        with pytest.raises(UserError, match=f"a pixel of {wrong}, .* 0 to 2, or .* is -1"):
            task.check_target(torch.tensor([[[0, wrong, 2]]]))


def test_inputs_that_are_no_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"takes images \(C, H, W\), but the inputs have shape"):
        Segmentation(3, sample=(16,))

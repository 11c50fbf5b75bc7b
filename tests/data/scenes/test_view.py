"""Views of scenes: scale, crop and flip by hand-made numbers, and what lies beyond an image."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from localpipe.data.scenes.view import DRAWS, TRIES, ViewRecipe, draw_views, view_scene

GREY = (1, 2, 3)
# A number that gives each scale, and a flip or none.
SAME, HALF, DOUBLE = 1 / 3, 0.0, 1.0 - 1e-9
FLIP, KEEP = 0.2, 0.8


def scene(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image whose pixels say where they are, and a mask with a class a column."""
    rows, columns = np.mgrid[0:height, 0:width].astype(np.uint8)
    return np.stack([rows, columns, rows * 0], -1), columns % 19


def view(
    size: tuple[int, int],
    scale: float,
    corners: list[tuple[float, float]],
    flip: float,
    is_random: bool = True,
    whole: tuple[int, int] = (8, 16),
    mask: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    image, classes = scene(*whole)
    if mask is not None:
        classes = mask
    rest = [corners[-1]] * (TRIES - len(corners))
    numbers = [scale, *(number for corner in [*corners, *rest] for number in corner), flip]
    assert len(numbers) == DRAWS
    recipe = ViewRecipe(size, is_random, GREY)
    return view_scene(Image.fromarray(image), Image.fromarray(classes), recipe, numbers)


def test_a_crop_of_the_same_scale_is_a_part_of_image_and_mask() -> None:
    image, classes = scene(8, 16)
    # Five places from the top and nine from the left.
    pixels, mask = view((4, 8), SAME, [(0.5, 0.99)], KEEP)
    assert np.array_equal(pixels, image[2:6, 8:]) and np.array_equal(mask, classes[2:6, 8:])
    flipped, flipped_mask = view((4, 8), SAME, [(0.5, 0.99)], FLIP)
    assert np.array_equal(flipped, pixels[:, ::-1]) and np.array_equal(flipped_mask, mask[:, ::-1])


def test_scales_are_between_a_half_and_two() -> None:
    image, classes = scene(8, 16)
    _, mask = view((16, 32), DOUBLE, [(0.0, 0.0)], KEEP)
    assert np.array_equal(mask, classes.repeat(2, 0).repeat(2, 1))
    pixels, mask = view((4, 8), HALF, [(0.0, 0.0)], KEEP)
    # The filter averages where it shrinks, and the mask keeps its classes.
    assert abs(int(pixels[2, 4, 0]) - 4.5) <= 0.5 and abs(int(pixels[2, 4, 1]) - 8.5) <= 0.5
    assert set(np.unique(mask)) <= set(np.unique(classes))


def test_what_lies_beyond_a_small_image_is_the_background_and_ignored() -> None:
    image, classes = scene(8, 16)
    pixels, mask = view((12, 20), SAME, [(0.5, 0.5)], KEEP)
    assert np.array_equal(pixels[:8, :16], image) and np.array_equal(mask[:8, :16], classes)
    assert (pixels[8:] == GREY).all() and (pixels[:, 16:] == GREY).all()
    assert (mask[8:] == 255).all() and (mask[:, 16:] == 255).all()


def test_a_crop_with_too_much_of_one_class_is_drawn_again() -> None:
    mask = np.full((8, 16), 3, np.uint8)
    mask[:, 12:] = 5
    mask[:, 7] = 5  # a seventh as many as of the first class
    mask[0] = 255  # does not count
    left, right = (0.0, 0.0), (0.0, 0.99)
    _, drawn = view((4, 8), SAME, [left, right], KEEP, mask=mask)
    assert np.array_equal(drawn, mask[:4, 8:])
    # After ten such crops the last one is taken.
    _, drawn = view((4, 8), SAME, [left], KEEP, mask=mask)
    assert np.array_equal(drawn, mask[:4, :8])


def test_without_augmentation_it_is_the_centre() -> None:
    image, classes = scene(8, 16)
    pixels, mask = view((4, 8), DOUBLE, [(0.0, 0.0)], FLIP, is_random=False)
    assert np.array_equal(pixels, image[2:6, 4:12]) and np.array_equal(mask, classes[2:6, 4:12])


@pytest.mark.parametrize("other", [(1, 3), (0, 4)])
def test_numbers_depend_on_seed_epoch_and_index_alone(other: tuple[int, int]) -> None:
    numbers = draw_views(0, np.array([4, 7]), 3)
    assert numbers.shape == (2, DRAWS)
    assert np.array_equal(numbers[1:], draw_views(0, np.array([7]), 3))
    assert not np.isin(draw_views(other[0], np.array([4, 7]), other[1]), numbers).any()

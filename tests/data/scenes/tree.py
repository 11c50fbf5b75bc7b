"""A tree of folders in Cityscapes' format, with a few small images of random rectangles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

# Ids of classes in the files: road, sky and car, which are evaluated, and two that are not.
IDS = (7, 23, 26, 1, 31)
SIZE = (80, 160)


def write_tree(
    root: Path, train: int = 4, val: int = 2, size: tuple[int, int] = SIZE, seed: int = 0
) -> Path:
    """Write a tree with so many images, in two cities a split, and return its root."""
    generator = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            city = ("ulm", "bonn")[number % 2]
            image, ids = draw_scene(generator, size)
            name = f"{city}_{number:06}_000019"
            save(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", image)
            save(root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", ids)
    return root


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def draw_scene(
    generator: np.random.Generator, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return an image (H, W, 3) and its ids (H, W): two halves, and rectangles on them."""
    height, width = size
    ids = np.full(size, IDS[0], np.uint8)
    ids[: height // 2] = IDS[1]
    for label in IDS[2:]:
        top, left = generator.integers(0, height // 2), generator.integers(0, width // 2)
        ids[top : top + height // 4, left : left + width // 4] = label
    image = generator.integers(0, 60, (height, width, 3), np.uint8)
    return image + (ids * 5)[..., None], ids

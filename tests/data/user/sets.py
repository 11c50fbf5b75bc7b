"""Data sets as users write them, good and faulty ones, by the names of their functions."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

FAULTY_INDEX = 37


class Stripes(Dataset[Any]):
    """Images of bytes (3, 8, 8) of four classes, the training ones with random augmentation."""

    def __init__(self, size: int, augments: bool = False) -> None:
        self.size, self.augments = size, augments
        self.targets = [index % 4 for index in range(size)]
        self.transform = lambda image: image + self._draw()  # no process can pickle it

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        fixed = np.random.RandomState(index)
        image = torch.from_numpy(fixed.randint(0, 60, (3, 8, 8)).astype(np.uint8))
        image[:, 2 * (index % 4)] += 120
        return self.transform(image), self.targets[index]

    def _draw(self) -> Tensor:
        if not self.augments:
            return torch.zeros(1, dtype=torch.uint8)
        noise: Tensor = torch.randint(0, 20, (3, 8, 8), dtype=torch.uint8)
        noise += int(np.random.randint(20)) + random.randrange(20)
        return noise


def stripes() -> Any:
    """Return a good data set."""
    return Stripes(90, augments=True), Stripes(30)


other = stripes


def subset() -> Any:
    """Return parts that are drawn at random, as random_split draws them."""
    order = torch.randperm(120).tolist()
    return {
        "train": Subset(Stripes(120, augments=True), order[:90]),
        "test": Subset(Stripes(120), order[90:]),
        "classes": ["a", "b", "c", "d"],
    }


class Items(Dataset[Any]):
    """Items that a function makes of their index."""

    def __init__(self, make: Any, size: int = 80) -> None:
        self.make, self.size = make, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def _pair(index: int) -> Any:
    return torch.full((6,), float(index % 3)), index % 3


def _both(make: Any, **more: Any) -> Any:
    return {"train": Items(make), "test": Items(make, 10), **more}


def _faulty(make: Any) -> Any:
    """Return data of three classes whose item 37 alone is faulty."""

    def make_item(index: int) -> Any:
        return make(index) if index == FAULTY_INDEX else _pair(index)

    return {"train": Items(make_item), "test": Items(_pair, 10), "classes": 3}


def floats() -> Any:
    """Return float inputs without `targets`, with a number of classes."""
    return _both(_pair, classes=3)


def unknown_classes() -> Any:
    """Return float inputs of classes that nothing says."""
    return Items(_pair), Items(_pair, 10)


def dicts() -> Any:
    """Return items that are dicts, with a text that is no input."""
    return _both(lambda i: {"pixels": np.zeros(4), "label": np.int32(i % 2), "id": "x"}, classes=2)


def numbers() -> Any:
    """Return targets that are floats."""
    return _both(lambda i: (np.ones(3), float(i)))


def masks() -> Any:
    """Return a class for every place of an image."""
    return _both(
        lambda i: (torch.zeros(3, 8, 6, dtype=torch.uint8), torch.zeros(8, 6).long()), classes=5
    )


def _squares(index: int) -> Any:
    """Return an image of two squares and the class of every pixel, 255 in the first row."""
    image, mask = torch.full((3, 16, 16), 20, dtype=torch.uint8), torch.zeros(16, 16).long()
    place = index % 8
    image[0, place : place + 6, 2:8], mask[place : place + 6, 2:8] = 200, 1
    image[1, 4:12, place : place + 4], mask[4:12, place : place + 4] = 200, 2
    mask[0] = 255
    return image, mask


def squares() -> Any:
    """Return masks of three classes and of pixels without one."""
    return _both(_squares, classes=3)


def wrong_pixel() -> Any:
    """Return such masks. A pixel of item 37 is no class."""

    def make(index: int) -> Any:
        image, mask = _squares(index)
        if index == FAULTY_INDEX:
            mask[5, 5] = -1
        return image, mask

    return _both(make, classes=3)


def _mixed(index: int) -> Any:
    """Return numbers of a class, and probabilities in which it is the largest of three."""
    probabilities = torch.full((3,), 0.2)
    probabilities[index % 3] = 0.6
    return torch.full((6,), float(index % 3)) + 0.01 * index, probabilities


def mixed() -> Any:
    """Return probabilities of classes as targets."""
    return _both(_mixed, classes=["low", "middle", "high"])


def opinions() -> Any:
    """Return images of stripes, each with probabilities of ten classes."""

    def make(index: int) -> Any:
        image, label = Stripes(90)[index]
        probabilities = torch.full((10,), 0.05)
        probabilities[label] = 0.55
        return image, probabilities

    return _both(make)


def wrong_probabilities() -> Any:
    """Return such targets, of which those of item 37 sum to 2."""
    return _both(lambda i: (torch.ones(6), torch.full((2,), 1.0 if i == FAULTY_INDEX else 0.5)))


def text() -> Any:
    """Return windows of 8 tokens below 12, each the one before plus 1 or 5, and the next ones."""

    def make(index: int) -> Any:
        steps = 1 + 4 * (torch.arange(9) % 3 == index % 3)
        tokens = (index + steps.cumsum(0)) % 12
        return tokens[:-1], tokens[1:]

    return _both(make)


def tokens() -> Any:
    """Return texts of tokens with the next token of each."""
    return _both(lambda i: (torch.arange(6), torch.arange(6) + 1))


def unclear() -> Any:
    """Return targets of a shape that fits no task."""
    return _both(lambda i: (torch.zeros(4), torch.zeros(2, 2, 2).long()), classes=2)


def own_generator() -> Any:
    """Return items that are drawn from a generator of their own."""
    generator = np.random.default_rng(0)
    return _both(lambda i: (generator.random(4), 0), classes=2)


def wrong_shape() -> Any:
    """Return item 37 with another shape."""
    return _faulty(lambda i: (torch.zeros(7), 0))


def wrong_dtype() -> Any:
    """Return item 37 with another dtype."""
    return _faulty(lambda i: (torch.zeros(6), 0.5))


def raising() -> Any:
    """Return item 37 with an exception."""

    def fail(index: int) -> Any:
        raise KeyError(f"no file {index}")

    return _faulty(fail)


def wrong_label() -> Any:
    """Return item 37 with a label that is no class."""
    return _faulty(lambda i: (torch.zeros(6), 3))


def wrong_device() -> Any:
    """Return item 37 on another device."""
    return _faulty(lambda i: (torch.zeros(6, device="meta"), 0))


def sleeping() -> Any:
    """Return item 37 after a very long time."""

    def sleep(index: int) -> Any:
        time.sleep(3600)

    return _faulty(sleep)


def dying() -> Any:
    """Return item 37 by a process that is killed."""
    return _faulty(lambda i: os.kill(os.getpid(), signal.SIGKILL))


def empty() -> Any:
    """Return a test split without items."""
    return Items(_pair), Items(_pair, 0)


class Stream(IterableDataset[Any]):
    """Items without an index."""

    def __iter__(self) -> Any:
        return iter([_pair(0)])


def stream() -> Any:
    """Return data without indices."""
    return Stream(), Stream()


def three() -> Any:
    """Return three data sets in a tuple."""
    return Items(_pair), Items(_pair), Items(_pair)


def failing() -> Any:
    """Raise an exception."""
    raise FileNotFoundError("no folder photos")


def listed_wrong() -> Any:
    """Return targets that list a class that there is not."""
    data = Stripes(90)
    data.targets[20] = 7
    return {"train": data, "test": Stripes(30), "classes": ["a", "b", "c", "d"]}


def picture() -> Any:
    """Return an image of Pillow."""
    from PIL import Image

    return _both(lambda i: (Image.new("RGB", (8, 8)), 0), classes=2)


def channels_last() -> Any:
    """Return an image whose channels come last."""
    return _both(lambda i: (np.zeros((8, 8, 3), np.uint8), 0), classes=2)

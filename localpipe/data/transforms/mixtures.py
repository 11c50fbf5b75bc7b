"""Mixtures of two images of a step: mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019).

An image's partner is the one before it in the order of the epoch, and the first image of a step has
the last one. All images of a step are mixed by one weight. So an image's mixture depends on (seed,
epoch, step, position) alone, however many replicas and messages share the step.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localpipe import seeds
from localpipe.data.transforms.boxes import Box

MIXUP, CUTMIX = "mixup", "cutmix"


@dataclass(frozen=True)
class Mixture:
    """How the images of one step are mixed.

    word: mixup or cutmix. weight: of an image's own class, the partner's is 1 - weight. box: what
    cutmix takes from the partner.
    """

    word: str
    weight: float
    box: Box = (0, 0, 0, 0)

    def mix_images(self, images: NDArray[np.uint8], partners: NDArray[np.uint8]) -> NDArray[Any]:
        """Return new images (B, C, H, W) of two arrays of that shape.

        They are float32 in 0..255 of mixup, and uint8 of cutmix.
        """
        if self.word == MIXUP:
            mixed: NDArray[Any] = self._blend(
                images.astype(np.float32), partners.astype(np.float32)
            )
            return mixed
        top, left, bottom, right = self.box
        mixed = images.copy()
        mixed[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
        return mixed

    def mix_targets(
        self, targets: NDArray[np.float32], partners: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Return the probabilities of the classes, (B, classes) float32, as both arrays are."""
        return self._blend(targets, partners)

    def _blend(self, own: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
        return own * np.float32(self.weight) + other * np.float32(1 - self.weight)


def draw_mixture(
    mixtures: Sequence[tuple[str, float]],
    seed: int,
    epoch: int,
    start: int,
    size: tuple[int, int],
) -> Mixture:
    """Return the mixture of the step whose images begin at position `start` of the epoch's order.

    mixtures: (word, alpha), one of which is drawn. size: (H, W) of an image. The weight is of a
    Beta(alpha, alpha) distribution. That of cutmix is then the share of pixels that stay.
    """
    # Python's own generator gives the same numbers whatever the version of numpy or torch.
    numbers = random.Random(seeds.derive(seed, "mixture", epoch, start))
    word, alpha = mixtures[int(numbers.random() * len(mixtures))]
    weight = numbers.betavariate(alpha, alpha)
    if word == MIXUP:
        return Mixture(word, weight)
    box = _draw_box(numbers, 1 - weight, *size)
    top, left, bottom, right = box
    area = (bottom - top) * (right - left)
    return Mixture(word, 1 - area / (size[0] * size[1]), box)


def _draw_box(numbers: random.Random, share: float, height: int, width: int) -> Box:
    """Return a box of a share of the pixels around any pixel, without what lies outside."""
    y, x = int(numbers.random() * height), int(numbers.random() * width)
    half = math.sqrt(share) / 2
    half_height, half_width = int(half * height), int(half * width)
    top, left = max(y - half_height, 0), max(x - half_width, 0)
    return top, left, min(y + half_height, height), min(x + half_width, width)


@dataclass(frozen=True)
class StepRows:
    """The positions of a part of a step in the epoch's order, and those of the partners.

    start: the first position of the whole step. own, partners: (B,).
    """

    start: int
    own: NDArray[np.int64]
    partners: NDArray[np.int64]


def find_partners(rows: slice, train_size: int, batch: int) -> list[StepRows]:
    """Return the steps that have positions in `rows`, in order, with the partners of each.

    train_size: positions of an epoch. batch: images of a step, of which the last one has fewer.
    """
    first, last, _ = rows.indices(train_size)
    steps = []
    for start in range(first // batch * batch, last, batch):
        size = min(batch, train_size - start)
        own = np.arange(max(first, start), min(last, start + size))
        if len(own) == 0:
            continue
        steps.append(StepRows(start, own, start + (own - start - 1) % size))
    return steps


def one_hot(labels: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
    """Return probabilities (B, classes) float32 of 0 and 1 for class indices (B,)."""
    targets = np.zeros((len(labels), classes), np.float32)
    targets[np.arange(len(labels)), labels] = 1
    return targets

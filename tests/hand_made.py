"""Networks as a recorder would describe them, made by hand, and pipelines that train them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from localpipe.config import registry
from localpipe.config.keys import Config
from localpipe.config.resolved import Resolved
from localpipe.networks.blueprint import Block, BlockOutput, Blueprint, Companion
from localpipe.tasks.classification import Classification
from tests import harness

Image = tuple[int, int, int]
NAMES = ("hand_hwc", "hand_permuted", "hand_skips", "hand_sequence")

# -- Maps with channels last, as Swin has them


class HwcStem(nn.Module):
    """(B, C, H, W) to (B, H / 2, W / 2, width)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 2, 2)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return h


class HwcBlock(nn.Module):
    """(B, H, W, D) to the same shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        layers = [nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1)]
        self.mlp = nn.Sequential(*layers, nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, features = x.shape
        # Windows, as Swin makes them: it works on a contiguous tensor alone.
        windows = self.norm(x).view(batch, height * width, features)
        h: Tensor = x + self.mlp(windows).view(batch, height, width, features)
        return h


class HwcMerge(nn.Module):
    """(B, H, W, D) to (B, H / 2, W / 2, 2 D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.linear = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.cat([x[:, 0::2], x[:, 1::2]], -1)
        h: Tensor = self.linear(self.norm(torch.cat([rows[:, :, 0::2], rows[:, :, 1::2]], -1)))
        return h


class HwcTail(nn.Module):
    """(B, H, W, D) to (B, classes)."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x).permute(0, 3, 1, 2).mean((2, 3)))
        return logits


def hwc_blueprint(name: str, image: Image, num_classes: int) -> Blueprint:
    """Return a network whose boundaries are (B, H, W, D)."""
    side = image[1] // 2
    wide, half = (side, side, 8), (side // 2, side // 2, 16)
    return _join(
        name,
        image,
        num_classes,
        [
            (lambda: HwcStem(image[0], 8), BlockOutput(wide, "hwc")),
            (lambda: HwcBlock(8), BlockOutput(wide, "hwc")),
            (lambda: HwcMerge(8), BlockOutput(half, "hwc")),
            (lambda: HwcBlock(16), BlockOutput(half, "hwc")),
            (lambda: HwcBlock(16), BlockOutput(half, "hwc")),
        ],
        lambda: HwcTail(16, num_classes),
    )


# -- Permuted maps, as ConvNeXt has them


class LayerNormOfMaps(nn.LayerNorm):
    """A layer norm over the channels of (B, C, H, W). Its output is permuted in memory."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PermutedStem(nn.Sequential):
    """(B, C, H, W) to (B, width, H / 2, W / 2), the channels innermost."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(nn.Conv2d(channels, width, 2, 2), LayerNormOfMaps(width))


class PermutedBlock(nn.Module):
    """A ConvNeXt block: (B, C, H, W) to the same shape, the channels innermost."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.mlp(self.norm(self.conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        h += x
        return cast(Tensor, h)


class PermutedDown(nn.Sequential):
    """(B, C, H, W) to (B, 2 C, H / 2, W / 2). What a convolution makes of a permuted tensor."""

    def __init__(self, width: int) -> None:
        super().__init__(LayerNormOfMaps(width), nn.Conv2d(width, 2 * width, 2, 2))


class PermutedTail(nn.Module):
    """(B, C, H, W) to (B, classes)."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = LayerNormOfMaps(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x.mean((2, 3), keepdim=True)).flatten(1))
        return logits


INNERMOST_CHANNELS = (1, 2, 0)


def permuted_blueprint(name: str, image: Image, num_classes: int) -> Blueprint:
    """Return a network whose boundaries are (B, C, H, W) with the channels innermost."""
    side = image[1] // 2
    wide = BlockOutput((16, side, side), "chw", INNERMOST_CHANNELS)
    half = BlockOutput((32, side // 2, side // 2), "chw", INNERMOST_CHANNELS)
    return _join(
        name,
        image,
        num_classes,
        [
            (lambda: PermutedStem(image[0], 16), wide),
            (lambda: PermutedBlock(16), wide),
            (lambda: PermutedDown(16), half),
            (lambda: PermutedBlock(32), half),
            (lambda: PermutedBlock(32), half),
        ],
        lambda: PermutedTail(32, num_classes),
    )


# -- Skips, as a U-Net has them


class SkipStem(nn.Module):
    """An image to (h, skip): the skip crosses all stages to the head of the decoder."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.norm(self.conv(x)).relu()
        return nn.functional.max_pool2d(h, 2), h


class SkipEncoder(nn.Module):
    """(h, skip) to (h, skip, places, mask): two further tensors that no gradient flows into."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, skip: Tensor) -> tuple[Tensor, ...]:
        h = self.drop(self.conv(x)).relu()
        pooled, places = nn.functional.max_pool2d(h, 2, return_indices=True)
        return pooled, skip, places, pooled > 0.1


class SkipMiddle(nn.Module):
    """(h, skip, places, mask) to (h, skip, places). The skip and the places pass untouched."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, skip: Tensor, places: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return torch.where(mask, self.conv(x), x), skip, places


class SkipDecoder(nn.Module):
    """(h, skip, places) to h."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Conv2d(width, width // 2, 1)
        self.conv = nn.Conv2d(width, width // 2, 3, padding=1)

    def forward(self, x: Tensor, skip: Tensor, places: Tensor) -> Tensor:
        h = self.up(x * (1 + places % 3))
        h = nn.functional.interpolate(h, skip.shape[2:])
        out: Tensor = self.conv(torch.cat([h, skip], 1)).relu()
        return out


class SkipTail(nn.Module):
    """(h, copy of h) to logits. It takes a companion too."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.cat([x.mean((2, 3)), other.mean((2, 3))], 1))
        return logits


class Refine(nn.Module):
    """h to (refined h, h), for the head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.conv(x).relu(), x


def skips_blueprint(name: str, image: Image, num_classes: int) -> Blueprint:
    """Return a small U-Net. Up to four tensors cross, one of them int64 and one bool."""
    side = image[1]
    whole = (8, side, side)
    half, quarter = (8, side // 2, side // 2), (16, side // 4, side // 4)
    skip = Companion(whole, "float32")
    places, mask = Companion(quarter, "int64"), Companion(quarter, "bool")
    return _join(
        name,
        image,
        num_classes,
        [
            (lambda: SkipStem(image[0], 8), BlockOutput(half, "chw", companions=(skip,))),
            (
                lambda: SkipEncoder(8),
                BlockOutput(quarter, "chw", companions=(skip, places, mask)),
            ),
            (lambda: SkipMiddle(16), BlockOutput(quarter, "chw", companions=(skip, places))),
            (lambda: SkipDecoder(16), BlockOutput(whole, "chw")),
            (lambda: nn.Conv2d(8, 8, 3, padding=1), BlockOutput(whole, "chw")),
            (lambda: Refine(8), BlockOutput(whole, "chw", companions=(skip,))),
        ],
        lambda: SkipTail(8, num_classes),
    )


class UnreachedStem(nn.Module):
    """An image to (h, skip). No loss of its stage reads the skip."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1)
        self.side = nn.Conv2d(channels, width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.conv(x).relu(), self.side(x)


class Add(nn.Module):
    """(h, skip) to their sum, after a convolution of h."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        h: Tensor = self.conv(x) + skip
        return h


def unreached_blueprint(name: str, image: Image, num_classes: int) -> Blueprint:
    """Return a network whose layer `side` no local loss reaches where it is cut after b0."""
    shape = (8, *image[1:])
    stem = BlockOutput(shape, "chw", companions=(Companion(shape, "float32"),))
    plain = BlockOutput(shape, "chw")
    return _join(
        name,
        image,
        num_classes,
        [
            (lambda: UnreachedStem(image[0], 8), stem),
            (lambda: Add(8), plain),
            (lambda: nn.Conv2d(8, 8, 3, padding=1), plain),
            (lambda: nn.Conv2d(8, 8, 3, padding=1), plain),
        ],
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)),
    )


# -- Sequences, channels first


class Flatten(nn.Module):
    """(B, C, H, W) to (B, C, H * W)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2)


class Mean(nn.Module):
    """(B, C, L) to (B, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(2)


def sequence_blueprint(name: str, image: Image, num_classes: int) -> Blueprint:
    """Return a network whose boundaries are (B, C, L)."""
    length = image[1] * image[2]
    short = BlockOutput((16, length // 2), "ct")
    return _join(
        name,
        image,
        num_classes,
        [
            (
                lambda: nn.Sequential(Flatten(), nn.Conv1d(image[0], 8, 3, padding=1)),
                BlockOutput((8, length), "ct"),
            ),
            (
                lambda: nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU()),
                BlockOutput((8, length), "ct"),
            ),
            (lambda: nn.Conv1d(8, 16, 2, 2), short),
            (lambda: nn.Sequential(nn.Conv1d(16, 16, 3, padding=1), nn.ReLU()), short),
        ],
        lambda: nn.Sequential(Mean(), nn.Linear(16, num_classes)),
    )


def _join(
    name: str,
    image: Image,
    num_classes: int,
    parts: list[tuple[Callable[[], nn.Module], BlockOutput]],
    tail: Callable[[], nn.Module],
) -> Blueprint:
    blocks = [Block(f"b{i}", f"b{i}.", build) for i, (build, _) in enumerate(parts)]
    return Blueprint(
        name,
        tuple(blocks),
        Block("tail", "tail.", tail),
        Classification(num_classes),
        image,
        recorded_outputs=tuple(output for _, output in parts),
    )


@contextmanager
def registered() -> Iterator[None]:
    """Enter a context in which the networks of this module are values of `model.name`."""
    models = cast(dict[str, str], registry.MODELS)
    names = (*NAMES, "hand_unreached")
    for name in names:
        models[name] = f"{__name__}:{name.removeprefix('hand_')}_blueprint"
    try:
        yield
    finally:
        for name in names:
            del models[name]


# -- Pipelines


def _work_through(rank: int, world: int, folder: Path, jobs: list[dict[str, Any]]) -> None:
    """Work like the harness, in a process that knows the networks of this module."""
    with registered():
        _HARNESS_WORK(rank, world, folder, jobs)


_HARNESS_WORK = harness._work_through


def digests(jobs: Sequence[Config], processes: int, folder: Path) -> list[str]:
    """Train every configuration in turn in the same processes, as `harness.digests` does."""
    harness._work_through = _work_through
    try:
        return harness.digests(jobs, processes, folder)
    finally:
        harness._work_through = _HARNESS_WORK


def settings(run_dir: Path, name: str, **sections: dict[str, Any]) -> Resolved:
    """Return a configuration of a network of this module on few small images."""
    base: dict[str, dict[str, Any]] = {
        "model": {"name": name},
        "data": {"samples": 40, "batch_size": 8},
        "optim": {"epochs": 1, "lr": 0.05},
    }
    for section, keys in sections.items():
        base[section] = {**base.get(section, {}), **keys}
    return harness.settings(run_dir, **base)

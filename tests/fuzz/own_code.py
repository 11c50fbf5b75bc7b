"""Networks and objectives of a user who makes mistakes, as `tests.fuzz.own_code:NAME`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from localpipe import LocalLoss, Site

NETWORKS = ("raises", "leaves", "returns_nothing", "is_empty", "is_wide", "wants_more", "NUMBER")
OBJECTIVES = (
    "RefusesOptions", "NeedsAnOption", "OddAnnotation", "OddDefault", "NoOptions", "RaisesInside",
    "LeavesInside", "ReturnsNothing", "LongError",
)  # fmt: skip
NUMBER = 3


def raises() -> nn.Sequential:
    raise ValueError("line one\nline two")


def leaves() -> nn.Sequential:
    sys.exit("leaving")


def returns_nothing() -> None:
    return None


def is_empty() -> nn.Sequential:
    return nn.Sequential()


def is_wide(num_classes: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 10**9), nn.Linear(10**9, num_classes))


def wants_more(width: int, *rest: int, **others: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, width), nn.Linear(width, 10))


class Sound(LocalLoss):
    """The task's loss of a linear layer on the pooled activation."""

    @dataclass(frozen=True)
    class Options:
        scale: float = 1.0

    def __init__(self, options: Any, site: Site) -> None:
        super().__init__()
        self.task = site.blueprint.task
        features, classes = site.example().numel(), self.task.num_classes
        layers = nn.Flatten(), nn.Linear(features, classes)
        self.head = site.unit("head", lambda: nn.Sequential(*layers))

    def exit(self, h: Tensor) -> Tensor | None:
        logits: Tensor = self.head(h)
        return logits


class RefusesOptions(Sound):
    @dataclass(frozen=True)
    class Options:
        scale: float = 1.0

        def __post_init__(self) -> None:
            raise ValueError(f"scale {self.scale}\nis refused")


class NeedsAnOption(Sound):
    @dataclass(frozen=True)
    class Options:
        scale: float


class OddAnnotation(Sound):
    @dataclass(frozen=True)
    class Options:
        scale: NoSuchName = 1.0  # type: ignore[name-defined]  # noqa: F821


class OddDefault(Sound):
    @dataclass(frozen=True)
    class Options:
        scale: object = nn.Identity()  # noqa: RUF009


class NoOptions(nn.Module):
    pass


class RaisesInside(Sound):
    def exit(self, h: Tensor) -> Tensor | None:
        raise RuntimeError("first line\nsecond line")


class LeavesInside(Sound):
    def __init__(self, options: Any, site: Site) -> None:
        super().__init__(options, site)
        sys.exit(3)


class ReturnsNothing(Sound):
    def exit(self, h: Tensor) -> Tensor | None:
        return None


class LongError(Sound):
    def exit(self, h: Tensor) -> Tensor | None:
        raise RuntimeError("\x1b[31m" + "long " * 5000)

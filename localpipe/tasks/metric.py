"""The figure that a task is judged by, and how it is written. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """A metric's name, and whether a higher or a lower value is better.

    is_fraction: it lies in 0..1 and is shown in per cent.
    """

    name: str
    better: Literal["higher", "lower"] = "higher"
    is_fraction: bool = False

    @property
    def words(self) -> str:
        """The name as text, `mean iou` for `mean_iou`."""
        return self.name.replace("_", " ")

    @property
    def scale(self) -> int:
        """The factor of a value that is shown: 100 for per cent, else 1."""
        return 100 if self.is_fraction else 1

    def sort_key(self, value: float | None) -> float:
        """Return a number that is larger for a better value, and the smallest for None or NaN."""
        if value is None or math.isnan(value):
            return -math.inf
        if self.better == "higher":
            return value
        return -value

    def format(self, value: float | None, digits: int = 1, missing: str = "-") -> str:
        """Return a value as text: `12.5 %` of a fraction, else a number of 3 more digits."""
        if value is None:
            return missing
        if self.is_fraction:
            return f"{100 * value:.{digits}f} %"
        return f"{value:.{digits + 3}f}"

    def as_json(self) -> dict[str, Any]:
        """Return `name`, `better` and `is_fraction`, for a record."""
        return {"name": self.name, "better": self.better, "is_fraction": self.is_fraction}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> Metric:
        """Return the metric of a record with the key `metric`, accuracy for an older record."""
        entry = record.get("metric")
        if not isinstance(entry, dict):
            return ACCURACY
        return Metric(entry["name"], entry["better"], entry.get("is_fraction", False))


ACCURACY = Metric("accuracy", "higher", is_fraction=True)
# Of networks with more than five classes, beside the accuracy.
TOP5_ACCURACY = Metric("top5_accuracy", "higher", is_fraction=True)

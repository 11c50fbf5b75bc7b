"""Reduces a row to its smallest part that still shows the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def reduce_items(
    items: Sequence[T], shows: Callable[[Sequence[T]], bool], likely: Sequence[T] = ()
) -> list[T]:
    """Return a part of `items` that shows the same, and of which every item is needed.

    shows: whether a part shows it. All items together do. likely: a part that is tried first.
    Halves are tried before single items, so a part of two of sixty takes some fifteen trials.
    """
    kept = list(items)
    if likely and len(likely) < len(kept) and shows(likely):
        kept = list(likely)
    size = max(len(kept) // 2, 1)
    while True:
        start = 0
        while start < len(kept):
            rest = kept[:start] + kept[start + size :]
            if shows(rest):
                kept = rest
            else:
                start += size
        if size == 1:
            return kept
        size //= 2

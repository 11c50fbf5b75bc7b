"""The words of data.augment: what happens to a training image, and to a whole batch of them.

A list is applied in its order: a crop, then changes of single images, then mixtures of two images.
A word may have a number, as `mixup:0.8`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Augment = str | tuple[str, ...]  # one word, or several

MASKED = "scale_crop_flip"  # of images with masks
CROPS = ("crop_flip", "crop", "resized_crop_flip", MASKED)


@dataclass(frozen=True)
class _Number:
    """The number of a word: its default, and the range that it is in."""

    default: float
    least: float
    most: float
    expected: str
    is_whole: bool = False


_UNIT = "above 0 and at most 1"
_POSITIVE = "above 0"
_TINY = 1e-6
# Changes of a single image.
CHANGES: Mapping[str, _Number] = {
    "randaugment": _Number(9, 0, 30, "a whole magnitude from 0 to 30", True),
    "colour": _Number(0.4, _TINY, 1, f"a strength {_UNIT}"),
    "erasing": _Number(0.25, _TINY, 1, f"a probability {_UNIT}"),
    "cutout": _Number(16, 1, math.inf, "a side in whole pixels", True),
}
# Mixtures of two images of a batch. The number is alpha of a Beta distribution.
MIXTURES: Mapping[str, _Number] = {
    "mixup": _Number(0.2, _TINY, math.inf, f"an alpha {_POSITIVE}"),
    "cutmix": _Number(1, _TINY, math.inf, f"an alpha {_POSITIVE}"),
}
_NUMBERS = {**CHANGES, **MIXTURES}
WORDS = ("none", *CROPS, *_NUMBERS)


@dataclass(frozen=True)
class Augmentation:
    """What data.augment asks for, read from its words.

    crop: one of CROPS, or None. changes, mixtures: (word, number), in the order of the list.
    """

    crop: str | None
    changes: tuple[tuple[str, float], ...] = ()
    mixtures: tuple[tuple[str, float], ...] = ()

    @property
    def flips(self) -> bool:
        """Whether half of the images are mirrored."""
        return self.crop in ("crop_flip", "resized_crop_flip")

    @property
    def blends(self) -> bool:
        """Whether a batch may hold weighted sums of images, which are no bytes any more."""
        return any(word == "mixup" for word, _ in self.mixtures)


def write_words(value: Any) -> Any:
    """Return data.augment in its one spelling, each word with its number where it has one.

    value: a text of words and commas, a list of words, or of mappings of a word to its number. One
    word alone is a text, several are a tuple. Any other value is returned unchanged. Raises
    ValueError for an unknown word, and for what is no number.
    """
    if isinstance(value, str):
        value = value.split(",")
    elif isinstance(value, Mapping):
        value = [{word: number} for word, number in value.items()]
    if not isinstance(value, list | tuple):
        return value
    words = tuple(_write_word(word) for word in value)
    if not words:
        return "none"
    if len(words) == 1:
        return words[0]
    return words


def read_words(augment: Augment) -> Augmentation:
    """Return what words ask for. augment: as `write_words` gives it. `auto` is not read."""
    crop, changes, mixtures = None, [], []
    for text in list_words(augment):
        word, _, number = text.partition(":")
        if word in CROPS:
            crop = word
        elif word in CHANGES:
            changes.append((word, float(number)))
        elif word in MIXTURES:
            mixtures.append((word, float(number)))
    return Augmentation(crop, tuple(changes), tuple(mixtures))


def list_words(augment: Augment) -> tuple[str, ...]:
    """Return the words as a tuple, which is empty for `none`."""
    words = (augment,) if isinstance(augment, str) else tuple(augment)
    return tuple(word for word in words if word != "none")


def fill_auto(augment: Augment, own: Augment) -> Augment:
    """Return the words with those of the data set in place of `auto`."""
    words: list[str] = []
    for word in list_words(augment):
        words += list_words(own) if word == "auto" else [word]
    filled: Augment = write_words(words)
    return filled


def fits_auto(augment: Any, recorded: Any) -> bool:
    """Return whether words with `auto` in their list may have become the recorded ones."""
    if not isinstance(augment, list | tuple) or "auto" not in augment:
        return False
    rest = list(augment[1:])
    words = list(list_words(recorded if isinstance(recorded, str) else tuple(recorded)))
    return words in [rest, *([crop, *rest] for crop in CROPS)]


def find_problem(augment: Augment) -> str | None:
    """Return what is wrong with words that are known, and what to do, or None."""
    words = (augment,) if isinstance(augment, str) else augment
    names = [word.partition(":")[0] for word in words]
    for name in names:
        if names.count(name) > 1:
            return f"has {name} twice; leave one of them out"
    if "none" in names and len(names) > 1:
        return "has none beside other words; leave none out"
    kinds = [_find_kind(name) for name in names]
    if kinds.count(0) > 1:
        return f"has both {names[0]} and {names[kinds.index(0, 1)]}; leave one of them out"
    if kinds != sorted(kinds):
        ordered = [word for _, word in sorted(zip(kinds, words, strict=True), key=_first)]
        return (
            f"has {', '.join(words)}, but a crop comes first and mixtures of images last; "
            f"set data.augment=[{','.join(ordered)}]"
        )
    for word in words:
        problem = _check_number(word)
        if problem is not None:
            return problem
    return None


def _first(pair: Sequence[Any]) -> Any:
    return pair[0]


def _find_kind(name: str) -> int:
    """Return 0 for a crop, 1 for a change, 2 for a mixture: the order of a list."""
    if name in CHANGES:
        return 1
    if name in MIXTURES:
        return 2
    return 0


def _write_word(value: Any) -> str:
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, number),) = value.items()
        value = f"{name}:{number}"
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no word of data.augment")
    name, colon, number = value.strip().partition(":")
    is_known = name == "auto" or name in WORDS
    if not is_known or (colon and name not in _NUMBERS):
        raise ValueError(f"{value!r} is no word of data.augment")
    if name not in _NUMBERS:
        return name
    strength = float(number) if colon else _NUMBERS[name].default
    return f"{name}:{strength:g}"


def _check_number(word: str) -> str | None:
    name, _, number = word.partition(":")
    limits = _NUMBERS.get(name)
    if limits is None:
        return None
    value = float(number)
    fits = math.isfinite(value) and limits.least <= value <= limits.most
    if fits and (not limits.is_whole or value == int(value)):
        return None
    example = f"{name}:{limits.default:g}"
    return f"has {word}, expected {limits.expected}; write {example}"

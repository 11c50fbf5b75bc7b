"""Values of a key, drawn from its declared type: those that it accepts, and odd ones."""

from __future__ import annotations

import random
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from localpipe.config import registry
from localpipe.config.explain import is_section
from localpipe.config.keys import CONTEXT_MODES, TableName

# Texts that end a line, that a terminal obeys, or that something takes for syntax.
ODD_TEXTS = (
    "", " ", "~", "null", "auto", "none", "all", "é", "日本語", "\U0001f600", "a\nb", "a\r\nb",
    "\x1b[31mred", "\u202etxt", "\u2028", "\udcff", "x" * 300, "x" * 70_000, "1,2", "1,,2", ",",
    "[1", "{", "'", '"', "%s {} {0}", "--help", "-1", "=", "a=b", "..", "/dev/null",
    "/proc/nowhere/x", "/proc/self/mem", "~no_such_user/x", "own.py", "a:b", ":", "a:",
    ":b", "a:b:c",
    "no_such_module:x", "nowhere.py:x", "tests.fuzz.own_code:raises", "0x10", "1e400", "１２",
)  # fmt: skip
ODD_NUMBERS = (
    0, 1, 2, 3, -1, 7, 1000, 10**6, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30,
    -(10**30), 10**400, 0.0, -0.0, 0.5, 1.0, 2.5, 1e-320, 1e-30, 1e30, 1e308,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
ODD_OTHERS: tuple[Any, ...] = (
    None, True, False, [], [1], [1, 2], [3, 2, 1], [1, 1], [0], [-1], [0.5, 0.5, 0.5], [1] * 3000,
    ["a"], ["a", 1], ["a", "a"], [None], [[1]], [[]], {}, {"a": 1}, {1: 2}, {"name": "dgl"},
    {"name": None}, {"": ""}, {True: False}, {"a": {"b": {"c": [1]}}},
)  # fmt: skip
# Names that the types do not list, by the key that takes them.
NAMES: Mapping[str, Sequence[str]] = {
    "model.name": [*registry.MODELS, "tests.sample_networks:small", "tests.sample_networks:flat"],
    "data.name": list(registry.DATASETS),
}
_TEXTS = ("a", "runs/x", "data", "images.npz", "pictures", "tests.sample_networks:plain")
_MODES = ("none", "E", "R1", "R1E", "R2", "R4E", "R16")


def draw_value(annotation: Any, dice: random.Random, key: str = "") -> Any:
    """Return a value that an annotation accepts, small where it is a number. key: for names."""
    if key in NAMES:
        return dice.choice(NAMES[key])
    limits: list[Any] = []
    if typing.get_origin(annotation) is Annotated:
        annotation, *limits = typing.get_args(annotation)
    for limit in limits:
        if isinstance(limit, TableName):
            return dice.choice(limit.list_choices())
    if any(item.get("pattern") == CONTEXT_MODES for item in _constraints(limits)):
        return dice.choice(_MODES)
    return _draw_plain(annotation, limits, dice)


def draw_odd(annotation: Any, dice: random.Random, key: str = "") -> Any:
    """Return a value that a key may refuse: of another type, out of range, or misspelt."""
    kind = dice.random()
    if kind < 0.3:
        return dice.choice(ODD_NUMBERS)
    if kind < 0.55:
        return dice.choice(ODD_TEXTS)
    if kind < 0.75:
        return dice.choice(ODD_OTHERS)
    value = draw_value(annotation, dice, key)
    if isinstance(value, str) and value:
        return misspell(value, dice)
    return dice.choice([[value], str(value), {"value": value}, [value, value], -1, None])


def misspell(word: str, dice: random.Random) -> str:
    """Return a word with one fault that a person makes. word: not empty."""
    index = dice.randrange(len(word))
    faults: Sequence[Callable[[], str]] = (
        lambda: word[:index] + word[index + 1 :],
        lambda: word[:index] + word[index] + word[index:],
        lambda: word.upper(),
        lambda: f" {word} ",
        lambda: word + dice.choice("s_-.2é"),
        lambda: word.replace("_", "-"),
    )
    return dice.choice(faults)()


def _draw_plain(annotation: Any, limits: Sequence[Any], dice: random.Random) -> Any:
    """Return a value of an annotation without names; limits: pydantic's, of a number."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return dice.choice(arguments)
    if origin in (typing.Union, types.UnionType):
        return draw_value(dice.choice(arguments), dice)
    if origin is tuple:
        return _draw_list(arguments, dice)
    if annotation is bool:
        return dice.random() < 0.5
    if annotation is int:
        return _lowest(limits, 0) + dice.choice((0, 1, 1, 2, 3, 4, 7))
    if annotation is float:
        return _lowest(limits, 0) + dice.choice((0.0, 1e-3, 0.1, 0.5, 0.9, 1.0, 10.0))
    if annotation is str:
        return dice.choice(_TEXTS)
    if origin is dict or is_section(annotation):
        return {}
    return None


def _draw_list(arguments: Sequence[Any], dice: random.Random) -> list[Any]:
    """Return a list of the annotation `tuple[arguments]`; numbers rise, as cuts do."""
    if arguments[-1] is not ...:
        return [draw_value(argument, dice) for argument in arguments]
    values = [draw_value(arguments[0], dice) for _ in range(dice.choice((1, 1, 2, 3, 3)))]
    if arguments[0] is not str and dice.random() < 0.7:
        values.sort()
    return values


def _constraints(limits: Sequence[Any]) -> list[Mapping[str, Any]]:
    """Return pydantic's limits as mappings: a Field holds them in a list, a model one by one."""
    found: list[Mapping[str, Any]] = []
    for limit in limits:
        for item in getattr(limit, "metadata", [limit]):
            names = ("ge", "gt", "pattern")
            found.append({name: getattr(item, name) for name in names if hasattr(item, name)})
    return found


def _lowest(limits: Sequence[Any], default: int) -> Any:
    """Return the smallest number that limits allow, for `gt` the limit itself plus one."""
    for item in _constraints(limits):
        if "ge" in item:
            return item["ge"]
        if "gt" in item:
            return item["gt"] + 1
    return default

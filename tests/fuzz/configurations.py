"""Configurations made from the keys' own table, as a YAML file and words of a command line."""

from __future__ import annotations

import inspect
import random
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from localpipe.config import registry
from localpipe.config.explain import find_declared_type, is_section
from localpipe.config.keys import Config
from localpipe.config.options import make_options_model
from tests.fuzz import own_code
from tests.fuzz.values import ODD_OTHERS, ODD_TEXTS, draw_odd, draw_value, misspell

FILE = "case.yaml"
# A run that takes no time. What is drawn comes over it.
QUICK: Mapping[str, Any] = {
    "model.name": "resnet8",
    "pipeline.stages": 2,
    "pipeline.processes": 1,
    "data.name": "synthetic",
    "data.samples": 48,
    "data.image_size": 8,
    "data.batch_size": 8,
    "optim.max_steps": 2,
    "run.dir": "run",
    "run.threads": 1,
}
# Drawn in place of what would make most cases slow: large networks, compiling, a measured cut.
_SLOW: Mapping[str, tuple[float, Sequence[Any]]] = {
    "model.name": (0.06, ("resnet8", "chain", "resnet14", "tests.sample_networks:small")),
    "run.capture": (0.1, ("none", "graphs")),
    "pipeline.cuts": (0.02, ("equal", "layerwise", [0], [1], [0, 1], [0, 1, 2])),
}
_CHAIN = {"message_bytes": 4096, "time_ms": 0.1}


@dataclass(frozen=True)
class Case:
    """A file, and the words after it. The file's name is FILE; its text may be no YAML at all."""

    text: bytes
    words: tuple[str, ...]


def make_configuration(dice: random.Random, folder: Path) -> Case:
    """Return a case whose keys are drawn. folder: where the command will run; nothing is written.

    One of three is a faultless configuration, the others have one odd thing or more.
    """
    values = dict(QUICK)
    _draw_method(values, dice)
    for key in dice.sample(sorted(_list_keys()), dice.choice((0, 1, 2, 3, 5, 8))):
        values[key] = _draw_key(key, dice)
    if values["model.name"] == "chain":
        values["model.args"] = dict(_CHAIN)
    if dice.random() < 0.15:
        values["model.args"] = _draw_arguments(str(values["model.name"]), dice)
    for _ in range(dice.choice((0, 0, 0, 1, 1, 2))):
        _add_odd(values, dice)
    return split_case(values, dice)


def split_case(values: Mapping[str, Any], dice: random.Random) -> Case:
    """Return a case of `{"section.key": value}`, some in the file and some as words."""
    share = dice.choice((0.0, 0.3, 1.0))
    in_file: dict[str, Any] = {}
    words = []
    for key, value in values.items():
        if dice.random() < share:
            words.append(f"{key}={to_word(value)}")
            continue
        _put(in_file, key, value)
    if words and dice.random() < 0.05:
        words[dice.randrange(len(words))] = _spoil_word(dice.choice(words), dice)
    text = to_yaml(in_file)
    if dice.random() < 0.12:
        text = _spoil_text(text, dice)
    return Case(text, tuple(word.replace("\0", "") for word in words))


def to_word(value: Any) -> str:
    """Return a value as YAML in one line, as a person would write it after `section.key=`."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def to_yaml(data: Any) -> bytes:
    """Return YAML of nested values, as UTF-8; a lone surrogate stays an escape."""
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return text.encode("utf-8", "backslashreplace")


@cache
def _list_keys() -> dict[str, Any]:
    """Return the declared type of every key of a configuration by its name, but of the method."""

    def walk(model: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, field in model.model_fields.items():
            if is_section(field.annotation):
                yield from walk(field.annotation, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", find_declared_type(model, [name])

    keys = dict(walk(Config, ""))
    del keys["method.objective"], keys["model.args"]
    return keys


def draw_key(key: str, dice: random.Random) -> Any:
    """Return a value that a key of the table accepts."""
    return draw_value(_list_keys()[key], dice, key)


def list_keys(section: str = "") -> list[str]:
    """Return the names of all keys of a section, sorted, or of all sections."""
    return sorted(key for key in _list_keys() if key.startswith(section))


def _draw_key(key: str, dice: random.Random) -> Any:
    if key in _SLOW:
        share, quick = _SLOW[key]
        if dice.random() > share:
            return dice.choice(quick)
    return draw_key(key, dice)


def _draw_method(values: dict[str, Any], dice: random.Random) -> None:
    """Add a method: a preset, or an objective with some of its options."""
    kind = dice.random()
    if kind < 0.3:
        return
    if kind < 0.5:
        values["method"] = dice.choice(sorted(registry.METHODS))
        return
    name = dice.choice(sorted(registry.OBJECTIVES))
    cls = registry.look_up(registry.OBJECTIVES, name, "fuzz")
    values["method.objective.name"] = name
    _draw_options(values, "method.objective.", make_options_model(cls.Options), dice)


def _draw_options(values: dict[str, Any], prefix: str, model: Any, dice: random.Random) -> None:
    for option in model.model_fields:
        if dice.random() < 0.2:
            declared = find_declared_type(model, [option])
            draw = draw_odd if dice.random() < 0.2 else draw_value
            values[prefix + option] = draw(declared, dice)


def _draw_arguments(network: str, dice: random.Random) -> Any:
    """Return `model.args`: those of the network, or anything."""
    if network not in registry.MODELS or dice.random() < 0.2:
        return dice.choice([*ODD_OTHERS, {"width": 4}, {"width": 0}, {"width": "x"}, {"": 1}])
    function = registry.look_up(registry.MODELS, network, "fuzz")
    hints = typing.get_type_hints(function, include_extras=True)
    arguments = dict(_CHAIN) if network == "chain" else {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and dice.random() < 0.5:
            draw = draw_odd if dice.random() < 0.4 else draw_value
            arguments[name] = draw(hints[name], dice)
    return arguments


def _add_odd(values: dict[str, Any], dice: random.Random) -> None:
    """Put one odd thing into a configuration."""
    kind = dice.random()
    key = dice.choice(sorted(_list_keys()))
    section, _, name = key.rpartition(".")
    if kind < 0.6:
        values[key] = draw_odd(_list_keys()[key], dice, key)
    elif kind < 0.68:
        values[f"{section}.{misspell(name, dice)}"] = draw_value(_list_keys()[key], dice, key)
    elif kind < 0.72:
        values[f"{misspell(section, dice)}.{name}"] = draw_value(_list_keys()[key], dice, key)
    elif kind < 0.78:
        values[section] = dice.choice([*ODD_OTHERS, *ODD_TEXTS])
    elif kind < 0.84:
        values["model.name"] = f"tests.fuzz.own_code:{dice.choice(own_code.NETWORKS)}"
    elif kind < 0.92:
        name = dice.choice(own_code.OBJECTIVES)
        values.pop("method", None)
        values["method.objective.name"] = f"tests.fuzz.own_code:{name}"
    else:
        option = dice.choice(("name", "weight", "task", "head", "mode", "x"))
        values[f"method.objective.{option}"] = dice.choice([*ODD_OTHERS, *ODD_TEXTS])


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    """Set a key with dots in nested mappings, as far as they are mappings."""
    *sections, name = key.split(".")
    for section in sections:
        inner = data.setdefault(section, {})
        if not isinstance(inner, dict):
            return
        data = inner
    data[name] = value


def _spoil_word(word: str, dice: random.Random) -> str:
    """Return a word of the command line with a fault in its form."""
    key, _, value = word.partition("=")
    return dice.choice(
        (key, f"={value}", f".={value}", f"{key}.deeper={value}", f"{key}==", f"--{word}",
         f"-{word}", f" {key} = {value} ", "", " ", "=", f"{key}: {value}", f"{key}.={value}",
         f"{word}\n", f"{key}=", f"a.{word}", f"schema={value}", f"{word},{word}", "--json=x")
    )  # fmt: skip


def _spoil_text(text: bytes, dice: random.Random) -> bytes:
    """Return a file's text with a fault: of its encoding, its form, or its size."""
    where = dice.randrange(len(text) + 1)
    faults: Sequence[Callable[[], bytes]] = (
        lambda: text[:where],
        lambda: text[:where] + bytes([dice.randrange(256)]) + text[where:],
        lambda: text[:where] + dice.choice(_PIECES).encode() + text[where:],
        lambda: dice.choice(_PIECES).encode() + b"\n" + text,
        lambda: text + b"\n" + dice.choice(_PIECES).encode() + b"\n",
        lambda: text.replace(b"\n", b"\r\n"),
        lambda: b"\xef\xbb\xbf" + text,
        lambda: text.decode("utf-8", "replace").encode("utf-16"),
        lambda: text + text,
        lambda: b"model: &m\n  args: *m\n" + text,
        lambda: _make_bomb(dice.choice(("model", "method", "data", "x"))) + text,
        lambda: _make_merges() + text,
        lambda: b"data: {name: " + b"[" * 3000 + b"]" * 3000 + b"}\n",
        lambda: b"optim: {stages: {" + b", ".join(b"%d: 1" % i for i in range(3000)) + b"}}\n",
        lambda: b"bench: {systems: [" + b"a, " * 5000 + b"a]}\n",
    )
    return dice.choice(faults)()


_PIECES = (
    "---", "...", "%YAML 1.3", "\t", "\0", "? {a: 1}\n: 2", "!!python/object/apply:os.getcwd []",
    "!!binary aGk=", "!!set {a, b}", "!!omap [a: 1]", "!!timestamp 2024-13-99", "!!int x",
    "!!float nan.", "!!null x", "!!bool maybe", "!local x", "<<: {a: 1}", "<<: [1]", "&a a: *b",
    "run: {seed: " + "9" * 5000 + "}", "run: {seed: 0x" + "f" * 5000 + "}", "a: 1: 2", "- a",
    "schema: 2", "schema: {}", "1: {}", "null: 1", "true: {a: 1}", "[]: 1", "? [a]\n: 1",
    "data:", "data: {root: !!binary /w==}", "data: {batch_size: 1_0}", "run: {dir: 2024-01-01}",
    "\u2028", "\ufeff", "# only a comment", "optim: {lr: 1:30}", "optim: {lr: 1e}", "'",
)  # fmt: skip


def _make_bomb(section: str) -> bytes:
    """Return a few lines whose aliases stand for a billion values."""
    lines = [f"{section}:", "  a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, 10):
        aliases = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"  a{level}: &a{level} [{aliases}]")
    lines += ["  args: {a: *a9}", "  objective: {name: *a9}", "  name: *a9", "  classes: *a9", ""]
    return "\n".join(lines).encode()


def _make_merges() -> bytes:
    """Return a few lines whose merges of merges stand for a billion keys."""
    lines = ["run:", "  a0: &a0 {k0: 1, k1: 2, k2: 3}"]
    for level in range(1, 20):
        aliases = ", ".join([f"*a{level - 1}"] * 3)
        lines.append(f"  a{level}: &a{level} {{<<: [{aliases}]}}")
    return "\n".join([*lines, ""]).encode()

"""What an advice names: keys with values, flags, commands, and whether each exists."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from functools import cache

import localpipe
from localpipe import config as configs
from localpipe.cli.command_line import build_parser
from localpipe.config import registry
from localpipe.config.explain import find_declared_type
from localpipe.config.keys import Config
from localpipe.config.load import apply_overrides
from localpipe.errors import UserError

_SECTIONS = "|".join(Config.model_fields)
# A field of a template is `{...}`, so a value may be one.
_KEY = re.compile(
    rf"(?<![\w./{{\[])(?P<key>(?:{_SECTIONS})(?:\.[a-z][a-z0-9_]*)+)(?:=(?P<value>\{{[^}}]*\}}|\[[^\]]*\]|[^\s,;:)`\"']+))?"
)
_FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
_COMMAND = re.compile(r"\blocalpipe ([a-z]+)\b(?=[^a-z]*(?:--|[A-Z]|`|RUN))")
_PUBLIC = re.compile(r"\blocalpipe\.([A-Z]\w+)")
# Of one of these every field must be able to be: a number, numbers, a name, a path.
_EXAMPLES = ("4", "3,7", "dgl", "file.py:name", "null", "0.5")
# Flags of other programs, which only these texts name.
_FOREIGN = frozenset(
    ["--gpus", "--shm-size", "--ipc", "--ulimit", "--upgrade", "--max-restarts", "--pid"]
)


def find_faults(text: str) -> Iterator[str]:
    """Yield what a text names that does not exist, or a value that its key does not take."""
    for match in _KEY.finditer(text):
        yield from _check_key(match["key"], match["value"])
    for flag in _FLAG.findall(text):
        if flag not in _FOREIGN and flag not in _flags():
            yield f"{flag} is no flag of any command"
    for command, flag in re.findall(r"\b([a-z]+)`? (--[a-z-]+[a-z])", text):
        if command in _commands() and flag not in _FOREIGN and flag not in _commands()[command]:
            yield f"{flag} is no flag of {command}"
    for command in _COMMAND.findall(text):
        if command not in registry.COMMANDS:
            yield f"{command} is no command"
    for name in _PUBLIC.findall(text):
        if name not in localpipe.__all__:
            yield f"localpipe.{name} is not public"


def find_keys(text: str) -> Iterator[str]:
    """Yield every `section.key` that a text names."""
    for match in _KEY.finditer(text):
        yield match["key"]


def _check_key(key: str, value: str | None) -> Iterator[str]:
    path = key.split(".")
    if path[:2] not in (["method", "objective"], ["model", "args"]):
        try:
            find_declared_type(Config, path)
        except (KeyError, AttributeError):
            yield f"{key} is no key"
            return
    if value is not None and not any(_is_accepted(key, text) for text in _fill(value)):
        yield f"{key} does not take {value}"


def _fill(value: str) -> list[str]:
    """Return the values that a text with fields may stand for."""
    if "{" not in value:
        return [value.rstrip(".")]
    return [re.sub(r"\{[^}]*\}", example, value) for example in _EXAMPLES]


def _is_accepted(key: str, value: str) -> bool:
    """Return whether the command line takes a value for a key, whatever other keys say."""
    try:
        configs.parse(apply_overrides({}, [f"{key}={value}"]), "test")
    except UserError as error:
        return f"{key} must be" not in str(error) and f"{key} is not" not in str(error)
    return True


@cache
def _commands() -> Mapping[str, frozenset[str]]:
    """Return the flags of every command."""
    _, parsers = build_parser()
    return {name: _read_flags(parser) for name, parser in parsers.items()}


@cache
def _flags() -> frozenset[str]:
    parser, _ = build_parser()
    return frozenset().union(*_commands().values(), _read_flags(parser))


def _read_flags(parser: argparse.ArgumentParser) -> frozenset[str]:
    return frozenset(re.findall(r"(?<![\w-])--[\w-]+", parser.format_help()))

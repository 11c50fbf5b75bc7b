"""The error line of a wrong key or value: what was expected, what came, what is near."""

from __future__ import annotations

import json
import re
import shlex
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel
from pydantic_core import ErrorDetails

from localpipe.config.keys import CONTEXT_MODES, DEVICES, STEP_INTERVAL, Described, TableName
from localpipe.config.yaml_file import load_yaml
from localpipe.errors import find_nearest, suggest

_TYPE_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}
_PATTERNS: dict[str | None, str] = {
    CONTEXT_MODES: "one of none, E, Rn, RnE with a number n, as R1 or R4E",
    STEP_INTERVAL: "`N steps`",
    DEVICES: "cpu, cpu:N or cuda:N",
}
# A limit so far from what is meant would only make a text longer.
_NOT_NAMED = 1000
_PLURALS: dict[Any, str] = {**_TYPE_NAMES, int: "whole numbers", float: "numbers"}


def explain(model: type[BaseModel], errors: list[ErrorDetails], source: str) -> str:
    """Return pydantic's first error as one line: the key, what was expected and what came.

    model: the class of the whole configuration. errors: those of one ValidationError, at least one.
    source: where the values came from, in parentheses in the line.
    """
    first = errors[0]
    path, declared = _follow(model, first["loc"])
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        assert isinstance(declared, type) and issubclass(declared, BaseModel)
        return _explain_unknown(declared, key, str(first["loc"][len(path)]), source)
    if is_section(declared):
        return f"config: {key} must be a mapping of keys ({source}); got {quote(first['input'])}"

    declared = find_declared_type(model, path)
    value = _find_input(errors, len(path))
    advice = ""
    if isinstance(value, str):
        nearest = find_nearest(value, _list_choices(declared))
        if nearest is not None:
            advice = f"; did you mean {nearest}?"
    advice += advise_on_limit(errors)
    expected = describe_type(declared)
    if expected.startswith("text") and isinstance(value, int | float):
        advice = "; put it in quotes"
    if expected.startswith("text") and value is None:
        advice = "; a text that begins with # needs quotes"
    return f"config: {key} must be {expected} ({source}); got {quote(value)}{advice}"


def is_section(annotation: Any) -> bool:
    """Return whether an annotation is a class of keys, like the sections of a configuration.

    It is True for every subclass of pydantic's BaseModel, and False for anything else.
    """
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def find_declared_type(model: Any, path: Sequence[str]) -> Any:
    """Return the annotation of the key at a path of a model, with its limits.

    model: a BaseModel class. path: at least one key. Limits make it an Annotated. Raises KeyError
    if there is no such key.
    """
    for part in path[:-1]:
        model = model.model_fields[part].annotation
    field = model.model_fields[path[-1]]
    if not field.metadata:
        return field.annotation
    return Annotated[(field.annotation, *field.metadata)]


def describe_type(annotation: Any, plural: bool = False) -> str:
    """Return in words what an annotation accepts, as `a whole number at least 1 or null`.

    plural: describe the items of a list, as `whole numbers at least 1`. It never raises: an
    annotation without words of its own is returned as Python prints it.
    """
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is Annotated:
        return _describe_annotated(arguments[0], arguments[1:], plural)
    if origin is Literal:
        return _describe_choices([str(choice) for choice in arguments])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(argument, plural) for argument in arguments)
    if origin is tuple:
        return _describe_tuple(arguments)
    if origin is dict:
        return "a mapping"
    names = _PLURALS if plural else _TYPE_NAMES
    return names.get(annotation, str(annotation))


def quote(value: Any) -> str:
    """Return a value as an error quotes it, at most 60 characters.

    It is Python's repr, with true, false and null as YAML spells them. A tuple is written as a
    list. A longer text ends in `...`.
    """
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, tuple):
        value = list(value)
    text = repr(value)
    if len(text) > 60:
        return text[:57] + "..."
    return text


def spell_override(key: str, value: Any) -> str:
    """Return `section.key=value` as a shell takes it. Pasted into a command, it sets the value.

    value: as `to_dict` has it.
    """
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and _is_plain(value):
        text = value
    return shlex.quote(f"{key}={text}")


def _is_plain(text: str) -> bool:
    """Return whether YAML reads a text without quotes as that text."""
    try:
        return bool(load_yaml(text) == text)
    except yaml.YAMLError:
        return False


def _follow(model: type[BaseModel], location: Sequence[int | str]) -> tuple[list[str], Any]:
    """Return the keys at the start of an error's location, and the annotation of the last one."""
    path: list[str] = []
    annotation: Any = model
    for part in location:
        if not is_section(annotation) or part not in annotation.model_fields:
            break
        path.append(str(part))
        annotation = annotation.model_fields[str(part)].annotation
    return path, annotation


def _explain_unknown(model: type[BaseModel], key: str, name: str, source: str) -> str:
    """Return the error of an unknown key `name` in the section `key`, "" for the top."""
    prefix = ""
    if key:
        prefix = f"{key}."
    advice = suggest(name, model.model_fields, prefix)
    # A key that lacks its section is likelier than a misspelt section.
    for section, field in model.model_fields.items():
        annotation: Any = field.annotation
        if is_section(annotation) and name in annotation.model_fields:
            advice = f"did you mean {section}.{name}?"
            break
    return f"config: {prefix}{spell(name)} is not a known key ({source}); {advice}"


def spell(key: str) -> str:
    """Return a key as an error names it: in quotes if it is empty or has other signs than words."""
    if re.fullmatch(r"[\w.-]+", key):
        return key
    return quote(key)


def advise_on_limit(errors: Sequence[ErrorDetails]) -> str:
    """Return what to do about a number above a limit that `describe_type` does not name, or ""."""
    for error in errors:
        limit = error.get("ctx", {}).get("le", 0)
        if limit >= _NOT_NAMED:
            return f"; give at most {limit}"
    return ""


def _list_choices(annotation: Any) -> list[str]:
    """Return the names that an annotation accepts."""
    if isinstance(annotation, TableName):
        return annotation.list_choices()
    if typing.get_origin(annotation) is Literal:
        return [str(choice) for choice in typing.get_args(annotation)]
    choices: list[str] = []
    for part in typing.get_args(annotation):
        choices += _list_choices(part)
    return choices


def _find_input(errors: list[ErrorDetails], depth: int) -> Any:
    """Return the value that the first error at this depth of the configuration refuses."""
    for error in errors:
        if len(error["loc"]) >= depth:
            return error["input"]
    return None


def _describe_annotated(annotation: Any, metadata: Sequence[Any], plural: bool) -> str:
    """Return in words what an annotation with pydantic's limits accepts."""
    limits: list[Any] = []
    for item in metadata:
        if isinstance(item, TableName):
            choices = _describe_choices(item.list_choices())
            return f"{choices}, or a list of them" if item.takes_list else choices
        if isinstance(item, Described):
            return item.text
        # A Field holds its limits in a list, a model's field has them one by one.
        limits += getattr(item, "metadata", [item])

    bounds = []
    names = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    for attribute, name in names.items():
        for limit in limits:
            bound = getattr(limit, attribute, None)
            if bound is not None and abs(bound) < _NOT_NAMED:
                bounds.append(f"{name} {bound:g}")
    for limit in limits:
        words_of_pattern = _PATTERNS.get(getattr(limit, "pattern", None))
        if words_of_pattern is not None:
            return words_of_pattern
    words = describe_type(annotation, plural)
    if bounds:
        words += " " + " and ".join(bounds)
    return words


def _describe_choices(choices: Sequence[str]) -> str:
    if len(choices) == 1:
        return choices[0]
    return f"one of {', '.join(choices)}"


def _describe_tuple(arguments: tuple[Any, ...]) -> str:
    """Return in words what `tuple[X, ...]` or `tuple[X, X]` accepts."""
    items = describe_type(arguments[0], plural=True)
    if arguments[-1] is ...:
        return f"a list of {items}"
    return f"a list of {len(arguments)} {items}"

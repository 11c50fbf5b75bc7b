"""A wrong key or value of a configuration, in words: what was expected, what came, what is near."""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from localpipe.config.keys import CONTEXT_MODES
from localpipe.errors import suggest


def explain(model: Any, errors: list[ErrorDetails], source: str) -> str:
    """Turn pydantic's first error into one line with the key, what was expected and what came."""
    first = errors[0]
    root = model
    path: list[str] = []
    for part in first["loc"]:
        fields = model.model_fields
        if part not in fields:
            break
        path.append(str(part))
        model = fields[part].annotation
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            break
    key = ".".join(path)
    if first["type"] == "extra_forbidden":
        prefix = f"{key}." if key else ""
        word = str(first["loc"][len(path)])
        sections = [
            f"{name}.{word}"
            for name, section in _sections(model).items()
            if word in section.model_fields
        ]
        advice = (
            f"did you mean {sections[0]}?"
            if sections
            else suggest(word, model.model_fields, prefix)
        )
        return f"config: {prefix}{word} is not a known key ({source}); {advice}"
    if isinstance(model, type) and issubclass(model, BaseModel):
        return f"config: {key} must be a mapping of keys ({source}); got {quote(first['input'])}"
    declared, value = declared_type(root, path), _value_at(errors, path)
    near = suggest(value, _choices(declared)) if isinstance(value, str) else ""
    advice = f"; {near}" if near.startswith("did") else ""
    return f"config: {key} must be {describe_type(declared)} ({source}); got {quote(value)}{advice}"


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Return the fields of a model that are models themselves."""
    found = {name: field.annotation for name, field in model.model_fields.items()}
    return {
        name: kind
        for name, kind in found.items()
        if isinstance(kind, type) and issubclass(kind, BaseModel)
    }


def _choices(annotation: Any) -> list[str]:
    """Return the words that an annotation accepts."""
    if typing.get_origin(annotation) is Literal:
        return [str(choice) for choice in typing.get_args(annotation)]
    return [word for part in typing.get_args(annotation) for word in _choices(part)]


def declared_type(model: Any, path: list[str]) -> Any:
    """Return what the key at a path of a model is declared as, limits included."""
    for part in path[:-1]:
        model = model.model_fields[part].annotation
    field = model.model_fields[path[-1]]
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def _value_at(errors: list[ErrorDetails], path: list[str]) -> Any:
    return next((error["input"] for error in errors if len(error["loc"]) >= len(path)), None)


def describe_type(annotation: Any) -> str:
    """Say in words what an annotation accepts."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        inner, *metadata = typing.get_args(annotation)
        limits = [limit for item in metadata for limit in getattr(item, "metadata", [item])]
        words = [
            f"at least {limit.ge:g}" for limit in limits if getattr(limit, "ge", None) is not None
        ]
        words += [
            f"at most {limit.le:g}" for limit in limits if getattr(limit, "le", None) is not None
        ]
        if any(getattr(limit, "pattern", None) == CONTEXT_MODES for limit in limits):
            return "one of none, E, Rn, RnE with a number n, as R1 or R4E"
        words += [
            f"above {limit.gt:g}" for limit in limits if getattr(limit, "gt", None) is not None
        ]
        return " ".join([describe_type(inner), *words])
    if origin is Literal:
        choices = [str(choice) for choice in typing.get_args(annotation)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(part) for part in typing.get_args(annotation))
    if origin is tuple:
        first, *others = typing.get_args(annotation)
        count = "" if others == [...] else f"{1 + len(others)} "
        return f"a list of {count}" + describe_type(first).removeprefix("a ").replace(
            "number", "numbers"
        )
    if origin is dict:
        return "a mapping"
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "null",
    }
    return names.get(annotation, str(annotation))


def quote(value: Any) -> str:
    """Return a value as an error quotes it, at most 60 characters."""
    text = repr(list(value)) if isinstance(value, tuple) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

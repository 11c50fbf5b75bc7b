"""Checks of an objective's options and a network's arguments, by the code that declares them."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError, create_model

from localpipe.config import registry
from localpipe.config.explain import (
    advise_on_limit,
    describe_type,
    find_declared_type,
    quote,
    spell,
)
from localpipe.config.keys import Config, Method, Section, list_to_tuple
from localpipe.config.user_code import call_user_code, is_user_code
from localpipe.errors import UserError, suggest

T = TypeVar("T")
C = TypeVar("C", bound=Config)


def complete_objective(config: C, source: str) -> C:
    """Return a copy of a configuration with the objective looked up and all of its options set.

    source: for the errors. A missing name is the default's. A user's objective is imported. Raises
    UserError for a name that the registry lacks, and for options that the class lacks, of a wrong
    type or without a value. Errors of a user's own Options class become UserErrors.
    """
    values = dict(config.method.objective)
    name = values.pop("name", Method().objective["name"])
    if not isinstance(name, str):
        advice = suggest(str(name), registry.OBJECTIVES)
        raise UserError(
            f"config: method.objective.name must be text ({source}); got {quote(name)}; {advice}"
        )

    # The options must be fields of the class's own Options.
    cls = registry.find_objective_class(name, f"config: method.objective.name ({source})")

    def check_options() -> tuple[dict[str, Any], Any]:
        model = make_options_model(cls.Options)
        checked = _validate(model, values, "method.objective", name, source)
        options = checked.model_dump(mode="json")
        return options, cls.Options(**_lists_to_tuples(options))

    options, made = call_objective(name, check_options)

    # Frozen models are copied.
    method = config.method.model_copy(update={"objective": {"name": name, **options}})
    config = config.model_copy(update={"method": method})
    config._objective = cls, made
    return config


def call_objective(name: str, call: Callable[[], T]) -> T:
    """Return call(), which runs code of the objective `name` before a stage is built.

    Raises UserError for any error of a user's own objective. Errors of localpipe's objectives pass
    through.
    """
    if not is_user_code(name):
        return call()
    return call_user_code(f"objective: {name} cannot be configured", call)


def check_network_arguments(function: Any, config: Config) -> dict[str, Any]:
    """Return `model.args`, completed with the defaults of a registered network's function.

    The arguments are the function's keyword-only parameters. A parameter `batch_size` gets
    `data.batch_size`, and model.args cannot set it. Lists are tuples in the result, a new dict.
    Raises UserError for an unknown argument or a wrong value.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            fields[parameter.name] = (hints[parameter.name], parameter.default)

    # The configuration decides this one.
    needs_batch_size = fields.pop("batch_size", None) is not None
    model = create_model("Arguments", __base__=Section, **fields)
    name = config.model.name
    arguments = dict(_validate(model, config.model.args, "model.args", name, name))
    if needs_batch_size:
        arguments["batch_size"] = config.data.batch_size
    return arguments


def make_options_model(options: Any) -> type[BaseModel]:
    """Return a strict pydantic model of an objective's Options dataclass, for its keys and types.

    Default factories are called once, here. Raises pydantic's errors for an annotation that it does
    not support, and NameError for one that cannot be evaluated.
    """
    hints = typing.get_type_hints(options, include_extras=True)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        fields[field.name] = (hints[field.name], _find_default(field))
    return create_model("Options", __base__=Section, **fields)


def _validate(
    model: type[BaseModel], values: Mapping[str, Any], prefix: str, name: str, source: str
) -> BaseModel:
    """Return the values as an instance of the model; raise UserError for an unknown or wrong one.

    prefix: the section of the values. name: the objective or network that they belong to.
    """
    # pydantic's own error would not name the nearest key.
    fields = model.model_fields
    for key in values:
        if key in fields:
            continue
        advice = f"{name} has no options of its own"
        if fields:
            advice = suggest(key, fields, f"{prefix}.")
        raise UserError(f"config: {prefix}.{spell(key)} is not a known key ({source}); {advice}")

    try:
        return model.model_validate(_lists_to_tuples(values))
    except ValidationError as error:
        errors = error.errors()
    key = str(errors[0]["loc"][0])
    expected = describe_type(find_declared_type(model, [key]))
    advice = advise_on_limit(errors)
    if key not in values:
        raise UserError(f"config: {prefix}.{key} has no default ({source}); give it, {expected}")
    raise UserError(
        f"config: {prefix}.{key} must be {expected} ({source}); got {quote(values[key])}{advice}"
    )


def _find_default(field: dataclasses.Field[Any]) -> Any:
    """Return a dataclass field's default as pydantic declares it: `...` for a required field."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    if field.default is dataclasses.MISSING:
        return ...
    return field.default


def _lists_to_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list_to_tuple(value) for key, value in values.items()}

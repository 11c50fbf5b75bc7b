"""Options of objectives and arguments of networks, checked against the classes that declare them."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError, create_model

from localpipe.config import registry
from localpipe.config.explain import declared_type, describe_type, quote
from localpipe.config.keys import Config, Method, Section
from localpipe.errors import UserError, suggest

C = TypeVar("C", bound=Config)


def with_objective(config: C, source: str) -> C:
    """Return a configuration whose objective is looked up and complete, checked against its Options."""
    given = dict(config.method.objective)
    name = given.pop("name", Method().objective["name"])
    if not isinstance(name, str):
        advice = suggest(str(name), registry.OBJECTIVES)
        raise UserError(
            f"config: method.objective.name must be text ({source}); got {quote(name)}; {advice}"
        )
    cls = registry.find_objective_class(name, f"config: method.objective.name ({source})")
    options = _options_model(cls.Options)
    full = _checked(given, options, "method.objective", name, source).model_dump(mode="json")
    method = config.method.model_copy(update={"objective": {"name": name, **full}})
    config = config.model_copy(update={"method": method})
    config._objective = cls, cls.Options(**_tuples(full))
    return config


def _checked(
    given: Mapping[str, Any], options: type[BaseModel], prefix: str, owner: str, source: str
) -> BaseModel:
    """Return what the owner of these options gets; raise UserError for an unknown key or a wrong value."""
    known = options.model_fields
    for key in given.keys() - known.keys():
        advice = (
            suggest(key, known, f"{prefix}.") if known else f"{owner} has no options of its own"
        )
        raise UserError(f"config: {prefix}.{key} is not a known key ({source}); {advice}")
    try:
        return options.model_validate(_tuples(given))
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        expected = describe_type(declared_type(options, [key]))
        if key not in given:
            raise UserError(
                f"config: {prefix}.{key} has no default ({source}); give it, {expected}"
            ) from None
        raise UserError(
            f"config: {prefix}.{key} must be {expected} ({source}); got {quote(given[key])}"
        ) from None


def network_arguments(function: Any, config: Config) -> dict[str, Any]:
    """Return `model.args` checked against the keyword-only parameters of a registered network's function.

    A function that asks for `batch_size` gets the configuration's own.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    asked = {
        each.name: (hints[each.name], each.default)
        for each in parameters
        if each.kind is each.KEYWORD_ONLY
    }
    facts = {"batch_size": config.data.batch_size}
    own = {name: what for name, what in asked.items() if name not in facts}
    options = create_model("Arguments", __base__=Section, **typing.cast(dict[str, Any], own))
    given = _checked(config.model.args, options, "model.args", config.model.name, config.model.name)
    return {**dict(given), **{name: fact for name, fact in facts.items() if name in asked}}


def _options_model(options: Any) -> type[BaseModel]:
    """Make a strict model of an objective's Options, so that its keys are checked like every other key."""
    hints = typing.get_type_hints(options, include_extras=True)
    fields = {
        field.name: (hints[field.name], _default(field)) for field in dataclasses.fields(options)
    }
    return create_model("Options", __base__=Section, **typing.cast(dict[str, Any], fields))


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return ... if field.default is dataclasses.MISSING else field.default


def _tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in options.items()
    }

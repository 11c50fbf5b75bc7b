"""What the user says, checked: a YAML file and `section.key=value` words become one frozen Config.

Strict: an unknown key, a wrong type or an impossible combination is a UserError that names the nearest valid word.
An objective's own options are checked against the frozen `Options` dataclass of the class that the registry names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from localpipe.config import registry, shipped
from localpipe.config.explain import explain, quote
from localpipe.config.keys import Config
from localpipe.config.options import with_objective
from localpipe.config.resolved import Resolved
from localpipe.config.rules import check_combinations
from localpipe.config.yaml_file import StrictLoader, read_yaml
from localpipe.errors import UserError, suggest

C = TypeVar("C", bound=Config)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` words in order, and check the whole.

    A path that does not exist may be the name of a configuration that comes with localpipe.
    """
    if not Path(path).is_file():
        path = shipped.path_of(str(path)) or path
    data = read_yaml(Path(path))
    _expand_method(data)
    if isinstance(data, dict):
        data["run"] = data.get("run") or {}
        if isinstance(data["run"], dict):
            data["run"].setdefault("dir", f"runs/{Path(path).stem}")
    return parse(apply_overrides(data, overrides), str(path))


def apply_overrides(data: Any, overrides: Sequence[str]) -> Any:
    """Return sections with `section.key=value` words applied in order, `method=NAME` first: what says more goes on top."""
    _expand_method(data)
    for word in sorted(overrides, key=lambda word: word.partition("=")[0].strip() != "method"):
        _override(data, word)
    return data


def parse(data: Any, source: str) -> Config:
    """Check a mapping of sections; `source` is named in every error."""
    return _check(Config, data, source)


def parse_resolved(data: Any, source: str) -> Resolved:
    """Check a mapping of sections in which no `auto` is left."""
    return _check(Resolved, data, source)


def as_resolved(config: Config) -> Resolved:
    """Return a configuration as a resolved one; raise UserError where an `auto` is left."""
    return parse_resolved(to_dict(config), "resolved configuration")


def _check(kind: type[C], data: Any, source: str) -> C:
    if not isinstance(data, dict):
        raise UserError(f"config: {source} must be a mapping of sections; got {quote(data)}")
    # `schema` heads the files that a run writes, so that they can be read back like any other.
    data = {str(key): _named(value) for key, value in data.items() if key != "schema"}
    _expand_method(data)
    try:
        config = kind.model_validate(data)
    except ValidationError as error:
        raise UserError(explain(kind, error.errors(), source)) from None
    config = with_objective(config, source)
    check_combinations(config, source)
    return config


def _named(section: Any) -> Any:
    """Return a section with texts as keys, so that a number among them is told as an unknown key; null is empty."""
    if section is None:
        return {}
    return (
        {str(key): value for key, value in section.items()}
        if isinstance(section, dict)
        else section
    )


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain dicts and lists, JSON and YAML ready."""
    return config.model_dump(mode="json")


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML that `load` reads back unchanged."""
    return yaml.safe_dump({"schema": 1, **to_dict(config)}, sort_keys=False)


def update(config: C, values: Mapping[str, Any]) -> C:
    """Return a copy with `section.key` entries replaced; the result is checked again."""
    data = to_dict(config)
    for key, value in values.items():
        section, _, name = key.partition(".")
        data[section][name] = value
    return _check(type(config), data, "resolved configuration")


def _expand_method(data: Any) -> None:
    """Turn a method's name into its point on the axes, and an axis's name into its mapping."""
    if not isinstance(data, dict):
        return
    method = data.get("method")
    if isinstance(method, str):
        if method not in registry.METHODS:
            raise UserError(
                f"config: method has no {method!r}; {suggest(method, registry.METHODS)}"
            )
        data["method"] = {axis: dict(options) for axis, options in registry.METHODS[method].items()}
    method = data.get("method")
    if isinstance(method, dict):
        for axis, key in (("objective", "name"), ("context", "mode"), ("reconcile", "distance")):
            if isinstance(method.get(axis), str):
                method[axis] = {key: method[axis]}


def _override(data: Any, word: str) -> None:
    if not isinstance(data, dict):
        return  # `parse` says what is wrong with it
    key, equals, text = word.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UserError(f"command line: {word!r} is not an override; expected section.key=value")
    try:
        value = yaml.load(text, Loader=StrictLoader)
    except yaml.YAMLError:
        raise UserError(
            f"command line: the value of {key} is not YAML: {text!r}; put it in quotes"
        ) from None
    if path == ["method"]:
        data["method"] = value
        _expand_method(data)
        return
    node: Any = data
    for part in path[:-1]:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise UserError(
                f"command line: {key} goes below a key that is no section; expected section.key=value"
            )
    if path == ["method", "objective", "name"] and node.get("name") != value:
        node.clear()  # another objective has other options
    node[path[-1]] = value
    _expand_method(data)

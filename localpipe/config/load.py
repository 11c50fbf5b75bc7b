"""A YAML file and `section.key=value` overrides, checked and turned into one frozen Config.

An unknown key, a wrong type or an impossible combination is a UserError that names the nearest
valid name. An objective's options are checked against the `Options` dataclass of its class.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from localpipe.config import registry, shipped
from localpipe.config.explain import describe_type, explain, find_declared_type, quote
from localpipe.config.keys import Config
from localpipe.config.network_name import complete_arguments, find_shipped_name
from localpipe.config.options import complete_objective
from localpipe.config.resolved import Resolved
from localpipe.config.rules import check_combinations
from localpipe.config.user_code import is_user_code
from localpipe.config.yaml_file import dump_yaml, load_yaml, read_yaml
from localpipe.errors import UserError, suggest

C = TypeVar("C", bound=Config)

# The key of an axis that its short form `method: {context: R1E}` sets.
_AXIS_KEYS = {"objective": "name", "context": "mode", "reconcile": "distance", "feedback": "mode"}


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a YAML file with `section.key=value` overrides.

    A path that is no file may be the name of a configuration that comes with localpipe. `run.dir`
    is runs/ and the name of the file by default. Overrides are applied as `apply_overrides` says.
    Raises UserError for a missing or unreadable file, and for what `parse` refuses.
    """
    path = os.path.expanduser(path)
    if not Path(path).is_file():
        path = shipped.find_path(str(path)) or path
    data = read_yaml(Path(path))
    expand_method(data)
    if isinstance(data, dict):
        data["run"] = data.get("run") or {}
        if isinstance(data["run"], dict):
            data["run"].setdefault("dir", f"runs/{Path(path).stem}")
    return parse(apply_overrides(data, overrides), str(path))


def apply_overrides(data: Any, overrides: Sequence[str]) -> Any:
    """Return the sections with `section.key=value` overrides applied in order.

    data: the content of a file, changed in place and returned. What is no mapping is returned as it
    is. `method=NAME` is applied first, so that single keys of the method win over it. Another
    `method.objective.name` drops the options set before. Values are YAML, and missing sections are
    made. Keys are not checked. Raises UserError if an override has no `=` or empty key, its value
    is not YAML, or a key goes below a value.
    """
    expand_method(data)
    if not isinstance(data, dict):
        return data  # parse raises the error
    for override in sorted(overrides, key=_sets_single_key):
        _apply_override(data, override)
    return data


def parse(data: Any, source: str) -> Config:
    """Return the configuration of a mapping of sections, with all defaults set.

    data: not changed. Null stands for an empty section, and the entry `schema` is not read. A
    user's objective is imported, but a user's network is not. Raises UserError, which contains
    `source`, for an unknown key, a wrong type or value, an unknown name, or keys that do not go
    together.
    """
    return _check(Config, data, source)


def parse_resolved(data: Any, source: str, imports_user_code: bool = True) -> Resolved:
    """Return the configuration of a mapping of sections without `auto`.

    `auto` may stay in run.resume and in an objective's own options alone. Without
    `imports_user_code` the options of a user's objective stay unchecked, and `has_objective` is
    False. Raises UserError as `parse` does, and for an `auto` or a missing key that must be set.
    """
    return _check(Resolved, data, source, imports_user_code)


def as_resolved(config: Config) -> Resolved:
    """Return a configuration as a resolved one, a checked copy.

    Nothing is decided here: raises UserError if a key that must be set is `auto`.
    """
    return parse_resolved(to_dict(config), "resolved configuration")


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as dicts and lists that JSON and YAML can hold.

    The keys are all sections, each with all of its keys, defaults included. They are in the order
    of `Config`. Tuples become lists. The dict is a copy.
    """
    return config.model_dump(mode="json")


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML that `load` reads back unchanged.

    It begins with the entry `schema: 1`, and holds every key.
    """
    return dump_yaml({"schema": 1, **to_dict(config)})


def update(config: C, values: Mapping[str, Any]) -> C:
    """Return a checked copy, of the same class, in which `section.key` entries are replaced.

    values: `{"section.key": value}`, values as `to_dict` has them. An option of the method cannot
    be named: its key is `method.objective`, with the whole mapping as value. A user's objective is
    imported. Raises KeyError for an unknown section, and UserError as `parse` does.
    """
    data = to_dict(config)
    for key, value in values.items():
        section, _, name = key.partition(".")
        data[section][name] = value
    return _check(type(config), data, "resolved configuration")


def expand_method(data: Any) -> None:
    """Replace a method's name by its point on the axes, and an axis's name by a mapping.

    data: the sections of a configuration, changed in place. What is no mapping is left alone. A
    second call changes nothing. Raises UserError for an unknown name of a method. Names of
    objectives are not checked.
    """
    if not isinstance(data, dict):
        return
    method = data.get("method")
    if isinstance(method, str):
        if method not in registry.METHODS:
            advice = suggest(method, registry.METHODS)
            raise UserError(f"config: method has no {method!r}; {advice}")
        axes = registry.METHODS[method]
        method = {axis: dict(options) for axis, options in axes.items()}
        data["method"] = method
    if not isinstance(method, dict):
        return
    for axis, key in _AXIS_KEYS.items():
        if isinstance(method.get(axis), str):
            method[axis] = {key: method[axis]}


def _check(kind: type[C], data: Any, source: str, imports_user_code: bool = True) -> C:
    """Return the mapping of sections as a `kind` of configuration, checked in every respect."""
    if not isinstance(data, dict):
        raise UserError(f"config: {source} must be a mapping of sections; got {quote(data)}")
    sections = {}
    for name, section in data.items():
        # The files that a run writes begin with their schema number.
        if name != "schema":
            sections[str(name)] = _normalise_section(section)
    expand_method(sections)
    _complete_network(sections)

    # Single keys first, then the objective's options, then combinations.
    try:
        config = kind.model_validate(sections)
    except ValidationError as error:
        raise UserError(explain(kind, error.errors(), source)) from None
    objective = str(config.method.objective.get("name"))
    if imports_user_code or not is_user_code(objective):
        config = complete_objective(config, source)
    check_combinations(config, source)
    return config


def _complete_network(sections: dict[str, Any]) -> None:
    """Write out what the name of a library's network stands for, in the sections.

    torchvision's name of a network that is shipped becomes the shipped one's. The arguments of a
    network of transformers become the content of its file.
    """
    model = sections.get("model")
    if not isinstance(model, dict):
        return
    name, args = model.get("name"), model.get("args") or {}
    if isinstance(name, str) and isinstance(args, dict):
        args = complete_arguments(name, args)
        sections["model"] = {**model, "name": find_shipped_name(name, args), "args": dict(args)}


def _normalise_section(section: Any) -> Any:
    """Return a section with texts as keys, and {} for null.

    A number as a key is then refused like any other unknown key.
    """
    if section is None:
        return {}
    if not isinstance(section, dict):
        return section
    return {str(key): value for key, value in section.items()}


def _sets_single_key(override: str) -> bool:
    """Return whether an override sets a single key, and not a whole method."""
    key, _, _ = override.partition("=")
    return key.strip() != "method"


def _apply_override(data: dict[str, Any], override: str) -> None:
    """Apply one `section.key=value` override to the sections, in place."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UserError(
            f"command line: {override!r} is not an override; expected section.key=value"
        )
    try:
        value = _read_value(path, text)
    except yaml.YAMLError:
        raise UserError(
            f"command line: the value of {key} is not YAML: {text!r}; put it in quotes"
        ) from None

    if path == ["method"]:
        data["method"] = value
    else:
        section = _find_section(data, path[:-1], key)
        # Another objective has other options.
        if path == ["method", "objective", "name"] and section.get("name") != value:
            section.clear()
        section[path[-1]] = value
    expand_method(data)


def _read_value(path: Sequence[str], text: str) -> Any:
    """Return the value of an override. Raises yaml.YAMLError for what is not YAML."""
    # The name of a file may have signs that YAML has not.
    if not text.isprintable() and _is_text_key(path):
        return text
    # YAML would take `data.background=#808080` for a comment.
    if text.strip().startswith("#"):
        return text.strip()
    value = load_yaml(text)
    # `run.dir=20240101` is a name.
    if isinstance(value, int | float) and _is_text_key(path):
        return text.strip()
    return value


def _is_text_key(path: Sequence[str]) -> bool:
    """Return whether a key accepts every text, so that no number can be meant."""
    try:
        declared = find_declared_type(Config, path)
    except (KeyError, AttributeError):
        return False
    return describe_type(declared) in ("text", "text or null")


def _find_section(data: dict[str, Any], path: Sequence[str], key: str) -> dict[str, Any]:
    """Return the mapping at a path, made where it is missing; `key` is named in the error."""
    section = data
    for part in path:
        if section.get(part) is None:
            section[part] = {}
        content = section[part]
        if not isinstance(content, dict):
            raise UserError(
                f"command line: {key} goes below a key that is no section; "
                "expected section.key=value"
            )
        section = content
    return section

"""YAML files in which `1e-4` is a number and a key given twice is an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from localpipe.config import shipped
from localpipe.errors import UserError, find_nearest


class StrictLoader(yaml.SafeLoader):
    """A safe loader that reads `1e-4` as a number and refuses a key given twice.

    A key must be text, a number or a boolean.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node. A merge key `<<` may occur twice.

        Raises yaml.constructor.ConstructorError if a key occurs twice or is no text and no number.
        """
        keys = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float):
                raise _error_at(key_node, f"{key!r} is no key")
            if key in keys:
                raise _error_at(key_node, f"key {key} is given twice")
            keys.add(key)
        return super().construct_mapping(node, deep)


StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path, prefix: str = "config") -> Any:
    """Return the content of a YAML file, {} for an empty one.

    It may be of any type, not only a mapping. Raises UserError if the file cannot be read, is not
    UTF-8 or is not YAML. `prefix` begins the error. Only with `config` does the error name the
    nearest configuration that comes with localpipe. Raises ValueError for an impossible date, as
    2020-13-45.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise _unreadable(path, prefix, str(error.strerror)) from None
    except UnicodeDecodeError:
        raise _unreadable(path, prefix, "not UTF-8 text") from None

    try:
        data = yaml.load(text, Loader=StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise UserError(f"{prefix}: {path}{line} is not YAML: {problem}") from None
    if data is None:
        return {}
    return data


def _error_at(node: yaml.Node, problem: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _unreadable(path: Path, prefix: str, reason: str) -> UserError:
    """Return the error of a file that cannot be read, with the nearest shipped configuration."""
    advice = "give the path of a YAML file"
    if prefix == "config":
        nearest = find_nearest(path.stem, shipped.list_names())
        if nearest is None:
            advice = f"{advice}, or a name that `localpipe configs` lists"
        else:
            advice = f"did you mean {nearest}?"
    return UserError(f"{prefix}: cannot read {path}: {reason}; {advice}")

"""YAML as the files of this project mean it: `1e-4` is a number, and a key given twice an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from localpipe.config import shipped
from localpipe.errors import UserError, suggest


class StrictLoader(yaml.SafeLoader):
    """YAML with `1e-4` a number and a key given twice an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float):
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} is no key", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path, who: str = "config") -> Any:
    """Return what a YAML file holds, {} where it is empty; `who` speaks in every error."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        advice = "give the path of a YAML file"
        if who == "config":
            near = suggest(path.stem, shipped.names())
            advice = (
                near
                if near.startswith("did")
                else f"{advice}, or a name that `localpipe configs` lists"
            )
        raise UserError(f"{who}: cannot read {path}: {reason}; {advice}") from None
    try:
        data = yaml.load(text, Loader=StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{who}: {path}{line} is not YAML: {_problem(error)}") from None
    return {} if data is None else data


def _problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]

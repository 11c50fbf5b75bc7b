"""YAML files in which a number is what a person reads, and a key given twice is an error.

YAML 1.1 reads `010` as 8, `1:30` as 90 and `2024-01-01` as a date. Here they are 10, text and text,
as in YAML 1.2. `1e-4` is a number.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from localpipe.config import shipped
from localpipe.errors import UserError, find_nearest, first_line

_MOST_VALUES = 1_000_000  # that a file stands for; a list of classes is the longest thing in one
_REPLACED_TAGS = tuple(f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp"))


class StrictLoader(yaml.SafeLoader):
    """A safe loader that reads numbers as people do, and refuses a key given twice.

    A key must be text, a number or a boolean. `load_yaml` uses it.
    """

    # YAML 1.1's numbers and dates are replaced below.
    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML's own
        sign: [pair for pair in pairs if pair[0] not in _REPLACED_TAGS]
        for sign, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

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


def _construct_int(loader: StrictLoader, node: yaml.ScalarNode) -> int:
    """Return a whole number: decimal also with zeros in front, or 0x1f, 0o17, 0b11."""
    text = loader.construct_scalar(node).lower()
    base = 0 if re.match(r"[-+]?0[xob]", text) else 10
    return int(text.replace("_", ""), base)


def _construct_float(loader: StrictLoader, node: yaml.ScalarNode) -> float:
    """Return a number, `.inf` or `.nan`."""
    text = loader.construct_scalar(node).lower()
    return float(re.sub(r"\.(inf|nan)$", r"\1", text.replace("_", "")))


_SIGNS = list("-+.0123456789")
StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"[-+]?(\d[\d_]*|0[xX][\da-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+)$", re.ASCII),
    _SIGNS,
)
StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?((\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+"
        r"|\.(inf|Inf|INF))$|\.(nan|NaN|NAN)$",
        re.ASCII,
    ),
    _SIGNS,
)
StrictLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
StrictLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def load_yaml(text: str) -> Any:
    """Return the content of a YAML text, None for an empty one. Raises yaml.YAMLError alone."""
    try:
        data = yaml.load(text, Loader=StrictLoader)
        if _count_values(data, [], {}) > _MOST_VALUES:
            raise yaml.YAMLError(f"it stands for more than {_MOST_VALUES} values")
    except yaml.YAMLError:
        raise
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    # PyYAML lets errors of its constructors through: `!!int x`, a number of 5000 digits.
    except Exception as error:
        raise yaml.YAMLError(first_line(error)) from None
    return data


def dump_yaml(data: Any) -> str:
    """Return YAML that `load_yaml` reads back unchanged, the keys in their order.

    data: what JSON can hold.
    """
    return yaml.dump(data, Dumper=_StrictDumper, sort_keys=False)


class _StrictDumper(yaml.SafeDumper):
    """A dumper that quotes every text that YAML 1.1 or `StrictLoader` reads as something else."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML's own
        sign: [*pairs, *StrictLoader.yaml_implicit_resolvers.get(sign, [])]
        for sign, pairs in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


def _count_values(value: Any, outer: list[int], counts: dict[int, int]) -> int:
    """Return the number of values, those of an alias each time that it is used.

    A few lines of aliases of aliases stand for billions. Raises yaml.YAMLError for a list or
    mapping that contains itself, as `&a [*a]` does.
    """
    if id(value) in outer:
        raise yaml.YAMLError("a value contains itself")
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in counts:
        outer.append(id(value))
        items = value.values() if isinstance(value, dict) else value
        counts[id(value)] = 1 + sum(_count_values(item, outer, counts) for item in items)
        outer.pop()
    return counts[id(value)]


def read_yaml(path: Path, prefix: str = "config", advice: str | None = None) -> Any:
    """Return the content of a YAML file, {} for an empty one.

    It may be of any type, not only a mapping. Raises UserError if the file cannot be read, is not
    UTF-8 or is not YAML. `prefix` begins the error. advice: ends it. None for another path, with
    prefix `config` the nearest configuration that comes with localpipe.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise _unreadable(path, prefix, str(error.strerror), advice) from None
    except UnicodeDecodeError:
        raise _unreadable(path, prefix, "not UTF-8 text", advice) from None

    try:
        data = load_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or first_line(error))
        end = f"; {advice}" if advice else ""
        raise UserError(f"{prefix}: {path}{line} is not YAML: {problem}{end}") from None
    if data is None:
        return {}
    return data


def _error_at(node: yaml.Node, problem: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _unreadable(path: Path, prefix: str, reason: str, advice: str | None) -> UserError:
    """Return the error of a file that cannot be read. advice: None for another path."""
    end = advice or _advise_on_path(path, prefix)
    return UserError(f"{prefix}: cannot read {path}: {reason}; {end}")


def _advise_on_path(path: Path, prefix: str) -> str:
    """Return which file to give instead, for a configuration the nearest shipped one."""
    if prefix != "config":
        return "give the path of a YAML file"
    nearest = find_nearest(path.stem, shipped.list_names())
    if nearest is not None:
        return f"did you mean {nearest}?"
    return "give the path of a YAML file, or a name that `localpipe configs` lists"

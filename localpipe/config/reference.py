"""Every key of a configuration, told from the code: `localpipe train --keys`, and docs/configuration.md.

`python -m localpipe.config.reference > docs/configuration.md` writes the page.
"""

from __future__ import annotations

import inspect
import json
import sys
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel

from localpipe.config import registry
from localpipe.config.explain import declared_type, describe_type
from localpipe.config.keys import Config
from localpipe.config.options import _options_model
from localpipe.config.resume import FREE_KEYS


def list_keys() -> list[tuple[str, str, Any, str]]:
    """Return (key, choices, default, help) of every key, in the order of the file."""
    rows = []
    for section, field in Config.model_fields.items():
        rows += _rows(section, typing.cast(type[BaseModel], field.annotation))
    return rows


def _rows(prefix: str, model: type[BaseModel]) -> list[tuple[str, str, Any, str]]:
    rows = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            rows += _rows(f"{prefix}.{name}", field.annotation)
        else:
            expected = describe_type(declared_type(model, [name]))
            rows.append((f"{prefix}.{name}", expected, field.default, field.description or ""))
    return rows


def list_objective_keys(name: str) -> list[tuple[str, str, Any, str]]:
    """Return (key, choices, default, help) of an objective's own options."""
    cls = registry.find_objective_class(name, "config: method.objective.name")
    return _rows("method.objective", _options_model(cls.Options))


Row = tuple[str, str, Any, str]
_NAMES = {
    "model.name": f"one of {', '.join(registry.MODELS)}, or a name of your own",
    "method.objective": f"a mapping; name: one of {', '.join(registry.OBJECTIVES)}, or package.module:Class of your own",
    "data.name": f"one of {', '.join(registry.DATASETS)}",
}
_HEAD = """\
# Configuration

Made from the code by `python -m localpipe.config.reference > docs/configuration.md`; `localpipe train --keys` prints the same.

A configuration is a YAML file of sections. A word `section.key=value` on the command line replaces a key, in YAML's own
notation: `pipeline.cuts=[3,7,10]` or `pipeline.cuts=3,7,10`. An unknown key is refused, and the nearest known one is named.
`auto` is decided once, before the first step, and the run's `config.yaml` holds what was decided.

`localpipe configs` lists the configurations that come with localpipe, and `localpipe configs NAME` prints one;
`localpipe train NAME` takes such a name where there is no file of that path.
"""
_RESUME = """\
## Going on with a run

The same command again goes on from the last checkpoint. These keys may differ then; every other one shapes the result and
must be the recorded one:
"""


def rows() -> dict[str, list[Row]]:
    """Return (key, choices, default, help) of every key by section; an objective's own options are `method.objective.NAME`."""
    found: dict[str, list[Row]] = {}
    known = list_keys()
    for key, choices, default, about in known:
        row = (key, _NAMES.get(key, choices), default, about)
        found.setdefault(key.partition(".")[0], []).append(row)
    for name in registry.OBJECTIVES:
        found[f"method.objective.{name}"] = list_objective_keys(name)
    return found


def lines() -> Iterable[str]:
    """Yield one line a key, for a terminal and for grep."""
    for section, keys in rows().items():
        objective = section.removeprefix("method.objective.")
        if objective != section:
            yield f"\n# method.objective.name={objective}" + (
                "" if keys else ": no options of its own"
            )
        else:
            yield f"\n# {section}"
        for key, choices, default, about in keys:
            yield f"{key}={_value(default)}  ({choices})  {about}"


def page() -> str:
    """Return docs/configuration.md."""
    found = rows()
    parts = [_HEAD]
    for section, field in Config.model_fields.items():
        parts.append(
            f"## {section}\n\n{inspect.getdoc(field.annotation)}\n\n{_table(found[section])}\n"
        )
        if section == "method":
            parts += [
                _presets(),
                *(
                    _objective(name, found[f"method.objective.{name}"])
                    for name in registry.OBJECTIVES
                ),
            ]
    parts.append(f"{_RESUME}\n{_list(sorted(FREE_KEYS))}\n")
    return "\n".join(parts)


def _presets() -> str:
    shown = [f"| `{name}` | {_expanded(axes)} |" for name, axes in registry.METHODS.items()]
    return "\n".join(
        [
            "`method: NAME` stands for a point on the axes:\n",
            "| name | stands for |",
            "|---|---|",
            *shown,
            "",
        ]
    )


def _expanded(axes: Any) -> str:
    return ", ".join(
        f"`{axis}.{key}: {value}`" for axis, keys in axes.items() for key, value in keys.items()
    )


def _objective(name: str, keys: Sequence[Row]) -> str:
    cls = registry.find_objective_class(name, "reference")
    summary = (inspect.getdoc(inspect.getmodule(cls)) or "").partition("\n")[0]
    options = _table(keys) if keys else "No options of its own."
    return f"### method.objective.name: {name}\n\n{summary}\n\n{options}\n"


def _table(keys: Sequence[Row]) -> str:
    shown = [
        f"| `{key}` | `{_value(default)}` | {choices} | {about} |"
        for key, choices, default, about in keys
    ]
    return "\n".join(["| key | default | value | |", "|---|---|---|---|", *shown])


def _value(default: Any) -> str:
    """Return a default as it stands in YAML."""
    return default if isinstance(default, str) else json.dumps(default)


def _list(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    sys.stdout.write(page())

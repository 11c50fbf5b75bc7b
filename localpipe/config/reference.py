"""Every key of a configuration, from the code: `localpipe train --keys`, docs/configuration.md.

`python -m localpipe.config.reference > docs/configuration.md` writes the page.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from localpipe.config import registry
from localpipe.config.explain import describe_type, find_declared_type, is_section
from localpipe.config.keys import Config, Optim, TaskKeys
from localpipe.config.options import make_options_model
from localpipe.config.resume import FREE_KEYS

# (key, choices, default, help)
Row = tuple[str, str, Any, str]

_HEAD = """\
# Configuration

Made from the code by `python -m localpipe.config.reference > docs/configuration.md`; \
`localpipe train --keys` prints the same.

A configuration is a YAML file of sections. A word `section.key=value` on the command line \
replaces a key, in YAML's own
notation: `pipeline.cuts=[3,7,10]` or `pipeline.cuts=3,7,10`. \
An unknown key is refused, and the nearest known one is named.
`auto` is decided once, before the first step, and the run's `config.yaml` holds what was decided.

`localpipe configs` lists the configurations that come with localpipe, \
and `localpipe configs NAME` prints one;
`localpipe train NAME` takes such a name where there is no file of that path.
"""
_RESUME = """\
## Going on with a run

The same command again goes on from the last checkpoint. These keys may differ then; every \
other one shapes the result and
must be the recorded one (`optim.epochs` may differ too with \
`optim.schedule=constant` or `multistep`, no rate of which depends on it, and \
`optim.max_steps` may not where it is the length of
another schedule, with `optim.epochs=null`):
"""


def list_keys() -> list[Row]:
    """Return (key, choices, default, help) of every key, in the order of the file.

    key: with its section, as `optim.lr`. choices and help: text. default: the Python value, so a
    list is a tuple. The options of objectives are not among them.
    """
    return _list_rows("", Config)


def list_objective_keys(name: str) -> list[Row]:
    """Return (key, choices, default, help) of an objective's options, in their order.

    The key is `method.objective.OPTION`. The list is empty without options. name: also a user's,
    which is imported. Raises UserError if there is no such objective.
    """
    cls = registry.find_objective_class(name, "config: method.objective.name")
    return _list_rows("method.objective.", make_options_model(cls.Options))


def list_sections() -> dict[str, list[Row]]:
    """Return (key, choices, default, help) of every key by section.

    The sections come in the order of the file. The options of an objective are the section
    `method.objective.NAME`, also where there are none. These sections come last. Choices of the
    keys that take names list the names.
    """
    names = {
        "model.name": f"one of {', '.join(registry.MODELS)}, or a name of your own",
        "task.name": f"auto, one of {', '.join(registry.TASKS)}, or a class of your own",
        "method.objective": f"a mapping; name: one of {', '.join(registry.OBJECTIVES)}, "
        "or package.module:Class of your own",
        "data.name": f"one of {', '.join(registry.DATASETS)}",
    }
    sections: dict[str, list[Row]] = {}
    for key, choices, default, help_text in list_keys():
        section, _, _ = key.partition(".")
        row = (key, names.get(key, choices), default, help_text)
        sections.setdefault(section, []).append(row)
    for name in registry.OBJECTIVES:
        sections[f"method.objective.{name}"] = list_objective_keys(name)
    return sections


def format_lines() -> Iterator[str]:
    """Yield one line a key, for a terminal and for grep, without a newline at its end.

    Before the keys of a section, its title is yielded, with an empty line before it.
    """
    for section, rows in list_sections().items():
        yield f"\n# {_format_title(section, rows)}"
        for key, choices, default, help_text in rows:
            yield f"{key}={_format_value(default)}  ({choices})  {help_text}"


def format_page() -> str:
    """Return the text of docs/configuration.md. It is not written."""
    sections = list_sections()
    parts = [_HEAD]
    for section, field in Config.model_fields.items():
        summary = inspect.getdoc(field.annotation)
        parts.append(f"## {section}\n\n{summary}\n\n{_format_table(sections[section])}\n")
        if section == "method":
            parts.append(_format_presets())
            for name in registry.OBJECTIVES:
                parts.append(_format_objective(name, sections[f"method.objective.{name}"]))
    free_keys = ", ".join(f"`{key}`" for key in sorted(FREE_KEYS))
    parts.append(f"{_RESUME}\n{free_keys}\n")
    return "\n".join(parts)


def _list_rows(prefix: str, model: type[BaseModel]) -> list[Row]:
    """Return the rows of a model's keys, and of the sections inside it."""
    rows: list[Row] = []
    for name, field in model.model_fields.items():
        annotation: Any = field.annotation
        if is_section(annotation):
            rows += _list_rows(f"{prefix}{name}.", annotation)
            continue
        choices = describe_type(find_declared_type(model, [name]))
        help_text = field.description or ""
        if model is Optim:
            help_text = _add_readers(registry.OPTIMIZERS, name, help_text)
        if model is TaskKeys:
            help_text = _add_readers(registry.TASKS, name, help_text)
        rows.append((f"{prefix}{name}", choices, field.default, help_text))
    return rows


def _add_readers(table: Mapping[str, str], key: str, help_text: str) -> str:
    """Return a key's help with the names of a table that read it, unless all of them do.

    table: of objects that name the keys they read, as optimizers and tasks.
    """
    names = []
    for name in table:
        spec = registry.look_up(table, name, "reference")
        if key in spec.keys:
            names.append(name)
    if not names:
        return help_text
    if not help_text:
        return f"of {', '.join(names)}"
    if len(names) == len(table) > 1:
        return help_text
    return f"{help_text}; of {', '.join(names)}"


def _format_title(section: str, rows: Sequence[Row]) -> str:
    objective = section.removeprefix("method.objective.")
    if objective == section:
        return section
    title = f"method.objective.name={objective}"
    if not rows:
        title += ": no options of its own"
    return title


def _format_presets() -> str:
    lines = [
        "`method: NAME` stands for a point on the axes:\n",
        "| name | stands for |",
        "|---|---|",
    ]
    for name, axes in registry.METHODS.items():
        lines.append(f"| `{name}` | {_format_axes(axes)} |")
    return "\n".join([*lines, ""])


def _format_axes(axes: Mapping[str, Mapping[str, Any]]) -> str:
    entries = []
    for axis, options in axes.items():
        for key, value in options.items():
            entries.append(f"`{axis}.{key}: {value}`")
    return ", ".join(entries)


def _format_objective(name: str, rows: Sequence[Row]) -> str:
    """Return an objective's heading, the first line of its module's docstring, and its options."""
    cls = registry.find_objective_class(name, "reference")
    summary, _, _ = (inspect.getdoc(inspect.getmodule(cls)) or "").partition("\n")
    options = "No options of its own."
    if rows:
        options = _format_table(rows)
    return f"### method.objective.name: {name}\n\n{summary}\n\n{options}\n"


def _format_table(rows: Sequence[Row]) -> str:
    lines = ["| key | default | value | |", "|---|---|---|---|"]
    for key, choices, default, help_text in rows:
        lines.append(f"| `{key}` | `{_format_value(default)}` | {choices} | {help_text} |")
    return "\n".join(lines)


def _format_value(default: Any) -> str:
    """Return a default as YAML spells it."""
    if isinstance(default, str):
        return default
    return json.dumps(default)


if __name__ == "__main__":
    sys.stdout.write(format_page())

"""Code of the user's own that a configuration names: `package.module:name`, or `folder/file.py:name`."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from localpipe.errors import UserError


def is_user_code(name: str) -> bool:
    """Return whether a name stands for code of the user's own, not for something that localpipe brings."""
    return ":" in name


def import_named(name: str, key: str) -> Any:
    """Import and return what `name` stands for; `key` is the configuration's, `model.name` or `method.objective.name`."""
    where, _, attribute = name.rpartition(":")
    kind = "function" if _room(key) == "model" else "class"
    if os.getcwd() not in sys.path:
        sys.path.insert(
            0, os.getcwd()
        )  # a console script does not look where the user stands, and `python -m` does
    try:
        module = (
            _from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
        )
    except Exception as error:
        raise UserError(
            f"{_room(key)}: cannot import {where} of {key} {name}: {describe_exception(error)}; run where it can be imported"
        ) from None
    found = getattr(module, attribute, None)
    if not callable(found):
        raise UserError(
            f"{_room(key)}: {where} has no {kind} {attribute!r}; expected package.module:{kind} or file.py:{kind}"
        )
    return found


def name_of(thing: Any) -> str:
    """Return the name under which every worker finds a function or class: the inverse of `find`.

    What the script itself defines is named by the script's file, relative to the working directory where it lies below it.
    """
    name = getattr(thing, "__qualname__", None)
    module = sys.modules.get(getattr(thing, "__module__", None) or "")
    if not name or module is None or getattr(module, name, None) is not thing:
        raise UserError(
            f"api: {thing!r} has no name at the top of a module, so workers cannot import it; "
            "give a function or class that has"
        )
    spec = module.__spec__
    if module.__name__ == "__main__" and spec is not None:  # python -m
        return f"{spec.name}:{name}"
    if module.__name__ != "__main__" and os.sep not in module.__name__:
        return f"{module.__name__}:{name}"
    file = getattr(module, "__file__", None)
    if file is None:
        raise UserError(
            f"api: {name} was typed in, and workers cannot import it; write it into a file"
        )
    path = Path(file).resolve()
    here = Path.cwd().resolve()
    return f"{path.relative_to(here) if path.is_relative_to(here) else path}:{name}"


def describe_exception(error: Exception) -> str:
    """Return an exception of the user's code as one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def parameter_names(function: Any) -> frozenset[str]:
    """Return the names of what a function takes; nothing for a builtin."""
    try:
        return frozenset(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return frozenset()


def _from_file(path: Path) -> ModuleType:
    """Import a file once, as `python file.py` would, but under a name of its own."""
    path = path.resolve()
    name = str(path).replace(".", "_")
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "every .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _room(key: str) -> str:
    return "model" if key.startswith("model") else "objective"

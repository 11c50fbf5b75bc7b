"""Code of a user that a configuration names: `package.module:name`, or `folder/file.py:name`."""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from localpipe.config.network_name import split_library
from localpipe.environment import add_import_folder
from localpipe.errors import UserError

T = TypeVar("T")
# The keys that may name code: where an error about it is, and what the code is.
_KINDS = {
    "model.name": ("model", "function"),
    "data.name": ("data", "function"),
    "task.name": ("task", "class"),
    "method.objective.name": ("objective", "class"),
}


def is_user_code(name: str) -> bool:
    """Return whether a name stands for a user's code, and not for the registry's or a library's.

    It looks at the colon and what precedes it. Nothing is imported.
    """
    return ":" in name and split_library(name) is None


def import_user_code(name: str, key: str) -> Any:
    """Import and return the function or class that `name` stands for.

    key: the configuration's, a key of `_KINDS`. A leading ~ is the home directory. The working
    directory is put into sys.path, after the standard library and before the installed packages,
    and so is the folder of a `.py` file. A second call returns the same object. Raises UserError if
    the import raises any Exception or SystemExit, or the module has no such function or class. Any
    callable object is accepted.
    """
    source, _, attribute = name.rpartition(":")
    section, kind = _KINDS[key]

    # torch comes with it, and the configuration alone needs no torch.
    from localpipe import seeds

    # `python -m` looks into the working directory, a console script does not.
    add_import_folder(os.getcwd())
    try:
        # What a module draws while it is imported is the same in every process. torch's default
        # generator begins with a fixed seed anyhow.
        with seeds.seeded_host("import"):
            if source.endswith(".py"):
                module = _import_file(Path(source).expanduser())
            else:
                module = importlib.import_module(source)
    except (Exception, SystemExit) as error:  # a script parses its arguments, and leaves
        raise UserError(
            f"{section}: cannot import {source} of {key} {name}: {describe_exception(error)}; "
            f"{_advise_on_import(error, source, kind)}"
        ) from None

    value = getattr(module, attribute, None)
    if not callable(value):
        raise UserError(
            f"{section}: {source} has no {kind} {attribute!r}; "
            f"expected package.module:{kind} or file.py:{kind}"
        )
    return value


def find_import_name(value: Any) -> str:
    """Return the name under which every worker imports a function or class.

    It is the inverse of `import_user_code`. What the main script defines is named by the script's
    file, relative to the working directory where it lies below it. Raises UserError if workers
    cannot import the value: a lambda, a nested function, an instance, or what was typed in.
    """
    name = getattr(value, "__qualname__", None)
    module = sys.modules.get(getattr(value, "__module__", None) or "")
    if not name or module is None or getattr(module, name, None) is not value:
        raise UserError(
            f"api: {value!r} has no name at the top of a module, so workers cannot import it; "
            "give a function or class that has"
        )

    # A module that Python finds by its name, also one that `python -m` runs.
    spec = module.__spec__
    if module.__name__ == "__main__" and spec is not None:
        return f"{spec.name}:{name}"
    if module.__name__ != "__main__" and os.sep not in module.__name__:
        return f"{module.__name__}:{name}"

    # A script, or a file that `_import_file` imported.
    file = getattr(module, "__file__", None)
    if file is None:
        raise UserError(
            f"api: {name} was typed in, and workers cannot import it; write it into a file"
        )
    path = Path(file).resolve()
    directory = Path.cwd().resolve()
    if path.is_relative_to(directory):
        path = path.relative_to(directory)
    return f"{path}:{name}"


def call_user_code(failure: str, call: Callable[[], T]) -> T:
    """Return call(), which runs a user's code.

    failure: where and what, which begins the error. Raises UserError if the code raises any
    Exception or SystemExit. A UserError of its own comes through as it is.
    """
    try:
        return call()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{failure}: {describe_exception(error)}") from error


def describe_exception(error: BaseException) -> str:
    """Return an exception of a user's code as one line: its class and its first line."""
    lines = str(error).strip().splitlines()
    name = type(error).__name__
    if not lines:
        return name
    return f"{name}: {lines[0]}"


def parameter_names(function: Any) -> frozenset[str]:
    """Return the names of a function's parameters, or nothing for a builtin.

    `*args` and `**kwargs` count by their names. It never raises: what has no signature has no
    names.
    """
    try:
        return frozenset(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return frozenset()


def _advise_on_import(error: Exception | SystemExit, source: str, kind: str) -> str:
    """Return what to do about a module that cannot be imported, by its name in `source`."""
    if not source or source.startswith("."):
        return f"expected package.module:{kind} or file.py:{kind}"
    if isinstance(error, ModuleNotFoundError | FileNotFoundError):
        return "run where it can be imported"
    return "correct it"


def _import_file(path: Path) -> ModuleType:
    """Import a file once, as `python file.py` would, but under a module name of its own."""
    path = path.resolve()
    name = str(path).replace(".", "_")
    if name in sys.modules:
        return sys.modules[name]
    add_import_folder(str(path.parent))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "every .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks up its own module while the file runs.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module

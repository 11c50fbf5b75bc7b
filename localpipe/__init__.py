"""localpipe: train neural networks that are cut into gradient-isolated stages.

From Python:

    from localpipe import configuration, train, load

    # A file, a shipped name or a mapping, then overrides.
    config = configuration("demo", "optim.epochs=2")
    # Starts the workers and returns the content of summary.json.
    summary = train(config)
    # A file that `localpipe export` wrote, as an nn.Module.
    network = load("net.pt")

An objective of your own derives from `LocalLoss` and takes a `Site`. Failures raise `UserError` or
`RunError`. These names are the public interface, and the rest of the package may change.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from localpipe.api import configuration as configuration
    from localpipe.api import train as train
    from localpipe.config.keys import Config as Config
    from localpipe.errors import RunError as RunError
    from localpipe.errors import UserError as UserError
    from localpipe.methods.objective import LocalLoss as LocalLoss
    from localpipe.methods.objective import Site as Site
    from localpipe.results.export import load as load
    from localpipe.tasks.task import Task as Task

# The modules are imported at the first use of a name, so that `import localpipe` stays fast.
_MODULES = {
    "configuration": "api",
    "train": "api",
    "load": "results.export",
    "Config": "config.keys",
    "LocalLoss": "methods.objective",
    "Site": "methods.objective",
    "Task": "tasks.task",
    "UserError": "errors",
    "RunError": "errors",
}

__all__ = [*_MODULES, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})

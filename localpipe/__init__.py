"""localpipe: train neural networks that are cut into gradient-isolated stages.

From Python:

    from localpipe import configuration, train, load

    config = configuration("demo", "optim.epochs=2")      # a file, a shipped name, or a mapping; then overrides
    summary = train(config)                               # starts the workers, returns what summary.json holds
    network = load("net.pt")                              # what `localpipe export` wrote, as an nn.Module

`LocalLoss` and `Site` are what an objective of your own is made of; `UserError` and `RunError` are how things fail. What
is named here is what stays; the rest of the package is how it is done.
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

# Imported when they are asked for, so that `import localpipe` stays fast.
_FACE = {
    "configuration": "api",
    "train": "api",
    "load": "results.export",
    "Config": "config.keys",
    "LocalLoss": "methods.objective",
    "Site": "methods.objective",
    "UserError": "errors",
    "RunError": "errors",
}

__all__ = [*_FACE, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FACE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_FACE})

"""localpipe from a training script: a configuration from Python, and a run that returns its summary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localpipe import config as configs
from localpipe.config.keys import Config
from localpipe.config.load import apply_overrides
from localpipe.config.user_code import name_of
from localpipe.environment import is_worker, under_torchrun
from localpipe.errors import RunError, UserError


def configuration(source: str | Path | Mapping[str, Any], *overrides: str) -> Config:
    """Return a checked configuration from a YAML file, a name that `localpipe configs` lists, or a mapping of sections.

    `overrides` are `section.key=value` words, as on the command line. In a mapping, `model.name` may be the function that
    returns your network, and `method.objective.name` (or `method.objective`) the class of your local loss: both must stand
    at the top of a module or script, for every worker imports them. Raises UserError for any mistake.
    """
    if not isinstance(source, Mapping):
        return configs.load(source, overrides)
    data = _with_names(source)
    data["run"] = {"dir": "runs/library", **(data.get("run") or {})}
    return configs.parse(apply_overrides(data, overrides), "configuration")


def train(config: Config) -> dict[str, Any]:
    """Train in worker processes of this machine; return what the run's summary.json holds.

    A run that has finished returns its summary at once, one that was stopped goes on. Call it from the main thread, and in a
    script under `if __name__ == "__main__":`, for the workers import the script. Raises UserError for a mistake that can be
    known before the workers start, RunError when the run fails; its first cause is then on standard error.
    """
    if is_worker():
        raise UserError(
            'api: a worker called train; put the call under `if __name__ == "__main__":`'
        )
    if under_torchrun():
        raise UserError(
            "api: train starts its own workers; under torchrun, use `-m localpipe train CONFIG`"
        )
    from localpipe.runs.directory import SUMMARY_FILE
    from localpipe.runs.train import train

    status = train(config)
    if status != 0:
        raise RunError(f"run: {config.run.dir} ended with status {status}; the cause is told above")
    summary: dict[str, Any] = json.loads(
        Path(config.run.dir, SUMMARY_FILE).read_text(encoding="utf-8")
    )
    return summary


def _with_names(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return sections in which every function and class stands under the name that workers import it by."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(inner) for key, inner in value.items()}
        return name_of(value) if callable(value) else value

    return {str(key): plain(value) for key, value in source.items()}

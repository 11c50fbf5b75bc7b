"""Configure and train from a Python script; a run returns its summary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localpipe import config as configs
from localpipe.config.keys import Config
from localpipe.config.load import apply_overrides
from localpipe.config.user_code import find_import_name
from localpipe.environment import is_worker, under_torchrun
from localpipe.errors import RunError, UserError


def configuration(source: str | Path | Mapping[str, Any], *overrides: str) -> Config:
    """Return a checked configuration.

    source: a YAML file, a name that `localpipe configs` lists, or a mapping of sections, which does
    not change. A section that is missing or None has the defaults. overrides: `section.key=value`,
    as on the command line, applied in order, `method=NAME` first. run.dir is `runs/` and the file's
    name by default, and `runs/library` for a mapping.

    In a mapping, `model.name` may be the function that returns your network, and `data.name` the
    one that returns your data sets. `method.objective.name` (or `method.objective`) may be the
    class of your local loss. Define them at the top of a module or script, because every worker
    imports them. Raises UserError for any
    mistake in what the file, the sections and the overrides say.
    """
    if not isinstance(source, Mapping):
        return configs.load(source, overrides)
    sections = {str(section): _replace_by_names(content) for section, content in source.items()}
    run = sections.get("run") or {}
    if isinstance(run, Mapping):  # else `parse` raises the error
        sections["run"] = {"dir": "runs/library", **run}
    return configs.parse(apply_overrides(sections, overrides), "configuration")


def train(config: Config) -> dict[str, Any]:
    """Train in worker processes on this machine; return the content of the run's summary.json.

    A finished run returns its summary at once, a stopped run continues. Call it in a
    script under `if __name__ == "__main__":`, because the workers import the script. In another
    thread than the main one it handles no signal. Progress goes to standard output.
    Raises UserError for a mistake that is found before the workers start, also inside a worker or
    under torchrun. Raises RunError when the run fails or a signal stops it, after the cause was
    printed to standard error. A second signal raises KeyboardInterrupt.
    """
    if is_worker():
        raise UserError(
            'api: a worker called train; put the call under `if __name__ == "__main__":`'
        )
    if under_torchrun():
        raise UserError(
            "api: train starts its own workers, but RANK and WORLD_SIZE are set; under torchrun, "
            "use `-m localpipe train CONFIG`, else unset both"
        )
    from localpipe.runs.directory import RunDirectory
    from localpipe.runs.train import train

    status = train(config)
    if status != 0:
        raise RunError(f"run: {config.run.dir} ended with status {status}; the cause is told above")
    summary = RunDirectory(config.run.dir).summary()
    assert summary is not None, "a run whose status is 0 has written its summary"
    return dict(summary)


def _replace_by_names(value: Any) -> Any:
    """Return a value in which the name that workers import replaces every function and class."""
    if isinstance(value, Mapping):
        return {key: _replace_by_names(item) for key, item in value.items()}
    if callable(value):
        return find_import_name(value)
    return value

"""A configuration with every automatic choice made explicit, as a file that `train` takes."""

from __future__ import annotations

from pathlib import Path

from localpipe import config as configs
from localpipe import metrics
from localpipe.errors import UserError
from localpipe.sections import Config


def write(resolved: Config, path: Path) -> None:
    """Write a resolved configuration; raises UserError where a file is in the way, or there is no folder for it."""
    if path.exists():
        raise UserError(
            f"plan: --freeze {path} exists and is not overwritten; give another file, or remove it"
        )
    metrics.check_folder("plan: --freeze", path)
    metrics.write_whole(path, configs.to_yaml(resolved))

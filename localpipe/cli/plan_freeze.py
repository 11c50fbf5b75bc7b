"""A configuration with every automatic choice made explicit, as a file that `train` takes."""

from __future__ import annotations

from pathlib import Path

from localpipe.config.load import to_yaml
from localpipe.config.resolved import Resolved
from localpipe.errors import UserError
from localpipe.files import check_output_path, write_whole


def write_frozen(resolved: Resolved, path: Path) -> None:
    """Write a resolved configuration; raises UserError where a file is in the way, or there is no folder for it."""
    if path.exists():
        raise UserError(
            f"plan: --freeze {path} exists and is not overwritten; give another file, or remove it"
        )
    check_output_path("plan: --freeze", path)
    write_whole(path, to_yaml(resolved))

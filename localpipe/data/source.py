"""Where a data set is read from: what the configuration says of it, and what a foreign error says, in one line."""

from __future__ import annotations

import os
from pathlib import Path

from localpipe.errors import UserError
from localpipe.sections import Data


def refuse_npz(config: Data) -> None:
    """Send a user whose root is an .npz file to the loader that reads it."""
    if config.root.lower().endswith(".npz"):
        raise UserError(
            f"data: {config.root} is an .npz file, {config.name} is read from a folder; set data.name=npz"
        )


def size_of(config: Data) -> tuple[int, int] | None:
    """Return data.image_size as (H, W), None where it is auto."""
    if config.image_size == "auto":
        return None
    return (
        config.image_size
        if isinstance(config.image_size, tuple)
        else (config.image_size, config.image_size)
    )


def path_of(root: str) -> Path:
    """Return data.root, its ~ replaced."""
    return Path(os.path.expanduser(root))


def reason_of(error: BaseException) -> str:
    """Return a foreign error in one line, without a full stop."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split()).rstrip(".")

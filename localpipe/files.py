"""Files that appear whole or not at all, private folders, and the schema number of every JSON file."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path
from types import TracebackType

from localpipe.errors import RunError, UserError

_YOUNG_S = 60.0


class PrivateFolder:
    """A new folder under `root`.

    A lock on the folder itself says that its process lives: the next one removes what a killed one left, and so do cleaners
    of temporary folders, which skip what is locked.
    """

    def __init__(self, root: Path, prefix: str) -> None:
        for left_over in root.glob(f"{prefix}*"):
            _remove_if_left(left_over)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the folder and let go of it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._descriptor)


def _remove_if_left(folder: Path) -> None:
    with contextlib.suppress(OSError):
        if time.time() - folder.stat().st_mtime < _YOUNG_S:
            return  # its process may be about to lock it
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


SCHEMA = 1


def check_output_path(where: str, path: Path) -> None:
    """Raise UserError where a file cannot be, because its folder is missing: before hours of work, not after."""
    if path.is_dir():
        raise UserError(f"{where} {path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise UserError(
            f"{where} {path}: there is no folder {path.parent}; make it, or give another file"
        )


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there complete or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RunError(
            f"cannot write {path}: {error.strerror}; free space or choose another run.dir"
        ) from None

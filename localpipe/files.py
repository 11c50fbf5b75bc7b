"""Atomic writes of files, private folders, and the schema number of every JSON file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from localpipe.errors import RunError, UserError

SCHEMA = 1
_YOUNG_S = 60.0


def write_whole(path: Path, content: str | bytes | memoryview, fsync: bool = True) -> None:
    """Write a file atomically: a reader sees all of the content or the file that was there before.

    content: bytes, or text that becomes UTF-8. Several processes may write one path. Without
    `fsync` the file may be lost when the machine loses power. Raises OSError, also without the
    folder, after the partial file has been removed. Raises UnicodeEncodeError for lone surrogates.
    """
    if isinstance(content, str):
        content = content.encode("utf-8")
    # Several processes may write one path at the same time, so each has a partial file.
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with _replace_after(part, path), open(part, "wb") as file:
        file.write(content)
        if fsync:
            file.flush()
            os.fsync(file.fileno())


def replace_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file at the path it is given, then move that file to `path` atomically.

    For libraries that write to a path. `write` gets a path in the same folder, once. Raises
    OSError, and whatever `write` raises, after the partial file has been removed. `path` is then
    unchanged. Only one process may write a path at a time.
    """
    # torch stores the file's name in its archives, so the name holds no process id.
    part = path.with_name(f".part.{path.name}")
    with _replace_after(part, path):
        write(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def _replace_after(part: Path, path: Path) -> Iterator[None]:
    """Move `part` to `path` at the end of the block, or remove it when the block raises."""
    try:
        yield
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def write_output(path: Path, content: str | bytes, place: str = "run.dir") -> None:
    """Write a command's or a run's file atomically; raise RunError with advice on failure.

    content: as in `write_whole`. It replaces a file that is there. The folder must exist. place:
    what the user may choose, a key or a noun.
    """
    try:
        write_whole(path, content)
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror}; {advise_on_write(error, place)}"
        ) from None


def advise_on_write(error: OSError, place: str) -> str:
    """Return what to do about a file that cannot be written, with another `place` as one way."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"free space, or choose another {place}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"get the right to write there, or choose another {place}"
    return f"choose another {place}"


def check_output_path(prefix: str, path: Path) -> None:
    """Raise UserError if a file cannot be written because its folder is missing.

    It raises too if `path` is a folder. Nothing is written, and permissions are not checked. Call
    it before the work whose result goes there. `prefix` begins the message.
    """
    if path.is_dir():
        raise UserError(f"{prefix} {path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise UserError(
            f"{prefix} {path}: there is no folder {path.parent}; make it, or give another file"
        )


class PrivateFolder:
    """A new folder under `root`, readable by this user only, that is removed at the end.

    Its `path` begins with `prefix`, and the context returns it. The process holds a lock on the
    folder while it lives. The next process removes the folders without a lock, which killed
    processes left, a minute after their last change. Cleaners of temporary folders skip locked
    ones. Raises OSError if `root` is missing or full.
    """

    def __init__(self, root: Path, prefix: str) -> None:
        for folder in root.glob(f"{prefix}*"):
            _remove_leftover(folder)
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
        """Remove the folder and release its lock. Files that cannot be removed stay.

        Leaving the context calls it. Call it once: a second call raises OSError.
        """
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._descriptor)


def _remove_leftover(folder: Path) -> None:
    """Remove a private folder whose process has died."""
    with contextlib.suppress(OSError):
        age_s = time.time() - folder.stat().st_mtime
        if age_s < _YOUNG_S:
            return  # its process may be about to lock it
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)

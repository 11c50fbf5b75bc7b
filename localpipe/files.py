"""Atomic writes of files, private folders, and the schema number of every JSON file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
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
    with _replace_after(path) as part:
        _write_synced(part, content, fsync)


def write_together(contents: Mapping[Path, bytes | memoryview]) -> None:
    """Write several files, each of them atomically, and none if one of them cannot be written.

    Raises OSError, after the partial files have been removed. Files that were there are then
    unchanged, unless it is a move that fails, after the first.
    """
    with contextlib.ExitStack() as stack:
        for path, content in contents.items():
            part = stack.enter_context(_replace_after(path))
            _write_synced(part, content)


def _write_synced(path: Path, content: bytes | memoryview, fsync: bool = True) -> None:
    with open(path, "wb") as file:
        file.write(content)
        if fsync:
            file.flush()
            os.fsync(file.fileno())


def _part_path(path: Path) -> Path:
    """Return the partial file of a path. Several processes may write one path, each has its own."""
    return path.with_name(f".{path.name}.{os.getpid()}")


@contextlib.contextmanager
def _replace_after(path: Path) -> Iterator[Path]:
    """Move the partial file of `path` there at the end, or remove it when the block raises."""
    part = _part_path(path)
    try:
        yield part
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


def check_output_path(prefix: str, path: Path, makes_folders: bool = False) -> None:
    """Raise UserError if a file cannot be written.

    Call it before the work whose result goes there. An empty file is made where the file or its
    first missing folder will be, and removed again. makes_folders: whether missing folders will be
    made. `prefix` begins the message.
    """
    try:
        if path.is_dir():
            raise UserError(f"{prefix} {path} is a folder; give the name of a file")
        if path.exists() and not path.is_file():
            raise UserError(f"{prefix} {path} is a device or a pipe; give the name of a file")
        folder = path.parent
        while makes_folders and not folder.exists():
            folder = folder.parent
        if not folder.exists():
            raise UserError(
                f"{prefix} {path}: there is no folder {folder}; make it, or give another file"
            )
        if not folder.is_dir():
            raise UserError(f"{prefix} {path}: {folder} is not a folder; give another file")
        part = _part_path(folder / path.name)
        part.touch()
        part.unlink()
    except OSError as error:
        raise UserError(
            f"{prefix} {path} cannot be written: {error.strerror}; give another file"
        ) from None


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

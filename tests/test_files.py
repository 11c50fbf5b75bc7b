"""Atomic writes, and folders of processes that may be killed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from localpipe.errors import RunError, UserError
from localpipe.files import (
    PrivateFolder,
    check_output_path,
    write_output,
    write_together,
    write_whole,
)

KILLED = """
import os, pathlib, signal, sys
from localpipe.files import PrivateFolder
folder = PrivateFolder(pathlib.Path(sys.argv[1]), "x-")
(folder.path / "file").touch()
os.utime(folder.path, (0, 0))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_goes_and_what_lives_stays(tmp_path: Path) -> None:
    with PrivateFolder(tmp_path, "x-") as living:
        os.utime(living, (0, 0))
        subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
        (tmp_path / "x-young").mkdir()
        assert len(list(tmp_path.iterdir())) == 3
        with PrivateFolder(tmp_path, "x-") as second:
            assert set(tmp_path.iterdir()) == {living, second, tmp_path / "x-young"}
            assert stat.S_IMODE(second.stat().st_mode) == 0o700
    assert set(tmp_path.iterdir()) == {tmp_path / "x-young"}


@pytest.mark.parametrize("content", ["naïve\n", "naïve\n".encode(), memoryview("naïve\n".encode())])
@pytest.mark.parametrize("fsync", [True, False])
def test_text_and_bytes_replace_a_file(
    tmp_path: Path, content: str | bytes | memoryview, fsync: bool
) -> None:
    path = tmp_path / "file"
    path.write_text("a longer text that was there before")
    write_whole(path, content, fsync)
    assert path.read_bytes() == "naïve\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_raises_the_systems_error_and_leaves_the_old_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    # The partial file leads to a device that is always full.
    (tmp_path / f".file.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_files_are_written_together_or_not_at_all(tmp_path: Path) -> None:
    old, new = tmp_path / "net.pt", tmp_path / "net.md"
    old.write_text("old")
    (tmp_path / f".net.md.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_together({old: b"new", new: b"card"})
    assert old.read_text() == "old" and list(tmp_path.iterdir()) == [old]
    write_together({old: b"new", new: memoryview(b"card")})
    assert (old.read_text(), new.read_text()) == ("new", "card")
    assert sorted(tmp_path.iterdir()) == [new, old]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere/net.pt", "there is no folder .*nowhere; make it, or give another file"),
        ("file/net.pt", "file is not a folder; give another file"),
        ("folder", "is a folder; give the name of a file"),
        ("pipe", "is a device or a pipe; give the name of a file"),
        ("x" * 300, "cannot be written: File name too long; give another file"),
        ("/proc/net.pt", "cannot be written: .*; give another file"),
    ],
)
def test_an_output_is_refused_before_the_work(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=f"^here .*{reason}$"):
        check_output_path("here", tmp_path / name)


def test_an_output_that_can_be_written_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    check_output_path("here", path)
    check_output_path("here", tmp_path / "new" / "folders" / "file", makes_folders=True)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["nowhere/file", "file/inside"])
def test_an_output_that_cannot_be_written_is_one_line_with_advice(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=f"^cannot write .*{name}: .*; choose another run.dir$"):
        write_output(tmp_path / name, "text")

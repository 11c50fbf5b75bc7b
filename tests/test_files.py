"""Folders of processes that may be killed: the next one removes what is left, and nothing that lives."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

from localpipe.files import PrivateFolder

KILLED = """
import os, pathlib, signal, sys
from localpipe.private import PrivateFolder
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
        with PrivateFolder(tmp_path, "x-") as own:
            assert set(tmp_path.iterdir()) == {living, own, tmp_path / "x-young"}
            assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert set(tmp_path.iterdir()) == {tmp_path / "x-young"}

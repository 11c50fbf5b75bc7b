"""What a user sees is what tests/recorded says: keys, help, plans, and names in outputs."""

from __future__ import annotations

import difflib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import record
from tests.record import RECORDED, ROOT

MEANT = "if the change is meant, run `python -m tests.record` and name it in CHANGELOG.md"
PATTERNS = ("*.txt", "*.json", "plans/**/*.json")
OF_A_SESSION = {"tests.txt", "errors.txt"}


def names(folder: Path) -> list[str]:
    """Return the names of the files that `python -m tests.record` writes into a folder."""
    paths = [path for pattern in PATTERNS for path in folder.glob(pattern)]
    return sorted({path.relative_to(folder).as_posix() for path in paths} - OF_A_SESSION)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record what a user sees now, in a process of its own; return the folder."""
    folder = tmp_path_factory.mktemp("recorded")
    words = [sys.executable, "-m", "tests.record", "--into", str(folder)]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder


def test_the_same_files_are_made(made: Path) -> None:
    assert names(made) == names(RECORDED), MEANT


@pytest.mark.parametrize("name", names(RECORDED))
def test_a_user_sees_what_is_recorded(name: str, made: Path) -> None:
    files = (RECORDED / name, made / name)
    before, now = (file.read_text(encoding="utf-8").splitlines() for file in files)
    differences = difflib.unified_diff(before, now, "recorded", "now", lineterm="", n=1)
    assert before == now, "\n".join([f"{name}: {MEANT}", *differences])


def test_what_a_session_lacks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RECORDED", tmp_path)
    file = tmp_path / "session.json"
    tests = ["test_a", "test_b", "test_b"]
    file.write_text(json.dumps({"tests": tests, "errors": ["UserError: no"]}))
    record.write_session(file)
    assert record.missing(file) == []
    file.write_text(json.dumps({"tests": ["test_b", "test_new"], "errors": []}))
    assert record.missing(file) == [
        "tests.txt: test_a",
        "tests.txt: test_b",
        "errors.txt: UserError: no",
    ]

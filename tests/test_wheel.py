"""A wheel is all that a user needs: one is built, installed, and trained with elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("setup.py", "setup.cfg", "README.md", "LICENSE", "localpipe", "configs")


def python(*words: object, cwd: Path, path: Path | None = None) -> str:
    """Run Python in a process of its own, with packages from `path`; return what it printed."""
    environment = {
        **os.environ,
        "PYTHONPATH": "" if path is None else str(path),
        "PIP_NO_INDEX": "1",
    }
    result = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a copy of the sources; install it; return the folder."""
    folders = ("source", "wheels", "installed")
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in folders)
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=unwanted)
        else:
            shutil.copy(ROOT / name, source)
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    alone = ("--no-deps", "--no-build-isolation", "--use-pep517")
    python(*pip, "wheel", *alone, "--wheel-dir", wheels, source, cwd=wheels)
    (wheel,) = wheels.glob("localpipe-*.whl")
    python(*pip, "install", "--no-deps", "--target", target, wheel, cwd=wheels)
    return target


def test_an_installed_wheel_trains_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    code = "import localpipe; print(localpipe.__file__)"
    where = python("-c", code, cwd=tmp_path, path=installed)
    assert Path(where.strip()) == installed / "localpipe" / "__init__.py"
    words = ("demo", "optim.max_steps=2", f"run.dir={tmp_path / 'run'}")
    python("-m", "localpipe", "train", *words, cwd=tmp_path, path=installed)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert (summary["steps"], summary["stages"], summary["processes"]) == (2, 4, 2)

"""Where no GPU can be emulated, the reason is said, and CI does not pass."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.emulated_gpu import build
from tests.emulated_gpu.conftest import IN_CI, refuse


@pytest.mark.parametrize(
    ("version", "reason"),
    [(None, "is built for the CPU only"), ("12.8", "torch is built for CUDA 12.8")],
)
def test_another_torch_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, version: str | None, reason: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    assert reason in str(build.missing_part())


def test_no_compiler_and_no_headers_are_reasons(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert build.missing_part() == "there is no g++"
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(build, "_header_folders", lambda: (tmp_path, tmp_path))
    assert build.missing_part() == f"there is no {tmp_path / 'cuda_runtime_api.h'}"


def test_a_reason_skips_the_tests_and_fails_them_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    skipped: Any = pytest.skip.Exception
    failed: Any = pytest.fail.Exception
    monkeypatch.delenv(IN_CI, raising=False)
    with pytest.raises(skipped, match="no GPU is emulated: there is no g"):
        refuse("there is no g++")
    monkeypatch.setenv(IN_CI, "1")
    with pytest.raises(failed, match="no GPU is emulated: there is no g"):
        refuse("there is no g++")


def test_the_package_imports_nothing_of_the_tests() -> None:
    package = Path(build.__file__).parents[2] / "localpipe"
    texts = {path: path.read_text() for path in package.rglob("*.py")}
    assert [
        path for path, text in texts.items() if "emulated_gpu" in text.split("import")[-1]
    ] == []

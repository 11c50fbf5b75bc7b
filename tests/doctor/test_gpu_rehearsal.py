"""The whole of `doctor --gpu` in tiny size, where there is a device."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests import ROOT
from tests.doctor.rehearsal import check_rehearsal


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_step_comes_to_its_end_and_both_files_are_written(tmp_path: Path) -> None:
    def run_command(words: Sequence[str]) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "localpipe", *words], cwd=ROOT, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    check_rehearsal(tmp_path, run_command)

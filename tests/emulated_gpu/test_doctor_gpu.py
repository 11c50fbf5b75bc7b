"""The whole of `doctor --gpu`, in tiny size, on one emulated GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.doctor.rehearsal import check_rehearsal
from tests.emulated_gpu.machine import Machine, Settings

_LIMIT_S = 1000.0


def test_every_step_comes_to_its_end_and_both_files_are_written(
    machine: Machine, tmp_path: Path
) -> None:
    def run_command(words: Sequence[str]) -> tuple[int, str]:
        settings = Settings(devices=1)
        result = machine.call("run_doctor", *words, settings=settings, limit_s=_LIMIT_S)
        return result.status, result.text

    report = check_rehearsal(tmp_path, run_command)
    assert report["emulated"] is True

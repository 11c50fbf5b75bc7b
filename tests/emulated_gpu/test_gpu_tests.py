"""The tests that need a GPU, run on emulated ones."""

from __future__ import annotations

import re

import pytest

from tests.emulated_gpu.machine import Machine, Settings

_LIMIT_S = 1200.0  # some twenty training runs, beside whatever else the machine does
# Not those that need much memory, or kernels of Triton.
_RUNNABLE = "not its_paper_says and not test_compiled"
# Each with the number of its tests.
_FILES = {
    "tests/test_gpu.py": 12,
    "tests/pipeline/stages/test_captured.py": 13,
    "tests/pipeline/stages/test_precision.py": 7,
    "tests/bench/test_bench.py": 1,
}


@pytest.mark.parametrize("file", _FILES)
def test_the_tests_that_need_a_gpu_pass_without_a_race(machine: Machine, file: str) -> None:
    words = ["-m", "gpu", "-k", _RUNNABLE, "-p", "no:cacheprovider", file]
    result = machine.call("run_tests", *words, settings=Settings(races=1), limit_s=_LIMIT_S)
    assert result.status == 0, result.text
    (passed,) = re.findall(r"(\d+) passed", result.text)
    assert int(passed) >= _FILES[file], result.text
    assert "skipped" not in result.text
    assert result.races == [], result.text

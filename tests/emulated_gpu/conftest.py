"""The emulated GPUs of the test session. Their tests are skipped where they cannot be built."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import NoReturn

import pytest

from tests.emulated_gpu.build import missing_part
from tests.emulated_gpu.machine import Machine

IN_CI = "LOCALPIPE_CI"  # .ci/run sets it: there, nothing is skipped
_MACHINES: list[Machine] = []
_SECONDS: list[float] = []


def refuse(reason: str) -> NoReturn:
    """Skip a test for a reason. In CI it fails."""
    message = f"no GPU is emulated: {reason}"
    if os.environ.get(IN_CI):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Return a machine with four emulated GPUs."""
    reason = missing_part()
    if reason is not None:
        refuse(reason)
    start = time.monotonic()
    made = Machine(tmp_path_factory.mktemp("emulated_gpu"))
    _MACHINES.append(made)
    yield made
    made.close()
    _SECONDS.append(time.monotonic() - start)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many cases ran on the emulated GPU, and how long they took."""
    for made, seconds in zip(_MACHINES, _SECONDS, strict=False):
        terminalreporter.write_line(
            f"emulated GPU: {made.cases} cases in {seconds:.0f} s ({made.cpu_s():.0f} s of CPU "
            f"time), of which {made.start_s:.0f} s to build it and import torch"
        )

"""What the whole test session can tell: its tests and its errors, in the file LOCALPIPE_RECORD."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

RECORD = "LOCALPIPE_RECORD"
_ROOT = Path(__file__).parent.parent
# Modules whose tests look at how a process starts.
_START_PROCESSES = ("tests.pipeline.launch.", "tests.test_surroundings", "tests.test_gpu")
_ERRORS: set[str] = set()
_VARIABLE = {  # in this order
    r"TMP/pytest-of-[^/]*/pytest-\d+/\w+": "TMP",  # of one test, whose name may change
    r"\btests(\.\w+)+": "TESTS",
    rf"\b{re.escape(socket.gethostname())}\b": "HOST",
    r"process \d+ \([\w.]+\)(, process \d+ \([\w.]+\))*": "PROCESSES",
    r"(lost stage \d+ \(rank \d+\)): .*": r"\1: REASON",  # which end notices first
    r"no route to (\S+): [^;]*": r"no route to \1: REASON",
    r"\b0x[0-9a-f]+\b": "HEX",
    r"\b(?=\d*[a-f])[0-9a-f]{12,}\b": "HEX",
    r"\d+": "N",
}


def pytest_configure(config: pytest.Config) -> None:
    """Keep the text of every error of the session, if a record is asked for."""
    if RECORD in os.environ:
        from localpipe import RunError, UserError

        for kind in (UserError, RunError):
            kind.__init__ = _keeping(kind)  # type: ignore[method-assign]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the record, if one is asked for."""
    if RECORD in os.environ:
        tests = sorted(item.name for item in session.items)
        record = {"tests": tests, "errors": sorted(_ERRORS)}
        Path(os.environ[RECORD]).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def normal(text: str) -> str:
    """Return an error's text in one line, with words in place of what differs from run to run."""
    words = {_ROOT: "ROOT", tempfile.gettempdir(): "TMP", sys.prefix: "PREFIX"}
    for folder, word in sorted(words.items(), key=lambda pair: -len(str(pair[0]))):
        text = re.sub(rf"{re.escape(str(folder))}(?![\w.-])", word, text)
    for pattern, word in _VARIABLE.items():
        text = re.sub(pattern, word, text)
    return "\\n".join(text.splitlines())


def _keeping(kind: type[Exception]) -> Any:
    """Return a constructor of an error that keeps the error's text."""

    def __init__(self: Exception, *words: object) -> None:  # noqa: N807
        Exception.__init__(self, *words)
        _ERRORS.add(f"{kind.__name__}: {normal(str(self))}")

    return __init__


@pytest.fixture(scope="module")
def hand_made() -> Iterator[None]:
    """Let the tests of a module train the networks of `tests.hand_made`."""
    from tests.hand_made import registered

    with registered():
        yield


@pytest.fixture(autouse=True)
def forked_ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let launchers fork their ranks from a server that has torch imported: it takes no time."""
    if request.module.__name__.startswith(_START_PROCESSES):
        return
    from localpipe.pipeline.launch import launcher, recovery
    from localpipe.plan import measure
    from tests.forked_ranks import start_rank

    for module in (launcher, measure, recovery):
        monkeypatch.setattr(module, "start_rank", start_rank)

"""The log of a sweep: what was run, what was covered, what was refused, what is wrong."""

from __future__ import annotations

import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import TextIO

from tests import ROOT
from tests.sweep.known import Known
from tests.sweep.trial import Finding


class Log:
    """Lines for a terminal and a file, with the minutes since the start."""

    def __init__(self, file: Path | None) -> None:
        self._start = time.monotonic()
        self._file: TextIO | None = None
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(file, "w", encoding="utf-8")  # noqa: SIM115 - open as long as the sweep
        self.findings: list[Finding] = []
        self.known: Counter[Known] = Counter()

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self._start) / 60

    def say(self, text: str) -> None:
        line = f"{self.minutes:6.1f} {text}"
        print(line, flush=True)
        if self._file is not None:
            print(line, file=self._file, flush=True)

    def add(self, finding: Finding, smallest: str) -> None:
        """Note a new fault with its smallest command."""
        self.findings.append(finding)
        self.say(f"FAULT {finding.oracle}: {finding.text}\n         {smallest}")


def describe_commit() -> str:
    """Return the commit's hash, with a word where the working tree differs from it."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD") + (" with changes" if changed else "")

"""Faults that are known: each is being corrected elsewhere. An empty list is the goal."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.sweep.trial import Finding


@dataclass(frozen=True)
class Known:
    """A fault by its oracle, a pattern of its command or sentence, and where it is corrected."""

    oracle: str
    pattern: str
    reason: str

    def matches(self, finding: Finding) -> bool:
        is_same_oracle = self.oracle in (finding.oracle, "*")
        text = f"{finding.command}\n{finding.text}"
        return is_same_oracle and re.search(self.pattern, text) is not None


KNOWN: tuple[Known, ...] = ()


def find_known(finding: Finding) -> Known | None:
    """Return the entry that a finding is, or None for a new fault."""
    for known in KNOWN:
        if known.matches(finding):
            return known
    return None

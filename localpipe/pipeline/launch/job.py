"""A job: the resolved configuration and where the run begins, sent to every worker as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from localpipe.config.load import parse_resolved
from localpipe.config.resolved import Resolved


@dataclass(frozen=True)
class Job:
    """What every worker needs to know, sent as JSON. `given` is what the user said, to compare between nodes."""

    config: dict[str, Any]
    given: dict[str, Any]
    start_step: int
    elapsed_s: float
    started: float
    data_sha256: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        return Job(**json.loads(text))

    def parsed(self) -> Resolved:
        """Return the resolved configuration."""
        return parse_resolved(self.config, "resolved configuration")

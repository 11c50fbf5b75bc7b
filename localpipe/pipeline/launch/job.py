"""A job: the resolved configuration and where the run begins, sent to every worker as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from localpipe.config.load import parse_resolved
from localpipe.config.resolved import Resolved


@dataclass(frozen=True)
class Job:
    """Everything that a worker needs, as plain values.

    config: the resolved configuration. given: the user's own, which the nodes compare. A run begins
    after `start_step`. elapsed_s: seconds of the sessions before this one. started: the time of
    this session's start, in seconds since the epoch. data_sha256: of the data set, "" where none is
    compared. data_changed: the changes of the data that were accepted, each a mapping of `step`,
    `from` and `to`. left_out: the image files that the run does not read, as paths below data.root.
    """

    config: dict[str, Any]
    given: dict[str, Any]
    start_step: int
    elapsed_s: float
    started: float
    data_sha256: str = ""
    data_changed: list[dict[str, Any]] = field(default_factory=list)
    left_out: Sequence[str] = ()

    def to_json(self) -> str:
        """Return the job as JSON that `from_json` reads back unchanged.

        Raises TypeError if a value is not JSON's.
        """
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        """Return the job that `to_json` wrote.

        Raises ValueError for other text than JSON, and TypeError for missing or unknown fields.
        """
        return Job(**json.loads(text))

    def parse_config(self) -> Resolved:
        """Return the resolved configuration, checked. Raises UserError for any mistake.

        A user's objective is imported.
        """
        return parse_resolved(self.config, "resolved configuration")

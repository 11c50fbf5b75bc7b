"""A run directory read back: its configuration, what was recorded, its summary and its trace, finished or not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localpipe import config as configs
from localpipe import metrics
from localpipe.errors import UserError
from localpipe.job import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE
from localpipe.sections import Config
from localpipe.trace import TRACE_FILE

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Ledger:
    """What a run has left. No code that its configuration names is imported."""

    folder: Path
    config: Config
    records: tuple[Record, ...]
    summary: Record | None  # None until the run has made all its steps
    trace: Record | None  # None without run.trace

    @property
    def stages(self) -> int:
        """Number of stages."""
        assert self.config.pipeline.stages is not None
        return self.config.pipeline.stages

    @property
    def steps(self) -> int | None:
        """Steps of the whole run, where the run has said so."""
        return next(
            (r["steps"] for r in self.records if r["kind"] == "start" and "steps" in r), None
        )

    @property
    def last_step(self) -> int:
        """The newest step that was recorded."""
        return max((record.get("step", 0) for record in self.records), default=0)

    def of(self, kind: str, stage: int, split: str | None = None) -> Iterator[Record]:
        """Yield the records of one kind and stage, in the order of their steps."""
        found = (
            r
            for r in self.records
            if r["kind"] == kind and r.get("stage") == stage and r.get("split") == split
        )
        return iter(sorted(found, key=lambda record: int(record["step"])))


def read(folder: Path) -> Ledger:
    """Read a run directory; raise UserError where there is no run."""
    if not (folder / CONFIG_FILE).exists():
        raise UserError(f"run: {folder} holds no {CONFIG_FILE}; give the directory of a run")
    config = configs.load(folder / CONFIG_FILE)
    if config.pipeline.stages is None:
        raise UserError(
            f"run: {folder / CONFIG_FILE} is not what a run wrote; give the directory of a run"
        )
    return Ledger(
        folder,
        config,
        tuple(metrics.read(folder / METRICS_FILE)),
        _json(folder / SUMMARY_FILE),
        _json(folder / TRACE_FILE),
    )


def _json(path: Path) -> Record | None:
    try:
        found: Record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(
            f"run: cannot read {path}: {error}; remove it, or run the same command again"
        ) from None
    return found

"""A run directory read back: configuration, records, summary, trace and newest checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localpipe import config as configs
from localpipe.config import registry
from localpipe.config.keys import Config
from localpipe.config.load import parse_resolved
from localpipe.config.resolved import Resolved
from localpipe.config.resume import read_recorded
from localpipe.config.yaml_file import read_yaml
from localpipe.errors import UserError
from localpipe.runs.checkpoint import Checkpoint, newest_checkpoint
from localpipe.runs.records import read_records
from localpipe.runs.trace import TRACE_FILE

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"


def finished_summary(run_dir: Path, steps: int) -> Mapping[str, Any] | None:
    """Return the summary of a run that has made all its steps, else None."""
    try:
        summary: Mapping[str, Any] = json.loads(
            (run_dir / SUMMARY_FILE).read_text(encoding="utf-8")
        )
    except (OSError, ValueError):
        return None
    return summary if summary.get("steps") == steps else None


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


Record = Mapping[str, Any]


@dataclass(frozen=True)
class RunDirectory:
    """What a run has left. No code that its configuration names is imported."""

    folder: Path
    config: Resolved
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


def read_run_directory(folder: Path) -> RunDirectory:
    """Read a run directory; raise UserError where there is no run."""
    if not (folder / CONFIG_FILE).exists():
        raise UserError(f"run: {folder} holds no {CONFIG_FILE}; give the directory of a run")
    config = parse_resolved(read_yaml(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
    return RunDirectory(
        folder,
        config,
        tuple(read_records(folder / METRICS_FILE)),
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


def read_config(run_dir: Path, overrides: Sequence[str], trust: bool) -> Config:
    """Return a run's configuration with overrides; code that it names is imported only when the user names it or trusts it."""
    if not (run_dir / CONFIG_FILE).exists():
        raise UserError(f"run: {run_dir} holds no {CONFIG_FILE}; give the directory of a run")
    given = dict(word.split("=", 1) for word in overrides if "=" in word)
    own = {"model.name", "method.objective", "method.objective.name"}
    recorded = read_recorded(
        run_dir / CONFIG_FILE, None if trust else {given[key] for key in own & given.keys()}
    )
    config = configs.load(run_dir / CONFIG_FILE, overrides) if overrides else recorded
    if recorded.model.name not in registry.MODELS and not trust and "model.name" not in given:
        raise UserError(
            f"run: {run_dir} names code of its own, {recorded.model.name}; say --trust to import it, or name it "
            f"again: model.name={recorded.model.name}"
        )
    return config


def require_checkpoint(run_dir: Path) -> Checkpoint:
    """Return the newest complete checkpoint of a run; raise UserError when there is none."""
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is None:
        raise UserError(f"checkpoint: {run_dir} holds no complete checkpoint yet; train it first")
    return checkpoint

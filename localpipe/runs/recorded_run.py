"""What a run has recorded, read once: configuration, records, summary and trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localpipe.config.load import update
from localpipe.config.resolved import Resolved
from localpipe.networks.blueprint import Blueprint
from localpipe.tasks.metric import ACCURACY, Metric

Record = Mapping[str, Any]


@dataclass(frozen=True)
class RecordedRun:
    """What a run has recorded. No code that its configuration names was imported.

    folder: the run directory. records: those of metrics.jsonl in the order of its lines. `summary`
    is None until the run has made all its steps, `trace` without run.trace.
    """

    folder: Path
    config: Resolved
    records: tuple[Record, ...]
    summary: Record | None
    trace: Record | None

    @property
    def stages(self) -> int:
        """The number of stages of the configuration."""
        return self.config.stages

    @property
    def steps(self) -> int | None:
        """The steps of the whole run, from its `start` record, or None if no record has them."""
        for record in self.records:
            if record["kind"] == "start" and "steps" in record:
                steps: int = record["steps"]
                return steps
        return None

    @property
    def metric(self) -> Metric:
        """The figure that the run is judged by: accuracy where no record says it."""
        for record in self.records:
            if record["kind"] == "start":
                return Metric.from_json(record)
        return ACCURACY

    @property
    def last_step(self) -> int:
        """The highest step of any record, 0 without records."""
        return max((record.get("step", 0) for record in self.records), default=0)

    def of(self, kind: str, stage: int, split: str | None = None) -> Iterator[Record]:
        """Return an iterator over the records of one kind and stage, by step.

        split: `test` or `validation` for kind `eval`. None selects the records without a split, as
        those of kind `train` are. Nothing is yielded where no record fits.
        """
        records = []
        for record in self.records:
            is_of_stage = record["kind"] == kind and record.get("stage") == stage
            if is_of_stage and record.get("split") == split:
                records.append(record)
        return iter(sorted(records, key=lambda record: int(record["step"])))


def record_network(config: Resolved, blueprint: Blueprint) -> Resolved:
    """Return the configuration of a run with the names of the network's blocks and its library.

    For a network that is not recorded, as a shipped one, it is returned as it is.
    """
    if not blueprint.recorded_outputs:
        return config
    names = [block.name for block in blueprint.blocks]
    return update(config, {"model.blocks": names, "model.library": blueprint.library})


def network_facts(config: Resolved) -> dict[str, Any]:
    """Return the entries of a checkpoint's manifest: `blocks` and `library`, or nothing."""
    if config.model.blocks is None:
        return {}
    return {"blocks": list(config.model.blocks), "library": config.model.library}


def read_metric(summary: Mapping[str, Any]) -> list[float | None]:
    """Return the metric of every stage's exit, also from a summary of an older version."""
    values: list[float | None] = summary.get("metric_per_stage", [])
    return values or summary["test_accuracy_per_stage"]


def read_last(summary: Mapping[str, Any]) -> float | None:
    """Return the whole network's last metric, also from a summary of an older version."""
    metric = summary.get("metric")
    value: float | None = metric["value"] if metric else summary["test_accuracy"]
    return value


def read_best(summary: Mapping[str, Any]) -> float | None:
    """Return the whole network's best metric, also from a summary of an older version."""
    best: float | None = summary.get("best_metric", summary.get("best_test_accuracy"))
    return best


def read_probes(summary: Mapping[str, Any]) -> list[float | None]:
    """Return the metric of every probe, empty without probes, also from an older summary."""
    key = "probe_metric_per_stage"
    if key not in summary:
        key = "probe_accuracy_per_stage"
    return summary[key] or []

"""Runs beside each other: those that differ only in their seed are one row, mean +- sample deviation (n)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from localpipe.config.resume import FREE_KEYS, flatten
from localpipe.files import SCHEMA
from localpipe.runs.directory import RunDirectory, read_run_directory

# What may differ inside a row. max_steps is free for a resume and shapes the result all the same: the steps made count.
_APART = FREE_KEYS | {"run.seed"}
_STATISTICS = {"data.mean", "data.std"}


@dataclass(frozen=True)
class Spread:
    """The values of the runs of a row."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Return their mean."""
        return statistics.mean(self.values)

    @property
    def deviation(self) -> float | None:
        """Return their sample deviation; None for a single run."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def as_json(self) -> dict[str, Any]:
        return {
            "mean": self.mean,
            "deviation": self.deviation,
            "n": len(self.values),
            "values": list(self.values),
        }

    def text(self, scale: float, form: str) -> str:
        """Write `mean +- deviation`."""
        told = f"{scale * self.mean:{form}}"
        return told if self.deviation is None else f"{told} +- {scale * self.deviation:{form}}"


@dataclass(frozen=True)
class Group:
    """Finished runs of one configuration; `differs` holds the keys in which the groups beside it differ."""

    runs: tuple[RunDirectory, ...]
    differs: Mapping[str, Any]

    def spread(self, key: str) -> Spread:
        """Return a figure of every run's summary."""
        return Spread(tuple(float(_summary(run)[key]) for run in self.runs))

    @property
    def chosen_on(self) -> str:
        """Say on which images the best epoch was chosen."""
        return "validation" if self.runs[0].config.data.validation else "test"

    @property
    def name(self) -> str:
        """Name the group by what sets it apart."""
        config = self.runs[0].config
        words = [
            f"{key}={_short(value)}"
            for key, value in self.differs.items()
            if key not in _STATISTICS
        ]
        return " ".join(words) or f"{config.model.name} on {config.data.name}"


@dataclass(frozen=True)
class Comparison:
    """The groups of some runs, in the order of their first run, and the runs that have not ended."""

    groups: tuple[Group, ...]
    unfinished: tuple[RunDirectory, ...]


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Read run directories and group them; raise UserError for a directory that is no run. The same run counts once."""
    runs = [
        read_run_directory(folder)
        for folder in {folder.resolve(): folder for folder in folders}.values()
    ]
    grouped: dict[str, list[RunDirectory]] = {}
    for run in runs:
        if run.summary is not None:
            grouped.setdefault(json.dumps(_shaping(run), sort_keys=True), []).append(run)
    keys = [_shaping(members[0]) for members in grouped.values()]
    different = _different(keys)
    groups = tuple(
        Group(tuple(members), {name: key.get(name) for name in different})
        for key, members in zip(keys, grouped.values(), strict=True)
    )
    return Comparison(groups, tuple(run for run in runs if run.summary is None))


def comparison_json(found: Comparison) -> dict[str, Any]:
    """Return the comparison as the mapping that `compare --json` prints."""
    return {
        "schema": SCHEMA,
        "groups": [
            {
                "name": group.name,
                "differs": dict(group.differs),
                "runs": [str(run.folder) for run in group.runs],
                "seeds": _seeds(group),
                "n": len(group.runs),
                "test_accuracy_last": group.spread("test_accuracy").as_json(),
                "test_accuracy_best": {
                    **group.spread("best_test_accuracy").as_json(),
                    "chosen_on": group.chosen_on,
                    "epochs": [_summary(run)["best_epoch"] for run in group.runs],
                },
                "train_macs_per_sample": group.spread("train_macs_per_sample").mean,
                "steps": _summary(group.runs[0])["steps"],
                "wall_s": group.spread("wall_s").as_json(),
                "processes": [run.config.pipeline.processes for run in group.runs],
            }
            for group in found.groups
        ],
        "unfinished": [
            {"run": str(run.folder), "step": run.last_step, "steps": run.steps}
            for run in found.unfinished
        ],
    }


def comparison_table(found: Comparison) -> Table:
    """Return the groups as a table for a person."""
    title = "test accuracy in %, mean +- sample deviation of n runs; MMACs of training"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    chosen = " or ".join(sorted({group.chosen_on for group in found.groups}))
    for name in (
        "row",
        "n",
        "seeds",
        "last epoch",
        f"best on {chosen}",
        "MMACs",
        "steps",
        "seconds",
        "procs",
    ):
        shown.add_column(name, justify="right", no_wrap=name != "seeds")
    for number, group in enumerate(found.groups, 1):
        shown.add_row(
            str(number),
            str(len(group.runs)),
            " ".join(map(str, _seeds(group))),
            group.spread("test_accuracy").text(100, ".2f"),
            group.spread("best_test_accuracy").text(100, ".2f"),
            f"{group.spread('train_macs_per_sample').mean / 1e6:,.1f}",
            f"{_summary(group.runs[0])['steps']:,}",
            group.spread("wall_s").text(1, ",.0f"),
            " ".join(sorted({str(run.config.pipeline.processes) for run in group.runs})),
        )
    return shown


def comparison_notes(found: Comparison) -> list[str]:
    """Return what the table has no room for: what sets each row apart, seeds given twice, runs that have not ended."""
    told = [
        f"{number}: {group.name} ({', '.join(str(run.folder) for run in group.runs)})"
        for number, group in enumerate(found.groups, 1)
    ]
    told += [
        f"note: row {number} has a seed more than once; its deviation is not one over seeds alone"
        for number, group in enumerate(found.groups, 1)
        if len(set(_seeds(group))) < len(group.runs)
    ]
    for run in found.unfinished:
        of = "" if run.steps is None else f" of {run.steps}"
        told.append(f"unfinished: {run.folder}, step {run.last_step}{of}")
    return told


def _shaping(run: RunDirectory) -> dict[str, Any]:
    """Return what shapes a run's result, its seed apart."""
    apart = set(_APART)
    if run.config.data.train_subset is not None or run.config.data.validation:
        apart |= _STATISTICS  # the seed chooses the images that they were computed from
    flat = {key: value for key, value in flatten(run.config).items() if key not in apart}
    return {
        **flat,
        "steps": _summary(run)["steps"],
        "data_sha256": _summary(run).get("data_sha256", "")[:8],
    }


def _different(keys: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for key in keys for name in key)
    return [name for name in names if any(key.get(name) != keys[0].get(name) for key in keys)]


def _seeds(group: Group) -> list[int]:
    return [run.config.run.seed for run in group.runs]


def _summary(run: RunDirectory) -> Mapping[str, Any]:
    assert run.summary is not None
    return run.summary


def _short(value: Any) -> str:
    return (
        ",".join(map(str, value))
        if isinstance(value, list)
        else "none"
        if value is None
        else str(value)
    )

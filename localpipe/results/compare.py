"""Comparison: runs beside each other, those that differ only in their seed in one row.

A row shows mean +- sample deviation (n).
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from localpipe.config.resume import FREE_KEYS, flatten
from localpipe.files import SCHEMA
from localpipe.runs.directory import RunDirectory
from localpipe.runs.recorded_run import RecordedRun, read_best, read_last
from localpipe.tasks.metric import ACCURACY, Metric

# What may differ inside a row. max_steps is free for a resume and shapes the result all the same,
# so the steps that were made count.
_FREE_IN_A_ROW = FREE_KEYS | {"run.seed"}
_STATISTICS = {"data.mean", "data.std"}


@dataclass(frozen=True)
class Spread:
    """One figure of the runs of a row, in their order."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean of the values. Raises StatisticsError (a ValueError) without values."""
        return statistics.mean(self.values)

    @property
    def deviation(self) -> float | None:
        """The sample deviation (n - 1) of the values, None for fewer than two."""
        if len(self.values) < 2:
            return None
        return statistics.stdev(self.values)

    def as_json(self) -> dict[str, Any]:
        """Return the values and their figures for JSON.

        The keys are `mean` (float), `deviation` (float or None), `n` (int) and `values` (list of
        floats).
        """
        return {
            "mean": self.mean,
            "deviation": self.deviation,
            "n": len(self.values),
            "values": list(self.values),
        }

    def text(self, scale: float, number_format: str) -> str:
        """Return `mean +- deviation`, both multiplied by `scale`, for one value the mean alone.

        number_format: a format of numbers, such as `.2f`.
        """
        mean = f"{scale * self.mean:{number_format}}"
        if self.deviation is None:
            return mean
        return f"{mean} +- {scale * self.deviation:{number_format}}"


@dataclass(frozen=True)
class Group:
    """Finished runs of one configuration, whose seeds and free keys may differ.

    differs: {key: value} of the keys in which the groups of a comparison differ, None where this
    group lacks the key. `steps` and `data_sha256` count as keys. It is empty if there is one group.
    """

    runs: tuple[RecordedRun, ...]
    differs: Mapping[str, Any]

    @property
    def metric(self) -> Metric:
        """The figure that the runs are judged by."""
        return Metric.from_json(_require_summary(self.runs[0]))

    @property
    def last(self) -> Spread:
        """The metric of the whole network after the last step."""
        return Spread(tuple(_to_number(read_last(_require_summary(run))) for run in self.runs))

    @property
    def best(self) -> Spread:
        """The metric of the whole network in its best epoch."""
        return Spread(tuple(_to_number(read_best(_require_summary(run))) for run in self.runs))

    def spread(self, key: str) -> Spread:
        """Return a figure of every run's summary, by its key in summary.json.

        Raises KeyError if a summary lacks the key, and TypeError if the figure is None or a list.
        """
        return Spread(tuple(float(_require_summary(run)[key]) for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        """The seeds of the runs, in their order. A seed may be there twice."""
        return [run.config.run.seed for run in self.runs]

    @property
    def chosen_on(self) -> str:
        """The images on which the best epoch was chosen: `validation` or `test`."""
        return "validation" if self.runs[0].config.data.validation else "test"

    @property
    def name(self) -> str:
        """The keys that set the group apart as `key=value key=value`, else `NETWORK on DATA SET`.

        `data.mean` and `data.std` are left out.
        """
        words = []
        for key, value in self.differs.items():
            if key not in _STATISTICS:
                words.append(f"{key}={_shorten(value)}")
        if words:
            return " ".join(words)
        config = self.runs[0].config
        return f"{config.model.name} on {config.data.name}"


@dataclass(frozen=True)
class Comparison:
    """The groups of some runs, in the order of their first run, and the unfinished runs.

    A run is unfinished if it has no summary.
    """

    groups: tuple[Group, ...]
    unfinished: tuple[RecordedRun, ...]


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Read run directories and group the finished runs that differ only in seed or free keys.

    folders: in any number. The same run counts once, also by another path. No code that a run names
    is imported. Raises UserError for a directory that is no run, or whose files are damaged.
    """
    distinct = {folder.resolve(): folder for folder in folders}
    runs = [RunDirectory(folder).read() for folder in distinct.values()]
    members: dict[str, list[RecordedRun]] = {}
    for run in runs:
        if run.summary is not None:
            key = json.dumps(_select_shaping_keys(run), sort_keys=True)
            members.setdefault(key, []).append(run)

    # Only the keys that are not the same in every group name the groups.
    keys = [_select_shaping_keys(group[0]) for group in members.values()]
    different = _find_different_names(keys)
    groups = []
    for key_values, group in zip(keys, members.values(), strict=True):
        differs = {name: key_values.get(name) for name in different}
        groups.append(Group(tuple(group), differs))
    unfinished = tuple(run for run in runs if run.summary is None)
    return Comparison(tuple(groups), unfinished)


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as the mapping that `compare --json` prints.

    The keys are `schema`, `groups` and `unfinished` (`run`, `step`, and `steps`, which may be
    None). A group has `name`, `differs`, `runs`, `seeds`, `n`, `metric` (its name and which
    direction is better), `metric_last`, `metric_best`, `train_macs_per_sample`, `steps`, `wall_s`
    and `processes`. A group of accuracies has them as `test_accuracy_last` and
    `test_accuracy_best` too. Fractions are from 0 to 1, `wall_s` is in seconds. Both are as
    `Spread.as_json` returns them.
    """
    unfinished = []
    for run in comparison.unfinished:
        unfinished.append({"run": str(run.folder), "step": run.last_step, "steps": run.steps})
    groups = [_group_json(group) for group in comparison.groups]
    return {"schema": SCHEMA, "groups": groups, "unfinished": unfinished}


def _group_json(group: Group) -> dict[str, Any]:
    last = group.last.as_json()
    best = {
        **group.best.as_json(),
        "chosen_on": group.chosen_on,
        "epochs": [_require_summary(run)["best_epoch"] for run in group.runs],
    }
    accuracies = {}
    if group.metric == ACCURACY:
        accuracies = {"test_accuracy_last": last, "test_accuracy_best": best}
    return {
        "name": group.name,
        "differs": dict(group.differs),
        "runs": [str(run.folder) for run in group.runs],
        "seeds": group.seeds,
        "n": len(group.runs),
        "metric": {"name": group.metric.name, "better": group.metric.better},
        "metric_last": last,
        "metric_best": best,
        **accuracies,
        "train_macs_per_sample": group.spread("train_macs_per_sample").mean,
        "steps": _require_summary(group.runs[0])["steps"],
        "wall_s": group.spread("wall_s").as_json(),
        "processes": [run.config.pipeline.processes for run in group.runs],
    }


def comparison_table(comparison: Comparison) -> Table:
    """Return the groups as a table for rich, a numbered row for each, fractions in per cent.

    Unfinished runs are not in it. It has no row without groups.
    """
    names = sorted({_describe_metric(group.metric) for group in comparison.groups})
    metrics = " or ".join(names) or "test accuracy in %"
    title = f"{metrics}, mean +- sample deviation of n runs; MMACs of training"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    best = "best on " + " or ".join(sorted({group.chosen_on for group in comparison.groups}))
    columns = ("row", "n", "seeds", "last epoch", best, "MMACs", "steps", "seconds", "procs")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=name != "seeds")

    for number, group in enumerate(comparison.groups, 1):
        processes = sorted({str(run.config.pipeline.processes) for run in group.runs})
        table.add_row(
            str(number),
            str(len(group.runs)),
            " ".join(map(str, group.seeds)),
            group.last.text(group.metric.scale, _choose_format(group.metric)),
            group.best.text(group.metric.scale, _choose_format(group.metric)),
            f"{group.spread('train_macs_per_sample').mean / 1e6:,.1f}",
            f"{_require_summary(group.runs[0])['steps']:,}",
            group.spread("wall_s").text(1, ",.0f"),
            " ".join(processes),
        )
    return table


def _describe_metric(metric: Metric) -> str:
    unit = " in %" if metric.is_fraction else ""
    return f"test {metric.words}{unit}"


def _choose_format(metric: Metric) -> str:
    return ".2f" if metric.is_fraction else ".4f"


def _to_number(value: float | None) -> float:
    """Return a metric as a number, NaN where a run has none."""
    return math.nan if value is None else value


def comparison_notes(comparison: Comparison) -> list[str]:
    """Return the lines below the table.

    First the number, name and folders of each row, then a warning for each row with a seed twice,
    then the unfinished runs. Empty without runs.
    """
    names, warnings, unfinished = [], [], []
    for number, group in enumerate(comparison.groups, 1):
        folders = ", ".join(str(run.folder) for run in group.runs)
        names.append(f"{number}: {group.name} ({folders})")
        if len(set(group.seeds)) < len(group.runs):
            warnings.append(
                f"note: row {number} has a seed more than once; "
                "its deviation is not one over seeds alone"
            )
    for run in comparison.unfinished:
        of_steps = "" if run.steps is None else f" of {run.steps}"
        unfinished.append(f"unfinished: {run.folder}, step {run.last_step}{of_steps}")
    return [*names, *warnings, *unfinished]


def _select_shaping_keys(run: RecordedRun) -> dict[str, Any]:
    """Return the keys that shape a run's result, without its seed."""
    free = set(_FREE_IN_A_ROW)
    if run.config.data.train_subset is not None or run.config.data.validation:
        free |= _STATISTICS  # the seed chooses the images that they were computed from
    values = {key: value for key, value in flatten(run.config).items() if key not in free}
    summary = _require_summary(run)
    values["steps"] = summary["steps"]
    values["data_sha256"] = summary.get("data_sha256", "")[:8]
    return values


def _find_different_names(keys: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names whose values are not the same everywhere, in the order of the keys."""
    names: dict[str, None] = {}
    for values in keys:
        names.update(dict.fromkeys(values))
    return [name for name in names if any(values.get(name) != keys[0].get(name) for values in keys)]


def _require_summary(run: RecordedRun) -> Mapping[str, Any]:
    assert run.summary is not None
    return run.summary


def _shorten(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)

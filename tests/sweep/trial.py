"""A trial: one configuration of the sweep, the run that it trained, and what was found wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from localpipe.tasks.metric import Metric
from tests import ROOT
from tests.sweep.forks.ranks import end_before_ranks
from tests.sweep.forks.runner import Result, Runner
from tests.sweep.values import Value

BASE = ROOT / "tests" / "sweep" / "base.yaml"
_NUMBER = re.compile(r"\d+(\.\d+)?(e-?\d+)?")


@dataclass(frozen=True)
class Finding:
    """Something that must not be: the oracle that saw it, the command, and a sentence."""

    oracle: str
    command: str
    text: str


class RefusedError(Exception):
    """A command was refused in one line, as a mistake of the user."""

    def __init__(self, result: Result) -> None:
        super().__init__(result.refusal)
        self.result = result

    @property
    def sentence(self) -> str:
        """The line without paths, to tell one refusal from another."""
        return remove_paths(str(self.result.refusal))


class FailedError(Exception):
    """A command failed, which is a finding already: nothing more can be said of this trial."""


def remove_paths(text: str) -> str:
    """Return a line with a word for every path: each trial has its own run directory."""
    return re.sub(r"\S*/\S+", "PATH", text)


def remove_numbers(text: str) -> str:
    """Return a line with N for every number, to tell whether it says the same of other values."""
    return _NUMBER.sub("N", text)


@dataclass
class Trial:
    """One configuration: words over base.yaml. Its run is trained when it is asked for first.

    number: names the run directory. `{sweep}` in a value is the runner's folder.
    """

    runner: Runner
    values: Sequence[Value]
    number: int
    findings: list[Finding] = field(default_factory=list)
    oracle: str = ""

    @cached_property
    def words(self) -> list[str]:
        folder = str(self.runner.folder)
        return [word.replace("{sweep}", folder) for value in self.values for word in value.words]

    @property
    def run_dir(self) -> Path:
        return self.runner.folder / f"run_{self.number}"

    # -- commands -------------------------------------------------------------------------------

    def train(self, name: str, *words: str) -> Result:
        """Train this configuration into a directory of its own, as `run` runs a command."""
        return self.run("train", BASE, *self.words, *words, f"run.dir={name}")

    def prepare(self) -> Result:
        """Do what `train` does before it starts a worker. Raises as `run` does."""
        words = ("train", BASE, *self.words, f"run.dir={self.run_dir}")
        return self.require(self.runner.run(*words, before=end_before_ranks))

    def run(self, *words: object) -> Result:
        """Run a command that must end with 0, and return its result.

        Raises RefusedError for one line and status 2, and FailedError for anything else, after it
        has noted it.
        """
        return self.require(self.runner.run(*words))

    def require(self, result: Result) -> Result:
        if result.refusal is not None:
            raise RefusedError(result)
        if result.status != 0:
            self.find(result, f"ends with status {result.status}: {describe_failure(result)}")
            raise FailedError
        if "Traceback" in result.stderr:
            self.find(result, "prints a traceback")
        return result

    @cached_property
    def trained(self) -> Result:
        return self.train(str(self.run_dir))

    # -- what the run left ----------------------------------------------------------------------

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The run's summary.json."""
        assert self.trained
        return self.read_summary(self.run_dir)

    @property
    def metric(self) -> Metric:
        """The metric of the run's task."""
        return Metric.from_json(self.summary)

    def read_summary(self, run_dir: Path) -> dict[str, Any]:
        values: dict[str, Any] = read_json((run_dir / "summary.json").read_text(encoding="utf-8"))
        return values

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration that the run wrote."""
        assert self.trained
        text = (self.run_dir / "config.yaml").read_text(encoding="utf-8")
        values: dict[str, Any] = yaml.safe_load(text)
        return values

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        assert self.trained
        lines = (self.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [read_json(line) for line in lines]

    def final_record(self, stage: int) -> dict[str, Any]:
        """Return the last evaluation of a stage's exit on the test images."""
        records = [
            record
            for record in self.records
            if record["kind"] == "eval" and record["split"] == "test" and record["stage"] == stage
        ]
        return records[-1]

    @property
    def is_exact(self) -> bool:
        """Whether the arithmetic is fp32 everywhere, as in a network that is loaded."""
        return bool(
            self.config["run"]["precision"] == "fp32"
            and self.config["pipeline"]["wire_dtype"] == "fp32"
        )

    # -- what is wrong --------------------------------------------------------------------------

    def find(self, result: Result, text: str) -> None:
        self.findings.append(Finding(self.oracle, result.command, text))

    def expect(self, is_right: bool, result: Result, text: str) -> None:
        if not is_right:
            self.find(result, text)

    def expect_equal(self, result: Result, what: str, got: Any, expected: Any) -> None:
        self.expect(got == expected, result, f"{what}: got {got!r}, expected {expected!r}")


def describe_failure(result: Result) -> str:
    """Return the line of standard error that says most: the last exception, else the first line."""
    lines = result.stderr.strip().splitlines() or ["nothing was printed"]
    raised = [line for line in lines if re.match(r"\w[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (raised or lines[:1])[-1][:400]


def read_json(text: str) -> Any:
    """Parse JSON as the standard has it: NaN and Infinity raise ValueError."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)

"""A slice of the sweep, and faults made on purpose that it must find and reduce."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from localpipe.config import rules
from localpipe.config.keys import Config
from localpipe.config.load import update
from localpipe.results import evaluate
from tests.sweep import __main__ as command
from tests.sweep.fixtures import write_fixtures
from tests.sweep.forks.runner import Break, Runner
from tests.sweep.log import Log
from tests.sweep.refused import COMMAND, read_refusals, write_refusals
from tests.sweep.sweep import Sweep
from tests.sweep.trial import Trial
from tests.sweep.values import VALUES, Value

KEYS = (
    "method.objective", "method.context.mode", "pipeline.stages", "pipeline.wire_dtype",
    "data.augment", "optim.accumulate", "run.probe", "run.trace",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A sweep's folder with its images and its first run."""
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in command.ENVIRONMENT.items():
            patch.setenv(name, value)
        write_fixtures(Runner(folder))
        yield folder


def build_sweep(folder: Path, *keys: str, break_: Break | None = None) -> Sweep:
    values = {key: VALUES[key] for key in keys}
    return Sweep(Runner(folder, break_), Log(None), values=values, commands=["compare"])


def test_rows_of_a_slice_show_no_fault(folder: Path) -> None:
    a_slice = build_sweep(folder, *KEYS)
    a_slice.try_rows(lambda: False, most=2)
    assert a_slice.log.findings == []
    assert a_slice.rows == 2 and a_slice.array.met > 40


def misread_augment() -> None:
    """Let `eval` normalise the images of one augmentation as it should not."""
    whole = evaluate.evaluate

    def evaluate_wrongly(
        run_dir: Path,
        given: Config,
        needs_predictions: bool = False,
        ensemble: str | None = None,
    ) -> Any:
        if given.data.augment == "none":
            given = update(given, {"data.mean": [0.1, 0.1, 0.1]})
        return whole(run_dir, given, needs_predictions, ensemble)

    evaluate.evaluate = evaluate_wrongly


def test_a_key_that_one_command_misreads_is_found_with_its_smallest_command(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = build_sweep(folder, "data.augment", "optim.lr", break_=misread_augment)
    broken.every = ("train", "eval")
    row = {key: values[2] for key, values in broken.values.items()}
    broken.try_row({**row, COMMAND: "compare"})
    assert [finding.oracle for finding in broken.log.findings] == ["eval"]
    assert "eval of base.yaml data.augment=none\n" in capsys.readouterr().out


def refuse_seed() -> None:
    """Refuse a value that should run, with advice that does not help."""

    def check_seed(config: Config) -> str | None:
        if config.run.seed == 1:
            return "run.trace and run.seed 1 do not go together; set run.trace=false"
        return None

    rules._RULES = (*rules._RULES, check_seed)


def test_a_refusal_of_what_should_run_and_its_useless_advice_are_found(
    folder: Path,
) -> None:
    broken = build_sweep(folder, "run.seed", "run.trace", break_=refuse_seed)
    broken.every = ("train",)
    calls = itertools.count()
    broken.try_values(lambda: next(calls) > 8)
    texts = [finding.text.partition(":")[0] for finding in broken.log.findings]
    assert sorted(texts) == ["not in refusals.MEANT", "the advice run.trace=false does not help"]
    assert broken.array.refused == 2 + 1  # of the seed, with every other value


@pytest.mark.parametrize(("recover", "number"), [("none", 1000), ("stage", 1001)])
def test_a_run_is_prepared_without_being_trained(folder: Path, recover: str, number: int) -> None:
    trial = Trial(Runner(folder), [Value((f"run.recover={recover}",))], number)
    assert trial.prepare().status == 0
    assert not (trial.run_dir / "summary.json").exists()
    assert trial.trained.status == 0 and (trial.run_dir / "summary.json").exists()


def refuse_pair() -> None:
    """Refuse two values together."""

    def check_pair(config: Config) -> str | None:
        if config.run.seed == 1 and config.run.trace:
            return "run.trace and run.seed 1 do not go together; set run.trace=false"
        return None

    rules._RULES = (*rules._RULES, check_pair)


def test_a_refusal_of_before_is_judged_by_one_command_and_dropped_once_it_is_accepted(
    folder: Path, tmp_path: Path
) -> None:
    found = build_sweep(folder, "run.seed", "run.trace", "optim.lr", break_=refuse_pair)
    found.every = ("train",)
    row = {key: values[1] for key, values in found.values.items()}
    found.try_row({**row, COMMAND: "compare"})
    assert found.array.refused == 1
    write_refusals(tmp_path / "refused.json", found.refusals)
    assert (tmp_path / "refused.json").read_text() == ('[\n["run.seed=1", "run.trace=true"]\n]\n')

    # The next sweep needs the refused command, and that of its advice.
    again = build_sweep(folder, "run.seed", "run.trace", "optim.lr", break_=refuse_pair)
    again.every = ("train",)
    before = read_refusals(tmp_path / "refused.json", again.values)
    again.try_refusals(before, lambda: False)
    assert again.array.refused == 1 and again.refusals == before
    assert again.runner.commands < found.runner.commands

    # Where it is accepted, nothing is left of it. Without time it stays.
    accepted = build_sweep(folder, "run.seed", "run.trace")
    accepted.try_refusals(before, lambda: False)
    assert accepted.array.refused == 0 and accepted.refusals == []
    accepted.try_refusals(before, lambda: True)
    assert accepted.refusals == before

"""Preparing a run: how often it looks things up and checks them, and what it hands on."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from localpipe import config as configs
from localpipe.config import registry
from localpipe.config.load import to_dict, update
from localpipe.errors import UserError
from localpipe.runs.directory import RunDirectory
from localpipe.runs.lock import acquire_lock
from localpipe.runs.prepare import Prepared, prepare
from tests import ROOT, hand_made
from tests.harness import settings, train

DEMO = ROOT / "configs" / "demo.yaml"


def prepare_demo(run_dir: Path) -> Prepared:
    prepared = prepare(configs.load(DEMO, [f"run.dir={run_dir}"]))
    prepared.lock.close()
    return prepared


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """Let a function note its calls; return the list of them."""
    calls: list[Any] = []
    function = getattr(owner, name)

    def counted(*args: Any, **keywords: Any) -> Any:
        calls.append(args)
        return function(*args, **keywords)

    monkeypatch.setattr(owner, name, counted)
    return calls


def test_the_demo_is_checked_three_times_and_its_objective_looked_up_twice_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading the file is counted too: once it is checked as given, and once as resolved."""
    look_ups = count_calls(monkeypatch, registry, "find_objective_class")
    module = sys.modules["localpipe.config.load"]  # the package has a function of that name
    checks = count_calls(monkeypatch, module, "_check")
    prepare_demo(tmp_path / "run")
    assert 1 <= len(look_ups) <= 2
    assert 1 <= len(checks) <= 3


def test_the_plans_that_are_handed_on_are_those_of_the_resolved_configuration(
    tmp_path: Path,
) -> None:
    prepared = prepare_demo(tmp_path / "run")
    assert len(prepared.plans) == prepared.config.stages == 4
    assert prepared.plans[-1].last == len(prepared.blueprint.blocks) - 1
    assert prepared.job.config == to_dict(prepared.config)
    assert prepared.notes == (
        f"starting {tmp_path / 'run'}: resnet14 on digits, 4 stages, 2 processes",
    )


@pytest.mark.usefixtures("hand_made")
def test_parameters_that_no_loss_reaches_are_noted_where_they_are_allowed(tmp_path: Path) -> None:
    model = {"name": "hand_unreached", "crossing_untrained": "allow"}
    method = {"objective": {"name": "greedy"}}
    prepared = prepare(hand_made.settings(tmp_path, "hand_unreached", model=model, method=method))
    prepared.lock.close()
    note = "no local loss reaches b0.side.weight and 1 more of stage 0"
    assert len([line for line in prepared.notes if note in line]) == 1


def test_an_error_that_is_kept_keeps_no_lock(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    prepare_demo(run_dir)
    with pytest.raises(UserError) as kept:
        prepare(configs.load(DEMO, [f"run.dir={run_dir}", "optim.lr=0.5"]))
    acquire_lock(run_dir, wait_s=0).close()
    assert "optim.lr" in str(kept.value)


def test_a_resume_goes_on_from_the_newest_checkpoint_with_the_recorded_configuration(
    tmp_path: Path,
) -> None:
    config = settings(tmp_path / "run")
    train(update(config, {"optim.max_steps": 2}))
    prepared = prepare(update(config, {"optim.max_steps": 4, "run.resume": "auto"}))
    prepared.lock.close()
    assert (prepared.job.start_step, prepared.schedule.steps) == (2, 4)
    assert prepared.summary is None and prepared.job.elapsed_s > 0
    assert prepared.notes[-1].startswith(f"resuming {tmp_path / 'run'} after step 2 of 4: ")
    recorded = RunDirectory(tmp_path / "run").recorded_config()
    assert recorded.optim.max_steps == 4


@pytest.mark.parametrize("names_it", [True, False])
def test_a_run_with_old_weights_goes_on_without_the_run_that_they_came_from(
    tmp_path: Path, names_it: bool
) -> None:
    train(update(settings(tmp_path / "old"), {"optim.max_steps": 1}))
    config = settings(tmp_path / "new", run={"init_from": str(tmp_path / "old")})
    train(update(config, {"optim.max_steps": 2}))
    shutil.rmtree(tmp_path / "old")

    again = update(config, {"optim.max_steps": 4})
    if not names_it:
        again = update(again, {"run.init_from": None})
    prepared = prepare(again)
    prepared.lock.close()
    assert prepared.job.start_step == 2
    assert not any("tensors taken" in note for note in prepared.notes)
    assert RunDirectory(tmp_path / "new").recorded_config().run.init_from == str(tmp_path / "old")


def test_a_run_without_a_checkpoint_begins_again_with_the_recorded_old_weights(
    tmp_path: Path,
) -> None:
    train(update(settings(tmp_path / "old"), {"optim.max_steps": 1}))
    config = settings(tmp_path / "new", run={"init_from": str(tmp_path / "old")})
    for init_from in (str(tmp_path / "old"), None):
        prepared = prepare(update(config, {"run.init_from": init_from}))
        prepared.lock.close()
        assert "tensors taken" in prepared.notes[0]
        assert prepared.config.run.init_from == str(tmp_path / "old")
    shutil.rmtree(tmp_path / "old")
    with pytest.raises(UserError, match="no complete checkpoint"):
        prepare(update(config, {"run.init_from": None}))


@pytest.mark.parametrize(
    ("words", "note"),
    [
        (
            ["optim.schedule=cosine_epoch", "optim.epochs=1", "optim.warmup_epochs=auto"],
            "note: the learning rate of cosine_epoch is 0 in every step that is left; nothing "
            "moves; set optim.schedule=cosine_step",
        ),
        (
            ["optim.schedule=cosine_epoch", "optim.lr=1e-3"],
            "note: the warm-up of cosine_epoch begins at 0.01, above the peak rate of 0.001; set "
            "optim.schedule=cosine_step, or optim.warmup_epochs=0",
        ),
        (
            ["optim.epochs=null", "optim.max_steps=50", "optim.ema=0.99"],
            "note: optim.ema 0.99 averages over some 100 steps, the run has 50, and what is "
            "evaluated is near the initial weights; lower optim.ema",
        ),
    ],
)
def test_a_note_says_where_steps_do_less_than_is_meant(
    tmp_path: Path, words: list[str], note: str
) -> None:
    prepared = prepare(configs.load(DEMO, [f"run.dir={tmp_path / 'run'}", *words]))
    prepared.lock.close()
    assert prepared.notes[0] == note and len(prepared.notes) == 2


@pytest.mark.parametrize(
    "words",
    [
        ["optim.epochs=null", "optim.max_steps=50", "optim.schedule=cosine_epoch"],
        ["optim.schedule=cosine_epoch", "optim.lr=1e-3", "optim.warmup_epochs=0"],
        ["optim.ema=0.9"],
    ],
)
def test_no_note_says_so_where_they_do_what_is_meant(tmp_path: Path, words: list[str]) -> None:
    prepared = prepare(configs.load(DEMO, [f"run.dir={tmp_path / 'run'}", *words]))
    prepared.lock.close()
    assert len(prepared.notes) == 1

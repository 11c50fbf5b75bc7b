"""Whole runs on a user's Dataset: the theorem, a resume, and the commands that read a run."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import localpipe
from localpipe.cli import main
from localpipe.config.load import parse, to_dict
from localpipe.errors import UserError
from localpipe.results.evaluate import load_stages
from localpipe.runs.directory import RunDirectory
from tests import ROOT
from tests.data.user.sets import Stripes
from tests.harness import differences, kill_after_a_checkpoint, run, settings, train

MARK = "LOCALPIPE_TEST_OF_A_RUN"
STRIPES = "tests.data.user.sets:stripes"
# Dropout in stage 0 of two.
BASE: dict[str, dict[str, Any]] = {
    "pipeline": {"stages": 2},
    "data": {"name": STRIPES, "augment": "auto", "image_size": "auto"},
}


def config(run_dir: Path, **keys: Any) -> Any:
    sections = {section: dict(values) for section, values in BASE.items()}
    for key, value in keys.items():
        section, _, name = key.partition("__")
        sections.setdefault(section, {})[name] = value
    return settings(run_dir, **sections)


@pytest.fixture(scope="module")
def sequential(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Return the states after a run in one process with one loader process."""
    return run(config(tmp_path_factory.mktemp("runs") / "one"))


@pytest.mark.parametrize(("processes", "depth", "workers"), [(2, 1, 2), (2, 8, 3), (1, 2, 2)])
def test_any_processes_depth_and_loader_processes_give_the_same_bits(
    tmp_path: Path, sequential: dict[int, Any], processes: int, depth: int, workers: int
) -> None:
    pipeline = {"pipeline__processes": processes, "pipeline__depth": depth}
    states = run(config(tmp_path / "run", **pipeline, data__workers=workers))
    assert differences(states, sequential) == []


def test_the_augmentation_takes_part_in_the_result(
    tmp_path: Path, sequential: dict[int, Any]
) -> None:
    """Equality of runs that draw nothing would prove nothing."""
    fixed = run(config(tmp_path / "run", data__name="tests.data.user.test_user_runs:fixed"))
    assert differences(fixed, sequential) != []


def fixed() -> tuple[Stripes, Stripes]:
    """Return the stripes without augmentation."""
    return Stripes(90), Stripes(30)


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path, sequential: dict[int, Any]) -> None:
    given = config(tmp_path / "run", data__workers=2, run__checkpoint_every_s=0)
    kill_after_a_checkpoint(given, tmp_path / "store")
    assert train(given) == 0
    directory = RunDirectory(tmp_path / "run")
    for stage in load_stages(directory.read().config, directory.require_checkpoint()):
        weights = sequential[stage.plan.stage]["weights"]
        assert differences(dict(stage.weights()), dict(weights)) == []


def test_the_commands_that_read_a_run_import_its_data_only_where_it_is_trusted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    given = config(run_dir, data__name="tests.data.user.sets:subset", optim__epochs=1)
    assert train(given) == 0

    # Only eval reads data.
    assert main(["eval", str(run_dir)]) == 2
    network = "model.name=tests.sample_networks:small"
    assert main(["eval", str(run_dir), network]) == 2
    assert "name it again: data.name=tests.data.user.sets:subset" in capsys.readouterr().err
    rows = tmp_path / "rows.csv"
    assert main(["eval", str(run_dir), "--trust", "--json", "--predictions", str(rows)]) == 0
    figures = json.loads(capsys.readouterr().out)
    summary = RunDirectory(run_dir).summary()
    assert summary is not None
    assert figures["stages"][-1]["accuracy"] == summary["test_accuracy"]
    with rows.open() as file:
        lines = list(csv.reader(file))
    assert (lines[0][0], len(lines)) == ("index", 31)
    assert {line[1] for line in lines[1:]} == {"a", "b", "c", "d"}
    target = tmp_path / "net.pt"
    assert main(["export", str(run_dir), "-o", str(target), network]) == 0
    assert localpipe.load(target, trust=True).classes == ("a", "b", "c", "d")


def test_a_resume_measures_no_item_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = config(tmp_path / "run", optim__epochs=1)
    assert train(given) == 0
    monkeypatch.setattr("localpipe.data.user.user_dataset.find_moments", None)
    sections = to_dict(given)
    sections["data"].update(mean="auto", std="auto")
    assert train(parse(sections, "test")) == 0
    sections["data"]["name"] = "tests.data.user.sets:other"
    with pytest.raises(TypeError):
        train(parse(sections, "test"))


def test_classes_that_only_items_say_are_told_by_eval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = config(
        tmp_path / "run",
        model__name="tests.data.user.test_user_runs:of_six",
        data__name="tests.data.user.sets:floats",
        optim__epochs=1,
    )
    assert train(given) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--trust", "--json"]) == 0
    confusion = json.loads(capsys.readouterr().out)["confusion"]
    assert [sum(row) for row in confusion] == [4, 3, 3]


def of_six(num_classes: int) -> nn.Sequential:
    """Return a network of three blocks for six numbers."""
    layers = [nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(*layers, nn.Linear(6, num_classes))


# -- through the command line -------------------------------------------------------------------


def start(run_dir: Path, *words: str, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start `localpipe train` with the stripes in two processes and two loader processes."""
    keys = [
        "model.name=tests.sample_networks:small",
        "pipeline.stages=2",
        "pipeline.processes=2",
        f"data.name={STRIPES}",
        "data.workers=2",
        "data.batch_size=16",
        "run.threads=1",
        f"run.dir={run_dir}",
    ]
    (run_dir.parent / "empty.yaml").write_text("{}")
    command = [sys.executable, "-m", "localpipe", "train", str(run_dir.parent / "empty.yaml")]
    return subprocess.Popen(
        [*prefix, *command, *keys, *words],
        cwd=ROOT,
        env={**os.environ, MARK: str(run_dir)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def list_processes(run_dir: Path) -> list[psutil.Process]:
    """Return the processes that a run has left."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == str(run_dir):
                found.append(process)
    return found


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_item_that_hangs_ends_a_run_in_one_line_and_leaves_no_process(tmp_path: Path) -> None:
    words = ("data.name=tests.data.user.sets:sleeping", "data.timeout_s=1")
    network = "model.name=tests.data.user.test_user_runs:of_six"
    process = start(tmp_path / "run", *words, network)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "data: reading item 37 of train has not ended after data.timeout_s 1" in errors
    assert "Traceback" not in errors
    wait_until(lambda: list_processes(tmp_path / "run") == [], 30)


def test_loader_processes_die_with_the_launcher(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "optim.epochs=1000", "run.checkpoint_every_s=0")
    checkpoints = tmp_path / "run" / "checkpoints"
    wait_until(lambda: list(checkpoints.glob("step_*/manifest.json")) != [], 120)
    # The launcher, two workers, and the loader processes of the first stage.
    assert len(list_processes(tmp_path / "run")) == 5
    process.kill()
    process.communicate()
    wait_until(lambda: list_processes(tmp_path / "run") == [], 30)


@pytest.mark.skipif(os.getuid() != 0, reason="mounting takes root")
def test_a_run_needs_no_room_in_the_folder_for_shared_memory(tmp_path: Path) -> None:
    small = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    prefix = ("unshare", "-m", "sh", "-c", small, "sh")
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no mount namespace here")
    process = start(tmp_path / "run", "optim.epochs=1", prefix=prefix)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


@pytest.mark.parametrize(("name", "task"), [("numbers", "classification"), ("dicts", "regression")])
def test_targets_of_another_task_are_refused_before_the_first_step(
    tmp_path: Path, name: str, task: str
) -> None:
    with pytest.raises(UserError, match=f"^data: the targets of .*{name} are .* but task {task}"):
        config(
            tmp_path / "run",
            data__name=f"tests.data.user.sets:{name}",
            task__name=task,
            model__num_classes=4,
        )


def soft(run_dir: Path, **keys: Any) -> Any:
    """Return the configuration of a run on probabilities of three classes."""
    values = {"data__name": "tests.data.user.sets:mixed", "task__name": "classification", **keys}
    return config(run_dir, model__name="tests.data.user.test_user_runs:of_six", **values)


def test_a_run_learns_probabilities_of_classes(tmp_path: Path) -> None:
    states = run(soft(tmp_path / "one"))
    again = run(soft(tmp_path / "two", pipeline__processes=2, data__workers=2))
    assert differences(states, again) == []

    run_dir, rows = tmp_path / "run", tmp_path / "rows.csv"
    assert train(soft(run_dir)) == 0
    assert train(soft(run_dir)) == 0
    recorded = RunDirectory(run_dir).read().config
    assert recorded.task.targets == "probabilities" and recorded.model.num_classes == 3
    assert main(["eval", str(run_dir), "--trust", "--predictions", str(rows)]) == 0
    summary = RunDirectory(run_dir).summary()
    assert summary is not None
    with rows.open() as file:
        lines = list(csv.reader(file))[1:]
    assert [line[1] for line in lines[:3]] == ["low", "middle", "high"]
    right = sum(line[1] == line[2] for line in lines)
    assert right / len(lines) == summary["test_accuracy"]


def test_probabilities_are_numbers_unless_the_task_is_named(tmp_path: Path) -> None:
    assert train(soft(tmp_path, task__name="auto")) == 0
    summary = RunDirectory(tmp_path).summary()
    assert summary is not None and summary["task"] == "regression"


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"task__targets": "index"}, "float32 of shape .*task.targets=auto"),
        ({"data__name": "tests.data.user.sets:floats", "task__targets": "probabilities"}, "int64"),
        ({"method__objective": {"name": "predsim"}}, "predsim"),
    ],
)
def test_probabilities_that_are_none_and_losses_over_classes_are_refused(
    tmp_path: Path, keys: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError, match=text):
        train(soft(tmp_path, **keys))


def decoder(run_dir: Path, **keys: Any) -> Any:
    """Return the configuration of a decoder on windows of a user's tokens."""
    network = {"model__name": "gpt", "model__args": {"depth": 3, "width": 8, "heads": 2}}
    text = {"data__name": "tests.data.user.sets:text", "data__vocabulary": 12}
    return config(run_dir, **network, **text, **keys)


def test_a_decoder_learns_from_a_users_tokens(tmp_path: Path) -> None:
    states = run(decoder(tmp_path / "one"))
    again = run(decoder(tmp_path / "two", pipeline__processes=2, data__workers=2))
    assert differences(states, again) == []

    run_dir, target = tmp_path / "run", tmp_path / "net.pt"
    assert train(decoder(run_dir)) == 0
    summary = RunDirectory(run_dir).summary()
    assert summary is not None and summary["task"] == "next_token"
    for words in (["eval"], ["report"], ["compare"], ["export", "-o", str(target)]):
        command, *others = words
        trust = ["--trust"] if command in ("eval", "export") else []
        assert main([command, str(run_dir), *others, *trust]) == 0
    outputs = localpipe.load(target, trust=True)(torch.arange(8)[None])
    assert outputs.shape == (1, 8, 12)

"""Advice given after work was done is followed to the letter, and the run goes on."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from localpipe import RunError, UserError
from localpipe import config as configs
from localpipe.config.explain import spell_override
from localpipe.config.keys import Config
from localpipe.config.load import apply_overrides, parse
from localpipe.config.resume import flatten
from localpipe.results.compare import compare_runs
from localpipe.results.report.page import write_report
from localpipe.runs import directory as directories
from localpipe.runs.directory import RunDirectory
from localpipe.runs.lock import acquire_lock
from localpipe.runs.prepare import Prepared, prepare
from tests.harness import train, train_here

SECTIONS: dict[str, Any] = {
    "model": {"name": "tests.sample_networks:small"},
    "pipeline": {"stages": 2},
    "data": {"name": "synthetic", "samples": 64, "image_size": 8, "batch_size": 16},
    "optim": {"lr": 0.1, "epochs": 2, "schedule": "cosine_step", "max_steps": 4},
    "run": {"threads": 1, "checkpoint_every_s": 0, "keep_checkpoints": 9, "trace": True},
}


class Command:
    """`localpipe train FILE words`, as a user types it, with another word for every advice."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.file = folder / "mine.yaml"
        self.file.write_text(yaml.safe_dump(SECTIONS))
        self.words = [f"run.dir={folder / 'run'}", *words]

    def load(self, *more: str) -> Config:
        return configs.load(self.file, [*self.words, *more])

    def train(self, *more: str) -> None:
        assert train(self.load(*more)) == 0

    def prepare(self, *more: str) -> Prepared:
        prepared = prepare(self.load(*more))
        prepared.lock.close()
        return prepared

    def refuse(self, *more: str) -> str:
        """Return the advice of the error that ends the command."""
        with pytest.raises((UserError, RunError)) as raised:
            self.prepare(*more)
        return find_advice(raised.value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with a checkpoint after each, and its configuration beside it."""
    folder = tmp_path_factory.mktemp("advice")
    Command(folder).train()
    return folder


@pytest.fixture
def command(tmp_path: Path, finished: Path) -> Command:
    """The command of a copy of the finished run."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return Command(tmp_path)


def find_advice(error: BaseException) -> str:
    return str(error).rpartition("; ")[2]


def path_in(advice: str, verb: str = "remove") -> Path:
    """Return the path that an advice names after a verb."""
    found = re.search(rf"{verb} (/\S+?)(?=,? |,|$)", advice)
    assert found is not None, advice
    return Path(found[1])


def newest(command: Command) -> Path:
    run_dir = Path(command.load().run.dir)
    return sorted((run_dir / "checkpoints").glob("step_*"))[-1]


# -- other keys at a resume ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        "data.batch_size=32",
        "data.train_subset=32",
        "optim.nesterov=false",
        "optim.lr=0.2",
        "pipeline.cuts=3",
        "method.objective.name=greedy",
        "model.args={width: 4}",
        "data.mean=0.4,0.4,0.4",
        "run.seed=1",
    ],
)
def test_the_recorded_value_is_given_as_advised(command: Command, other: str) -> None:
    words = [other, "optim.max_steps=5"]
    advice = command.refuse(*words)
    (pasted,) = shlex.split(advice.removeprefix("give ").rpartition(", or another run.dir")[0])
    assert pasted.partition("=")[0] == other.partition("=")[0]
    assert command.prepare(*words, pasted).job.start_step == 4


def test_or_another_run_dir_is_given(command: Command, tmp_path: Path) -> None:
    assert command.refuse("run.seed=1").endswith("another run.dir")
    assert command.prepare("run.seed=1", f"run.dir={tmp_path / 'other'}").job.start_step == 0
    assert command.prepare().summary is not None


def test_every_value_can_be_pasted_as_an_error_spells_it() -> None:
    odd: dict[str, Any] = {
        "model.args": {"patch": 4, "kind": "a b"},
        "data.classes": ["cat", "black dog", "1", "it's"],
        "data.mean": [0.5, 1e-05, 0.25],
        "pipeline.cuts": [3],
        "run.dir": "my runs/true",
        "run.wandb": "null",
        "optim.weight_decay": 1e-05,
        "data.image_size": [8, 12],
    }
    defaults = {**flatten(parse({}, "test")), "method.objective.head": "mlp"}
    for key, value in [*defaults.items(), *odd.items()]:
        if key == "optim.stages" or value is None and key == "run.stop_when":
            continue
        (word,) = shlex.split(spell_override(key, value))
        pasted = flatten(parse(apply_overrides({}, [word]), "test"))
        assert pasted[key] == value or [pasted[key]] == value, word


# -- checkpoints --------------------------------------------------------------------------------


def empty(file: Path) -> None:
    file.write_bytes(b"")


def spoil(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [empty, Path.unlink, spoil], ids=["cut", "gone", "changed"])
@pytest.mark.parametrize("name", ["stage_0.pt", "stage_1.pt", "manifest.json"])
def test_a_damaged_checkpoint_is_removed_and_the_one_before_it_taken(
    command: Command, name: str, damage: Callable[[Path], None]
) -> None:
    folder = newest(command)
    damage(folder / name)
    if name == "manifest.json" and damage is Path.unlink:  # it does not count without one
        assert command.prepare("optim.max_steps=5").job.start_step == 3
        return
    try:
        prepared = command.prepare("optim.max_steps=5")
        assert prepared.summary is None
        for stage in (0, 1):  # as a worker reads them
            checkpoint = RunDirectory(prepared.config.run.dir).newest_checkpoint()
            assert checkpoint is not None
            checkpoint.load_stage(stage)
    except (UserError, RunError) as error:
        shutil.rmtree(path_in(find_advice(error)))
    else:
        pytest.fail("the damage was not noticed")
    assert command.prepare("optim.max_steps=5").job.start_step == 3
    if damage is spoil and name == "stage_0.pt":
        command.train("optim.max_steps=5")


def test_a_run_that_was_killed_says_where_it_goes_on(command: Command) -> None:
    directory = RunDirectory(command.load().run.dir)
    step = int(directory.describe_resume().removeprefix("the same command goes on from step "))
    assert command.prepare("optim.max_steps=5").job.start_step == step == 4
    shutil.rmtree(directory.checkpoint_folder)
    assert "no checkpoint yet, so the same command starts again" in directory.describe_resume()
    assert command.prepare().job.start_step == 0


def test_more_steps_than_asked_for(command: Command) -> None:
    advice = command.refuse("optim.max_steps=2")
    found = re.search(r"set optim.max_steps to at least (\d+)", advice)
    assert found is not None
    assert command.prepare(f"optim.max_steps={found[1]}").summary is not None
    assert command.prepare("optim.max_steps=5").job.start_step == 4


def test_old_weights_of_a_run_without_a_checkpoint(command: Command, tmp_path: Path) -> None:
    (tmp_path / "young").mkdir()
    words = [f"run.dir={tmp_path / 'new'}"]
    advice = command.refuse(*words, f"run.init_from={tmp_path / 'young'}")
    assert advice == "give the directory of a run that has one"
    prepared = command.prepare(*words, f"run.init_from={tmp_path / 'run'}")
    assert "tensors taken" in "".join(prepared.notes)


# -- what the run directory holds ---------------------------------------------------------------


def test_a_directory_that_is_not_empty(command: Command, tmp_path: Path) -> None:
    advice = command.refuse("run.resume=never")
    assert advice.startswith("set run.overwrite=true to throw its run away, or choose another")
    other = command.prepare("run.resume=never", f"run.dir={tmp_path / 'other'}")
    assert other.job.start_step == 0 and command.prepare().summary is not None
    assert command.prepare("run.resume=never", "run.overwrite=true").job.start_step == 0


@pytest.mark.parametrize("content", ["{", "optim: [", "\xff"])
def test_a_damaged_configuration_is_restored(
    command: Command, tmp_path: Path, content: str
) -> None:
    file = tmp_path / "run" / "config.yaml"
    kept = file.read_bytes()
    file.write_bytes(content.encode("latin-1"))
    advice = command.refuse("optim.max_steps=5")
    assert advice == "restore it, or choose another run directory"
    assert command.prepare(f"run.dir={tmp_path / 'other'}").job.start_step == 0
    file.write_bytes(kept)
    assert command.prepare("optim.max_steps=5").job.start_step == 4


def test_a_configuration_that_lacks_a_key_gets_it_or_gives_its_weights(
    command: Command, tmp_path: Path
) -> None:
    file = tmp_path / "run" / "config.yaml"
    kept = file.read_text(encoding="utf-8")
    file.write_text(kept.replace("  nesterov: true\n", ""), encoding="utf-8")
    advice = command.refuse("optim.max_steps=5")
    init_from = f"run.init_from={tmp_path / 'run'}"
    assert advice == f"add the key, or begin another run.dir with its weights: {init_from}"
    assert command.prepare(f"run.dir={tmp_path / 'other'}", init_from).job.start_step == 0
    file.write_text(kept, encoding="utf-8")
    assert command.prepare("optim.max_steps=5").job.start_step == 4


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_a_damaged_summary_is_removed_or_written_again(
    command: Command, tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "run" / "summary.json"
    kept = json.loads(file.read_text())
    file.write_bytes(content)
    with pytest.raises(UserError) as raised:
        compare_runs([tmp_path / "run"])
    assert find_advice(raised.value) == "remove it, or train again with the same command"
    command.train()
    assert json.loads(file.read_text())["weights_sha256"] == kept["weights_sha256"]
    file.unlink()
    compare_runs([tmp_path / "run"])


def test_a_damaged_trace_is_removed(tmp_path: Path, command: Command) -> None:
    file = tmp_path / "run" / "trace.json"
    file.write_text("{")
    with pytest.raises(UserError) as raised:
        write_report(tmp_path / "run", tmp_path / "page.html")
    assert find_advice(raised.value) == "remove it"
    file.unlink()
    write_report(tmp_path / "run", tmp_path / "page.html")


def test_records_that_are_no_text_are_mended(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "run" / "metrics.jsonl"
    kept = file.read_bytes()
    file.write_bytes(kept + b"\xff\xff\n")
    advice = command.refuse("optim.max_steps=5")
    assert advice == "mend it, or remove it to go on without its records"
    file.write_text(file.read_bytes().decode("utf-8", "ignore"))
    assert command.prepare("optim.max_steps=5").job.start_step == 4
    file.unlink()
    assert command.prepare("optim.max_steps=5").job.start_step == 4


def test_a_directory_in_use(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directories, "acquire_lock", partial(acquire_lock, wait_s=0.1))
    held = prepare(command.load("optim.max_steps=5")).lock
    advice = command.refuse("optim.max_steps=5")
    assert advice == "wait for it, stop it, or choose another run.dir"
    assert command.prepare(f"run.dir={tmp_path / 'other'}").job.start_step == 0
    held.close()
    assert command.prepare("optim.max_steps=5").job.start_step == 4


def test_an_error_that_is_kept_does_not_keep_the_directory(command: Command) -> None:
    """As in a notebook, whose last error is a variable."""
    with pytest.raises(UserError) as kept:
        command.prepare("run.seed=1")
    assert command.prepare("optim.max_steps=5").job.start_step == 4 and kept.value


# -- data ---------------------------------------------------------------------------------------


def test_the_same_data_are_given_again(tmp_path: Path) -> None:
    def write(name: str, seed: int) -> str:
        drawn = np.random.default_rng(seed)
        arrays: dict[str, Any] = {
            f"x_{part}": drawn.integers(0, 256, (32, 8, 8, 3), np.uint8)
            for part in ("train", "test")
        }
        np.savez(tmp_path / name, **arrays, y_train=np.arange(32) % 10, y_test=np.arange(32) % 10)
        return f"data.root={tmp_path / name}"

    command = Command(tmp_path, "data.name=npz", "data.image_size=auto", "optim.max_steps=2")
    command.train(write("a.npz", 0))
    more = ("optim.max_steps=3", "data.mean=auto")
    advice = command.refuse(*more, write("b.npz", 1))
    assert advice == (
        "give it the same data, go on with these by data.changed=accept, or choose another run.dir"
    )
    assert command.prepare(*more, write("c.npz", 0)).job.start_step == 2
    accepted = command.prepare(*more, write("b.npz", 1), "data.changed=accept")
    assert accepted.job.start_step == 2
    other = f"run.dir={tmp_path / 'other'}"
    assert command.prepare(*more, write("b.npz", 1), other).job.start_step == 0


@pytest.mark.parametrize(
    "words",
    [
        ["data.batch_size=128", "data.drop_last=true"],
        ["data.train_subset=10", "data.drop_last=true"],
        ["data.train_subset=1"],
        ["data.validation=63"],
        ["data.train_subset=1", "data.validation=63"],
        ["data.train_subset=3", "pipeline.replicas=2"],
        ["data.train_subset=2", "pipeline.replicas=4", "data.drop_last=true"],
    ],
    ids=" ".join,
)
def test_each_way_to_get_a_batch_of_few_images_works(tmp_path: Path, words: list[str]) -> None:
    follow = {
        "set data.drop_last=false": "data.drop_last=false",
        "raise data.train_subset": "data.train_subset=null",
        "lower data.validation": "data.validation=0",
        "lower pipeline.replicas": "pipeline.replicas=1",
    }
    command = Command(tmp_path, *words)
    advice = command.refuse()
    for index, choice in enumerate(advice.split(", or ")):
        more = [follow[part] for part in choice.split(" and ")]
        prepared = command.prepare(*more, f"run.dir={tmp_path / str(index)}")
        assert prepared.job.start_step == 0, choice


# -- the disk -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "first"),
    [
        (errno.ENOSPC, "free space, or choose"),
        (errno.EDQUOT, "free space, or choose"),
        (errno.EACCES, "get the right to write there, or choose"),
        (errno.ENOTDIR, "choose"),
    ],
)
def test_what_cannot_be_written(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, first: str
) -> None:
    def fail(*words: object, **more: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("localpipe.files.write_whole", fail)
        assert command.refuse("optim.max_steps=5") == f"{first} another run.dir"
    # What was there is untouched, and the same command goes on when the disk takes files again.
    assert command.prepare("optim.max_steps=5").job.start_step == 4
    assert command.prepare(f"run.dir={tmp_path / 'other'}").job.start_step == 0


def test_a_run_dir_below_a_file(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert command.refuse(f"run.dir={tmp_path}/file/run") == "choose another run.dir"
    assert command.prepare(f"run.dir={tmp_path / 'other'}").job.start_step == 0


# -- the training itself ------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_needs_a_new_run(tmp_path: Path) -> None:
    command = Command(tmp_path, "optim.lr=1e20")
    prepared = command.prepare()
    with pytest.raises(RunError) as raised:
        train_here(prepared.config)
    advice = find_advice(raised.value)
    assert advice == "start a new run with a lower optim.lr, or look at the data"
    assert command.refuse("optim.lr=0.1").endswith("or another run.dir")
    command.train("optim.lr=0.1", f"run.dir={tmp_path / 'new'}")
    assert (tmp_path / "new" / "summary.json").exists()


@pytest.fixture
def spaced(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "my code"
    folder.mkdir()
    file = folder / "losses.py"
    file.write_text("from localpipe.methods.greedy import Greedy\nclass Mine(Greedy):\n    pass\n")
    yield file


def test_code_in_a_folder_with_a_space_is_named_again(tmp_path: Path, spaced: Path) -> None:
    command = Command(tmp_path)
    objective = f"method.objective.name={spaced}:Mine"
    command.train(objective)
    with pytest.raises(UserError) as raised:
        RunDirectory(tmp_path / "run").config()
    text = str(raised.value)
    found = re.search(r"name it again: (.*?)(?: \(eval|$)", text)
    assert found is not None
    (pasted,) = shlex.split(found[1])
    model = f"model.name={SECTIONS['model']['name']}"
    read = RunDirectory(tmp_path / "run").config(overrides=[pasted, model])
    assert read.method.objective["name"] == f"{spaced}:Mine"

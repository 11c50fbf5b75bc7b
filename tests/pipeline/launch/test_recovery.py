"""Workers that die alone: what the launcher decides, and a few blows of torture/recoveries.py."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from localpipe import config as configs
from localpipe import data
from localpipe.config.load import to_dict
from localpipe.environment import COMPARE_REPLAY
from localpipe.errors import UserError
from localpipe.pipeline.channels.shared_memory import SHARED_MEMORY_DIR
from localpipe.pipeline.launch import recovery
from localpipe.pipeline.launch.job import Job
from localpipe.pipeline.launch.recovery import RecoveringWorkers
from localpipe.pipeline.launch.watchdog import STOP
from localpipe.pipeline.stages.stage_plan import build_plans
from localpipe.pipeline.stages.weights import weight_lines, weights_digest
from localpipe.plan.resolve_here import resolve_here
from tests.harness import settings, train_here
from tests.pipeline.launch.scripted_worker import SCRIPT
from tests.torture.kills import SMALL, Started, records, summary
from tests.torture.recoveries import KEYS, Run, Watched, blow

Script = Callable[..., RecoveringWorkers]


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Return a function that starts two workers with their actions, one for each process."""
    monkeypatch.setenv(SCRIPT, str(tmp_path))

    def start(*actions: str, **run: Any) -> RecoveringWorkers:
        for rank, words in enumerate(actions):
            (tmp_path / f"rank_{rank}").write_text(words)
        given = {"recover": "stage", "timeout_s": 2, **run}
        config = settings(tmp_path / "run", pipeline={"stages": 2, "processes": 2}, run=given)
        job = Job(to_dict(config), to_dict(config), 0, 0.0, 0.0)
        _, plans = build_plans(config)
        module = "tests.pipeline.launch.scripted_worker"
        return RecoveringWorkers(
            config, job, module, lambda: "run it again", plans, {}, 1000, shown.append
        )

    shown: list[recovery.Recovery] = []
    return start


def follow(workers: RecoveringWorkers, tick: Callable[[], None] = lambda: None) -> int:
    """Follow the workers to their end; nothing of them is left in shared memory then."""
    with workers:
        folder = workers.folder
        assert folder.parent == Path(SHARED_MEMORY_DIR)
        status = workers.follow(tick)
        workers.list_recoveries()
    assert not folder.exists()
    return status


def seen(tmp_path: Path) -> list[str]:
    return sorted((tmp_path / "seen").read_text().splitlines())


def test_a_worker_that_is_killed_is_replaced_and_no_other(tmp_path: Path, launch: Script) -> None:
    workers = launch("end2", "kill kill end0")
    assert follow(workers) == 0
    assert seen(tmp_path) == ["0 end2 new", "1 end0 new", "1 kill new", "1 kill new"]
    first, second = workers.list_recoveries()
    assert first.as_json() == {
        "stage": 1,
        "step": 7,
        "cause": "was killed by SIGKILL",
        "detect_s": pytest.approx(0.25, abs=2),
        "ready_s": pytest.approx(1, abs=20),
        "replayed_steps": 3,
        "replay_s": 0.25,
    }
    assert "its worker was killed by SIGKILL at step 7; noticed in" in str(second)


def test_a_worker_that_hangs_or_is_suspended_is_replaced(tmp_path: Path, launch: Script) -> None:
    workers = launch("hang end0", "suspend end0", timeout_s=1)
    assert follow(workers) == 0
    causes = {each.rank: each.cause for each in workers.list_recoveries()}
    assert causes == {0: "hung", 1: "was suspended"}
    assert {each.rank: each.detect_s for each in workers.list_recoveries()}[0] == 4.0


def test_a_worker_that_raises_ends_the_run(
    tmp_path: Path, launch: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    assert follow(launch("wait", "raise end0")) == 1
    assert capsys.readouterr().err == "localpipe: it broke\n"
    assert "1 end0 new" not in seen(tmp_path)


def test_a_worker_that_dies_too_often_ends_the_run(
    tmp_path: Path, launch: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    assert follow(launch("wait", "kill kill kill end0", max_recoveries=2)) == 1
    assert capsys.readouterr().err == (
        "localpipe: stage 1, replica 0, about step 5: rank 1 was killed by SIGKILL; "
        "run.max_recoveries 2 allows no more of its deaths; run it again\n"
    )


def test_after_a_stop_nothing_is_replaced(tmp_path: Path, launch: Script) -> None:
    workers = launch("wait", "kill end0")
    workers._notes.put(STOP, "a worker")
    assert follow(workers) == 1
    assert "1 end0 new" not in seen(tmp_path)


def test_a_spare_stands_ready_after_the_first_step(tmp_path: Path, launch: Script) -> None:
    assert follow(launch("end3", "kill end0", spares=1)) == 0
    assert [line for line in seen(tmp_path) if line != "warm"] == [
        "0 end3 new",
        "1 end0 spare",
        "1 kill new",
    ]
    assert "warm" in seen(tmp_path)


def test_a_spare_that_is_gone_is_no_loss(tmp_path: Path, launch: Script) -> None:
    workers = launch("end3", "kill end0", spares=1)

    def kill_spares() -> None:
        for spare in workers._spares:
            spare.send_signal(signal.SIGKILL)
            spare.wait()

    assert follow(workers, kill_spares) == 0
    lines = [line[:6] for line in seen(tmp_path) if line != "warm"]
    assert lines == ["0 end3", "1 end0", "1 kill"]


def test_shared_memory_without_room_is_refused_with_the_bytes(
    launch: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(Path(SHARED_MEMORY_DIR).glob("localpipe-launch-*"))

    class Usage:
        free = 999

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(UserError, match=r"needs [\d,]+ bytes in /dev/shm, but 999 bytes are free"):
        launch("end0", "end0")
    assert set(Path(SHARED_MEMORY_DIR).glob("localpipe-launch-*")) <= before


def test_the_first_worker_never_notices_that_the_last_one_dies(tmp_path: Path) -> None:
    """It is killed in an evaluation. What is computed again is compared with what was sent."""
    run_dir = tmp_path / "run"
    keys = {
        **SMALL,
        "model.name": "tests.sample_networks:small",
        "pipeline.stages": 3,
        "optim.epochs": 2,
    }
    given = {key.replace(".", "__"): value for key, value in keys.items()}
    given.update({**KEYS, "pipeline__replay": 8, "run__trace": "false"})
    run = Run(1, 2, "")
    with Started(run_dir, env={COMPARE_REPLAY: "1"}, **given) as started:
        watched = Watched(started, 2, 2)
        assert blow(run, watched, "last evaluation", random.Random(4))
        assert started.wait() == 0, started.err
        said = started.out
    assert run.struck == {1} and len(set(watched.pids[0])) == 1
    assert watched.folder is not None and not watched.folder.exists()
    (recovered,) = summary(run_dir)["recoveries"]
    assert recovered["stage"] == 2 and recovered["replayed_steps"] >= 0
    assert said.count("stage 2 goes on in a new process: its worker was killed by SIGKILL") == 1

    # The digest of one process, and no record twice.
    sections: dict[str, dict[str, Any]] = {}
    for key, value in keys.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    sections["pipeline"]["processes"] = 1
    config = configs.parse(sections, "test")
    config = resolve_here(config, data.load(config.data, config.run.seed))
    lines = [line for stage in train_here(config) for line in weight_lines(stage.weights())]
    assert summary(run_dir)["weights_sha256"] == weights_digest(lines)
    marks = [
        (each["kind"], each["step"], each["stage"], each.get("split"))
        for each in records(run_dir)
        if each["kind"] != "start"
    ]
    assert len(marks) == len(set(marks)) > 10

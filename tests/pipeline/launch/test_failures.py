"""The promises about failures, tested on the command itself, from outside.

tests/torture/kills.py tests the same at random moments.
"""

from __future__ import annotations

import fcntl
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from localpipe.runs.lock import WAIT_S
from tests.torture.kills import (
    GONE_S,
    Started,
    checkpoints,
    differences,
    last_step,
    records,
    summary,
    wrong_checkpoints,
)

# 32 steps, a checkpoint after every one
SHORT: dict[str, Any] = {"optim__epochs": 4, "run__checkpoint_every_s": 0}

RAISES = """
from torch import nn

class Raises(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += x.device.type != "meta" and self.training
        if self.calls == 7:
            raise ValueError("no more")
        return x

def network(num_classes):
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(Raises(), nn.Conv2d(4, 4, 3)), head)
"""


LINGERS = """
import time
from torch import nn

class Lingers(nn.Module):
    def forward(self, x):
        time.sleep(0.1 * (x.device.type != "meta" and not self.training))
        return x

def network(num_classes):
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(Lingers(), nn.Conv2d(4, 4, 3)), head)
"""


def run(run_dir: Path, **keys: Any) -> tuple[int, str, str]:
    """Run the command to its end; return exit status, stdout and stderr."""
    with Started(run_dir, **{**SHORT, **keys}) as started:
        status = started.wait()
        return status, started.out, started.err


def begun(run_dir: Path, **keys: Any) -> Started:
    """Start the command and return when it has its first checkpoint."""
    started = Started(run_dir, **{**SHORT, **keys})
    assert started.until(lambda: bool(checkpoints(run_dir))), started.err
    return started


def goes_on(run_dir: Path, undisturbed: Path, **keys: Any) -> str:
    """Assert that the same command continues and ends as the undisturbed run; return its stdout."""
    assert wrong_checkpoints(run_dir) == []
    status, out, err = run(run_dir, **keys)
    assert (status, err) == (0, "")
    assert wrong_checkpoints(run_dir) == []
    assert differences(run_dir, undisturbed) == []
    return out


def one_line(text: str) -> bool:
    return text.count("\n") == 1 and text.startswith("localpipe: ")


@pytest.fixture(scope="session", autouse=True)
def refused(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """A run in a directory that this process has locked.

    It is started first of all, and waits while the other tests run.
    """
    run_dir = tmp_path_factory.mktemp("held")
    with open(run_dir / "lock", "a") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        with Started(run_dir, **SHORT) as started:
            yield started


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory and the stdout of a run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    status, out, err = run(run_dir)
    assert (status, err) == (0, "")
    return run_dir, out


@pytest.fixture
def damaged(undisturbed: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the undisturbed run before its end, whose newest checkpoint a test may damage."""
    run_dir = tmp_path / "damaged"
    shutil.copytree(undisturbed[0], run_dir)
    (run_dir / "summary.json").unlink()
    return run_dir


def test_run_without_a_terminal_says_no_control_characters_and_no_warnings(
    undisturbed: tuple[Path, str],
) -> None:
    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f]", undisturbed[1]) is None
    assert "warn" not in undisturbed[1].lower()


def test_finished_run_prints_its_summary_again(undisturbed: tuple[Path, str]) -> None:
    status, out, err = run(undisturbed[0])
    assert (status, err) == (0, "")
    assert summary(undisturbed[0])["weights_sha256"] in out


def test_killed_worker_ends_the_run_with_one_line_and_the_same_command_goes_on(
    undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    with begun(tmp_path / "run") as started:
        started.workers()[1].kill()
        assert started.gone() is not None, f"processes are left after {GONE_S:g} s"
        assert started.wait() == 1
        assert one_line(started.err)
        assert re.search(r"stages 2\.\.3, replica 0, .*: rank 1 was killed by SIGKILL", started.err)
    # at another number of processes and another depth, which shape no result
    assert "resuming" in goes_on(
        tmp_path / "run", undisturbed[0], pipeline__processes=1, pipeline__depth=4
    )


def test_workers_die_with_their_launcher_and_the_same_command_goes_on(
    undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    with begun(tmp_path / "run") as started:
        started.process.kill()
        assert started.gone() is not None, f"processes are left after {GONE_S:g} s"
        assert started.err == ""
    assert "resuming" in goes_on(tmp_path / "run", undisturbed[0])


def test_launcher_killed_before_a_configuration_is_recorded_leaves_nothing_in_the_way(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "lock").touch()
    (run_dir / ".config.yaml.4711").write_text("model: {na", encoding="utf-8")  # never renamed
    status, _, err = run(run_dir, optim__max_steps=1)
    assert (status, err) == (0, "")


def test_sigterm_saves_and_stops_and_the_same_command_goes_on(
    undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with begun(run_dir, run__checkpoint_every_s=0.2) as started:
        started.process.send_signal(signal.SIGTERM)
        assert started.gone() is not None, f"processes are left after {GONE_S:g} s"
        assert started.wait() == 128 + signal.SIGTERM
        assert one_line(started.err)
    stopped_at = int(checkpoints(run_dir)[-1].name.rpartition("_")[2])
    assert stopped_at >= last_step(run_dir)  # nothing that was made is lost
    assert f"after step {stopped_at} of" in goes_on(run_dir, undisturbed[0])


def test_a_stop_in_the_last_evaluation_is_no_end(tmp_path: Path) -> None:
    (tmp_path / "lingers.py").write_text(LINGERS)
    keys: dict[str, Any] = {
        "model__name": f"{tmp_path / 'lingers.py'}:network",
        "pipeline__stages": 2,
        "optim__epochs": 1,
    }
    with Started(tmp_path / "run", **keys, run__log_every=1) as started:
        assert started.until(lambda: last_step(tmp_path / "run") == 8), started.err
        started.process.send_signal(signal.SIGTERM)
        assert started.wait() == 128 + signal.SIGTERM
        assert one_line(started.err)
    assert not (tmp_path / "run" / "summary.json").exists()
    status, out, err = run(tmp_path / "run", **keys)
    assert (status, err) == (0, "") and "after step 8 of 8" in out
    assert None not in summary(tmp_path / "run")["test_accuracy_per_stage"]


def test_uneven_replicas_go_on_with_nothing_but_an_evaluation_left(tmp_path: Path) -> None:
    keys = {
        "pipeline__stages": 2,
        "pipeline__replicas": "[2,1]",
        "pipeline__processes": 3,
        "optim__epochs": 1,
    }
    assert run(tmp_path / "run", **keys)[0] == 0
    found = summary(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    status, _, err = run(tmp_path / "run", **keys)
    assert (status, err) == (0, "") and summary(tmp_path / "run")["test_accuracy"] == found[
        "test_accuracy"
    ]


def test_stopped_worker_is_missed_after_the_timeout(tmp_path: Path) -> None:
    with Started(tmp_path / "run", **{**SHORT, "optim__epochs": 400}, run__timeout_s=3) as started:
        assert started.until(lambda: last_step(tmp_path / "run") >= 100), started.err
        started.workers()[0].suspend()
        assert started.gone(3 + GONE_S) is not None, "processes are left"
        assert started.wait() == 1
        assert one_line(started.err)
        assert re.search(
            r"stage [01], replica 0, step \d+: no sign of life from rank 0", started.err
        )
    assert wrong_checkpoints(tmp_path / "run") == []


def test_truncated_checkpoint_is_named_and_the_advice_works(
    undisturbed: tuple[Path, str], damaged: Path
) -> None:
    newest = checkpoints(damaged)[-1]
    spoilt = newest / "stage_2.pt"
    spoilt.write_bytes(spoilt.read_bytes()[:1000])
    status, _, err = run(damaged)
    assert status == 2
    assert one_line(err) and str(spoilt) in err and f"remove {newest} " in err
    shutil.rmtree(newest)
    assert "resuming" in goes_on(damaged, undisturbed[0])


def test_changed_key_that_shapes_the_result_is_named(damaged: Path) -> None:
    status, _, err = run(damaged, optim__lr=0.2)
    assert status == 2
    assert one_line(err) and "optim.lr is 0.2" in err and "0.1" in err


def test_loss_that_is_not_finite_ends_the_run_and_reaches_no_checkpoint(tmp_path: Path) -> None:
    status, _, err = run(tmp_path / "run", optim__lr=1e30, optim__warmup_epochs=0, run__log_every=1)
    assert status == 1
    assert one_line(err) and re.search(
        r"stage \d, replica 0, step \d+: the local loss of step \d+ is nan", err
    )
    assert wrong_checkpoints(tmp_path / "run") == []
    assert records(tmp_path / "run")[0]["schema"] == 1  # every line is strict JSON


def test_layer_that_raises_is_named_by_stage_and_step_above_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "raises.py").write_text(RAISES, encoding="utf-8")
    keys = {**SHORT, "model__name": "raises:network", "pipeline__stages": 2}
    with Started(tmp_path / "run", env={"PYTHONPATH": str(tmp_path)}, **keys) as started:
        assert started.wait() == 1
        first, _, rest = started.err.partition("\n")
    assert re.match(r"localpipe: stage 1, replica 0, step 7: .*no more", first)
    assert 'raise ValueError("no more")' in rest


def test_second_run_in_a_directory_waits_and_names_the_process_that_holds_it(
    refused: Started,
) -> None:
    assert refused.wait(WAIT_S + 60) == 2
    assert one_line(refused.err)
    assert re.search(r"is in use by process \d+ \(.+\)", refused.err)
    assert not (refused.run_dir / "config.yaml").exists()

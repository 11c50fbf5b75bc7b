"""`doctor --gpu` without a GPU: how steps share the time, how they end badly, and the two files."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from localpipe.cli.command_line import main
from localpipe.doctor.gpu import size
from localpipe.doctor.gpu.findings import Finding, StepFindings
from localpipe.doctor.gpu.gpu_doctor import GpuDoctorRequest, run_steps, select_steps
from localpipe.doctor.gpu.gpu_report import GpuReport
from localpipe.doctor.gpu.step import STEPS, GpuStep, limit_s
from localpipe.doctor.gpu.step_process import run_step
from localpipe.errors import RunError
from tests.doctor import fake_steps


def fake(function: Any, share_s: float = 100) -> GpuStep:
    name = function.__name__
    return GpuStep(name, f"does it {name}?", share_s, f"{function.__module__}:{name}")


def run(
    folder: Path, steps: Sequence[GpuStep], minutes: float = 10, is_quiet: bool = True
) -> dict[str, Any]:
    """Run steps, and return the JSON that is on disk afterwards."""
    request = GpuDoctorRequest(minutes, folder, None, "tiny", None)
    report = run_steps(steps, request, folder, time.monotonic(), is_quiet)
    written: dict[str, Any] = json.loads((folder / "gpu.json").read_text())
    assert written == json.loads(json.dumps(report.as_json()))
    return written


# -- the time -------------------------------------------------------------------------------------


def test_shares_of_the_steps_make_eight_minutes() -> None:
    assert sum(step.share_s for step in STEPS) == 480
    assert len({step.name for step in STEPS}) == len(STEPS) == 9


def test_a_step_that_takes_all_its_time_takes_none_of_the_others() -> None:
    left_s = 240.0
    for index, step in enumerate(STEPS):
        limit = limit_s(left_s, step, STEPS[index + 1 :])
        assert limit == pytest.approx(step.share_s / 2)
        left_s -= limit
    assert left_s == pytest.approx(0)


def test_time_that_a_step_leaves_belongs_to_the_later_ones() -> None:
    first, second, third = (fake(fake_steps.succeed, share_s) for share_s in (10, 20, 30))
    assert limit_s(60, first, (second, third)) == 10
    assert limit_s(60, second, (third,)) == 24  # the first step took no time
    assert limit_s(60, third, ()) == 60
    assert limit_s(-1, third, ()) == 0


# -- how steps end --------------------------------------------------------------------------------


def test_a_step_that_hangs_is_killed_with_its_processes_and_told(tmp_path: Path) -> None:
    # Of two minutes the step in the middle gets about ten seconds.
    steps = [fake(fake_steps.succeed), fake(fake_steps.hang, 10), fake(fake_steps.succeed_again)]
    report = run(tmp_path, steps, minutes=2)
    first, middle, last = report["steps"]
    assert middle["status"] == "killed" and "killed at its limit" in middle["reason"]
    assert middle["wall_s"] >= middle["limit_s"] - 0.1
    # What it had found is kept, and the time of the last one is not touched.
    (finding,) = middle["findings"]
    assert finding["name"] == "started"
    with pytest.raises(ProcessLookupError):
        wait_until_gone(finding["figures"]["pid"])
    assert first["status"] == last["status"] == "ended" and last["limit_s"] > 60
    assert report["wall_s"] < 120


def wait_until_gone(pid: int) -> None:
    """Raise ProcessLookupError as soon as there is no such process, or it is a zombie."""
    for _ in range(100):
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2]
        if status.startswith("Z"):
            raise ProcessLookupError
        time.sleep(0.1)


def test_a_step_that_fails_leaves_the_others(tmp_path: Path) -> None:
    names = ("raise_error", "raise_mistake", "crash", "succeed")
    steps = [fake(getattr(fake_steps, name)) for name in names]
    report = run(tmp_path, steps)
    ends = {step["name"]: (step["status"], step["reason"]) for step in report["steps"]}
    assert ends == {
        "raise_error": ("failed", "ValueError: no such thing"),
        "raise_mistake": ("failed", "config: one line"),
        "crash": ("failed", "killed by SIGSEGV"),
        "succeed": ("ended", ""),
    }
    assert "Traceback" in (tmp_path / "steps" / "raise_error" / "log.txt").read_text()


def test_a_step_whose_module_is_missing_is_told(tmp_path: Path) -> None:
    report = run(tmp_path, [GpuStep("gone", "is it there?", 1, "localpipe.no_such_module:run")])
    (step,) = report["steps"]
    assert step["status"] == "failed" and "no_such_module" in step["reason"]


def test_an_error_of_the_doctor_itself_leaves_no_process(tmp_path: Path) -> None:
    pids = []

    def tick() -> None:
        found = StepFindings.read(tmp_path / "findings.json")
        if found.findings:
            pids.append(found.findings[0].figures["pid"])
            raise RunError("cannot write")

    from localpipe.doctor.gpu.step_context import StepRequest

    function = "tests.doctor.fake_steps:hang"
    request = StepRequest(function, str(tmp_path), "tiny", None, time.monotonic() + 100)
    with pytest.raises(RunError):
        run_step(request, tmp_path / "log.txt", tick)
    with pytest.raises(ProcessLookupError):
        wait_until_gone(pids[0])


# -- the files ------------------------------------------------------------------------------------


def test_both_files_are_complete_after_every_step(tmp_path: Path) -> None:
    names = ("succeed", "crash", "read_report", "succeed_again")
    report = run(tmp_path, [fake(getattr(fake_steps, name)) for name in names])
    (finding,) = report["steps"][2]["findings"]
    seen = finding["figures"]
    assert seen["statuses"] == ["ended", "failed", "running", "waiting"]
    assert "| figure | ok | twelve |" in seen["table"]
    assert "failed, " in seen["table"] and "killed by SIGSEGV" in seen["table"]


def test_the_json_has_the_keys_that_its_page_names(tmp_path: Path) -> None:
    report = run(tmp_path, [fake(fake_steps.succeed)], minutes=1)
    assert report.keys() == {
        "schema", "localpipe", "emulated", "minutes", "size", "cifar", "wall_s", "machine", "steps",
    }  # fmt: skip
    assert report["schema"] == 1 and report["minutes"] == 1 and report["size"] == "tiny"
    (step,) = report["steps"]
    assert step.keys() == {
        "name", "question", "status", "reason", "limit_s", "wall_s", "findings",
    }  # fmt: skip
    assert step["findings"] == [
        {"name": "figure", "status": "ok", "text": "twelve", "figures": {"value": 12}},
        {"name": "NVML", "status": "absent", "text": "there is none", "figures": {}},
    ]


def test_findings_are_printed_as_they_come(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, [fake(fake_steps.succeed), fake(fake_steps.crash)], is_quiet=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "succeed: figure: ok: twelve",
        "succeed: NVML: absent: there is none",
        "crash: failed: killed by SIGSEGV",
    ]


def test_what_is_absent_is_no_failure_and_what_is_wrong_is(tmp_path: Path) -> None:
    ends = {}
    for name in ("succeed", "find_wrong", "crash"):
        folder = tmp_path / name
        folder.mkdir()
        request = GpuDoctorRequest(10, folder, None, "tiny", None)
        steps = [fake(getattr(fake_steps, name))]
        ends[name] = run_steps(steps, request, folder, time.monotonic(), is_quiet=True).is_bad
    assert ends == {"succeed": False, "find_wrong": True, "crash": True}


def test_the_table_says_what_is_emulated_and_draws_links_below(tmp_path: Path) -> None:
    report = GpuReport(tmp_path, STEPS[:1], 8, "tiny", None)
    assert report.as_json()["emulated"] is None
    machine = {
        "devices": ["Emulated GPU", "Emulated GPU"], "emulated": True, "torch": "2.15",
        "cuda": "13.0", "nccl": "2.30.7", "cores": 2,
    }  # fmt: skip
    drawing = Finding("topology", "ok", "a | b", {"lines": ["GPU0  X", "GPU1  NV18"]})
    report.add(0, StepFindings([drawing], machine))
    assert report.as_json()["emulated"] is True
    table = (tmp_path / "gpu.md").read_text()
    assert "**emulated: true** (no real device) 2 x Emulated GPU; torch 2.15" in table
    assert "a rehearsal, its figures mean nothing" in table
    assert "a \\| b" in table and "```text\nGPU0  X\nGPU1  NV18\n```" in table


# -- the command line -----------------------------------------------------------------------------


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let the doctor see a device, and write below a folder of the test."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.chdir(tmp_path)


def test_without_a_device_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--gpu"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--gpu needs a CUDA device, and torch sees none" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--gpu", "--minutes", "0"], "--minutes is 0, expected a number above 0"),
        (["--gpu", "--minutes", "nan"], "--minutes is nan"),
        (["--gpu", "--minutes", "inf"], "--minutes is inf"),
        (["--gpu", "--steps", "nccl,exactnes"], "no step 'exactnes'; did you mean exactness?"),
        (["--gpu", "--cifar", "none.npz"], "--cifar none.npz is no file"),
        (["--gpu", "--quick"], "--quick does not go with --gpu"),
        (["--gpu", "--dir", "."], "--dir does not go with --gpu"),
        (["--minutes", "3"], "--minutes goes with --gpu alone"),
        (["--size", "tiny"], "--size goes with --gpu alone"),
        (["--gpu", "--out", "old"], "old holds gpu.json already"),
        (["--gpu", "--out", "runs"], "runs holds steps already"),
        (["--gpu", "--out", "file"], "file"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], part: str, device: None, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("old").mkdir()
    Path("old/gpu.json").write_text("{}")
    Path("file").write_text("")
    Path("runs/steps").mkdir(parents=True)
    assert main(["doctor", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and part in error


def test_the_command_runs_the_chosen_steps_and_returns_their_status(
    device: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = (fake(fake_steps.succeed), fake(fake_steps.find_wrong))
    monkeypatch.setattr("localpipe.doctor.gpu.gpu_doctor.STEPS", known)
    assert main(["doctor", "--gpu", "--steps", "succeed", "--out", "a/b", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads(Path("a/b/gpu.json").read_text())
    assert [step["name"] for step in report["steps"]] == ["succeed"]
    assert main(["doctor", "--gpu", "--minutes", "5"]) == 1
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("gpu_")
    assert f"{folder}/gpu.md has the table" in capsys.readouterr().out


def test_steps_keep_their_order() -> None:
    assert [step.name for step in select_steps(["nccl", "versions"])] == ["versions", "nccl"]
    assert select_steps(None) == list(STEPS)


def test_every_size_has_cuts_of_balanced_memory() -> None:
    from localpipe.bench.memory import BALANCED

    for one in size.SIZES.values():
        assert one.memory_network in BALANCED
        assert one.flat_steps[0] < one.flat_steps[1]
    assert size.FULL.flat_steps[1] == 1000

"""The steps of `doctor --gpu` on made-up machines and results: what is absent, wrong or right."""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from localpipe.doctor.check import Check
from localpipe.doctor.gpu import nvml
from localpipe.doctor.gpu.commands import CommandEnd, bench, train_all
from localpipe.doctor.gpu.findings import Finding, StepFindings
from localpipe.doctor.gpu.machine import SHARING_VARIABLES
from localpipe.doctor.gpu.nvml import NvmlError, open_energy_meter
from localpipe.doctor.gpu.size import TINY
from localpipe.doctor.gpu.step_context import FINDINGS_FILE, StepContext, StepRequest
from localpipe.doctor.gpu.steps import (
    accuracy,
    energy,
    exactness,
    flat_memory,
    infopro_memory,
    nccl_edges,
    throughput,
    versions,
)

MACHINE = {
    "devices": ["Some GPU"], "emulated": False, "torch": "2.15.0", "cuda": "13.0",
    "nccl": "2.30.7", "python": "3.12.0", "cores": 16,
}  # fmt: skip


def make_context(
    folder: Path, devices: int = 1, size: str = "full", cifar: Path | None = None, **facts: Any
) -> StepContext:
    """Return the context of a step with ten minutes, on a made-up machine."""
    end_s = time.monotonic() + 600
    request = StepRequest("", str(folder), size, None if cifar is None else str(cifar), end_s)
    machine = {**MACHINE, "devices": ["Some GPU"] * devices, **facts}
    return StepContext(request, machine)


def findings(context: StepContext) -> dict[str, Finding]:
    """Return what is in the file of a step, by name."""
    found = StepFindings.read(context.folder / FINDINGS_FILE).findings
    assert len({finding.name for finding in found}) == len(found)
    return {finding.name: finding for finding in found}


Trainings = list[tuple[str, list[str], dict[str, str]]]


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    """Replace training. Runs whose name has `depth 4` end badly, the others have one digest."""
    started: Trainings = []

    def train(
        context: StepContext,
        runs: Mapping[str, Sequence[str]],
        limit_s: float,
        variables: Mapping[str, str] | None = None,
    ) -> dict[str, CommandEnd]:
        ends = {}
        for name, words in runs.items():
            started.append((name, list(words), dict(variables or {})))
            ends[name] = CommandEnd({"weights_sha256": "a" * 64, "peak_memory_bytes": [100, 100]})
            if "depth 4" in name:
                ends[name] = CommandEnd(None, "it hangs")
            if "1000 steps" in name:
                ends[name] = CommandEnd({"peak_memory_bytes": [100, 103]})
            if "again" in name and "captured" in name:
                ends[name] = CommandEnd({"weights_sha256": "b" * 64})
        return ends

    for module in (exactness, nccl_edges, flat_memory):
        monkeypatch.setattr(module, "train_all", train)
    return started


# -- versions -------------------------------------------------------------------------------------


def test_checks_become_findings_and_what_is_not_there_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = [
        Check("cores", "ok", "16", "", {"cores": 16}),
        Check("memory", "warning", "1 GiB free", "end something"),
        Check("disk", "error", "no space", "free some"),
    ]
    monkeypatch.setattr(versions, "check_machine", lambda quick, folder: iter(checks))
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(nvml, "_LIBRARY", "libno-such-thing.so.1")
    context = make_context(tmp_path)
    versions.run(context)
    found = findings(context)
    assert found["cores"] == Finding("cores", "ok", "16", {"cores": 16})
    assert found["memory"].status == "ok"
    assert found["memory"].text == "warning: 1 GiB free; end something"
    assert found["disk"].status == "failed"
    absent = {name for name, finding in found.items() if finding.status == "absent"}
    assert absent == {"topology", "Triton", "NVML"}
    assert found["NVML"].text == "there is no NVML (libno-such-thing.so.1)"


def test_the_topology_is_kept_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '\\tGPU0\\tGPU1\\nGPU0\\t X \\tNV18\\n\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    context = make_context(tmp_path)
    versions._add_topology(context)
    assert findings(context)["topology"].figures == {
        "lines": ["  GPU0  GPU1", "GPU0   X   NV18"],
    }
    program.write_text("#!/bin/sh\nexit 9\n")
    context = make_context(tmp_path)
    versions._add_topology(context)
    assert findings(context)["topology"].status == "absent"


# -- exactness and NCCL ---------------------------------------------------------------------------


def test_eager_and_captured_runs_are_compared_with_their_own_kind(
    tmp_path: Path, trainings: Trainings
) -> None:
    context = make_context(tmp_path)
    exactness.run(context)
    found = findings(context)
    assert found["eager"].status == "ok" and found["captured"].status == "failed"
    assert "other weights (aaaaaaaaaaaaaaaa and bbbbbbbbbbbbbbbb)" in found["captured"].text
    assert found["captured against eager"].figures == {"equal": True}
    captures = {name: words[-1] for name, words, _ in trainings}
    assert captures["eager again"] == "run.capture=none"
    assert captures["captured again"] == "run.capture=graphs"


def test_as_many_ranks_as_devices_run_over_nccl(tmp_path: Path, trainings: Trainings) -> None:
    context = make_context(tmp_path, devices=6)
    nccl_edges.run(context)
    found = findings(context)
    statuses = {name: finding.status for name, finding in found.items()}
    assert statuses == {
        "eager, depth 1": "ok", "eager, depth 4": "failed", "captured, depth 4": "failed",
    }  # fmt: skip
    assert found["eager, depth 4"].text == "it hangs"
    runs = {name: (words, variables) for name, words, variables in trainings}
    words, variables = runs["eager depth 1"]
    assert {"pipeline.processes=6", "pipeline.stages=6", "pipeline.backend=nccl"} <= {*words}
    assert variables == {}
    assert "pipeline.processes=1" in runs["one process captured"][0]


def test_ranks_share_one_device_where_nccl_can(tmp_path: Path, trainings: Trainings) -> None:
    context = make_context(tmp_path)
    nccl_edges.run(context)
    assert findings(context)["eager, depth 1"].status == "ok"
    runs = {name: (words, variables) for name, words, variables in trainings}
    words, variables = runs["eager depth 1"]
    assert "pipeline.processes=2" in words and variables == SHARING_VARIABLES
    assert variables["NCCL_MULTI_RANK_GPU_ENABLE"] == "1"


def test_an_older_nccl_on_one_device_is_told(tmp_path: Path, trainings: Trainings) -> None:
    context = make_context(tmp_path, nccl="2.29.9")
    nccl_edges.run(context)
    found = findings(context)
    assert found["NCCL"].status == "absent"
    assert found["NCCL"].text == "several ranks on one device need NCCL 2.30, here is 2.29.9"
    assert found["gloo"].status == "ok" and set(found) == {"NCCL", "gloo"}
    (backend,) = [words[-1] for name, words, _ in trainings if name == "gloo"]
    assert backend == "pipeline.backend=gloo"


# -- memory ---------------------------------------------------------------------------------------


def test_a_rank_that_grows_is_wrong(tmp_path: Path, trainings: Trainings) -> None:
    context = make_context(tmp_path, devices=2)
    flat_memory._check_ranks(context)
    finding = findings(context)["over NCCL"]
    assert finding.status == "failed"
    assert finding.figures == {"steps": [20, 1000], "peak_bytes": [[100, 100], [100, 103]]}
    assert "optim.max_steps=1000" in trainings[1][1]


def test_memory_over_nccl_needs_two_ranks(tmp_path: Path, trainings: Trainings) -> None:
    context = make_context(tmp_path, nccl="2.27.3")
    flat_memory._check_ranks(context)
    assert findings(context)["over NCCL"].status == "absent" and trainings == []


@pytest.mark.parametrize(
    ("growth", "status"),
    [({}, "ok"), ({"peak_bytes": 3}, "failed"), ({"allocated_bytes": 3}, "failed")],
)
def test_memory_that_grows_in_one_process_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, growth: dict[str, int], status: str
) -> None:
    steps: list[int] = []
    stages = SimpleNamespace(step=lambda: steps.append(1))
    monkeypatch.setattr(flat_memory, "resolve_words", lambda words: None)
    monkeypatch.setattr(flat_memory, "build_stages", lambda config: stages)
    names = ("peak_bytes", "allocated_bytes", "reserved_bytes", "resident_bytes")
    before = dict.fromkeys(names, 100)
    after = {name: 100 + growth.get(name, 0) for name in names}
    readings = iter([before, {**after, "resident_bytes": 1000}])
    monkeypatch.setattr(flat_memory, "_read_memory", lambda: next(readings))
    context = make_context(tmp_path)
    flat_memory._check_one_process(context)
    finding = findings(context)["one process"]
    assert finding.status == status
    # The stages warm up with eight steps of their own.
    assert len(steps) == 1000 - 8 and finding.figures["after"]["resident_bytes"] == 1000


def test_infopro_is_held_against_its_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"e2e": 1000, "15": 580, "10,21": 440, "7,15,27": 500}
    asked = []

    def measure(
        context: StepContext, batch: int, words: Sequence[str], segments: int | None = None
    ) -> int | None:
        asked.append((batch, segments))
        if batch > 512:
            return None  # the device is too small
        cuts = words[-1].removeprefix("pipeline.cuts=")
        return peaks["e2e" if segments else cuts]

    monkeypatch.setattr(infopro_memory, "_measure_peak", measure)
    context = make_context(tmp_path)
    infopro_memory.run(context)
    found = findings(context)
    assert found["end to end"].figures == {"peak_memory_bytes": 1000, "batch": 512}
    assert "-42.0 %; published -42.8 %" in found["InfoPro, K = 2"].text
    assert "published -55.1 %" in found["InfoPro, K = 3"].text
    assert "-50.0 %; published -62.6 %" in found["InfoPro, K = 4"].text
    statuses = [found[f"InfoPro, K = {stages}"].status for stages in (2, 3, 4)]
    assert statuses == ["ok", "ok", "failed"]
    assert asked[:2] == [(1024, 1), (512, 1)] and asked[2:] == [(512, None)] * 3


def test_a_device_that_is_too_small_for_all_batches_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infopro_memory, "_measure_peak", lambda *arguments, **options: None)
    context = make_context(tmp_path)
    infopro_memory.run(context)
    (finding,) = findings(context).values()
    assert finding.status == "failed" and "too small for a batch of 256" in finding.text


# -- throughput -----------------------------------------------------------------------------------


ROW = {
    "system": "sequential", "micro_batches": None, "samples_per_s": 1234.5, "processes": 1,
    "peak_memory_bytes": [2**21], "efficiency": 0.98, "note": None,
}  # fmt: skip


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Replace the benchmark. The captured one fails, the eager one has a row that failed."""
    started: dict[str, list[str]] = {}

    def run(context: StepContext, name: str, words: Sequence[str], limit_s: float) -> CommandEnd:
        started[name] = list(words)
        if name == "captured":
            return CommandEnd(None, "killed by SIGKILL")
        bad = {**ROW, "system": "e2e", "samples_per_s": None, "note": "no memory"}
        return CommandEnd({"rows": [ROW, bad]})

    monkeypatch.setattr(throughput, "bench", run)
    return started


def test_the_peers_need_a_second_device(
    tmp_path: Path, benchmarks: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    context = make_context(tmp_path)
    throughput.run(context)
    found = findings(context)
    assert found["eager: sequential"].text == "1,234 samples/s, 2 MiB, 0.980 of its bound"
    assert found["eager: e2e"].status == "failed" and found["eager: e2e"].text == "no memory"
    assert found["captured"].text == "killed by SIGKILL"
    for name in ("several devices", "several devices, captured"):
        assert found[name].status == "absent"
        assert "GPipe, 1F1B, zero bubble, DDP: there is one device" in found[name].text
    assert found["compiled"].status == "absent" and "Triton" in found["compiled"].text
    assert list(benchmarks) == ["eager", "captured"]


def test_several_devices_have_the_peers_and_compiling_comes_last(
    tmp_path: Path, benchmarks: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "here")
    throughput.run(make_context(tmp_path, devices=3))
    assert list(benchmarks) == [
        "eager", "captured", "several devices", "several devices, captured", "compiled",
    ]  # fmt: skip
    words = benchmarks["several devices"]
    assert "pipeline.processes=3" in words
    assert "bench.systems=[localpipe,ddp,gpipe,1f1b,zb]" in words
    assert "run.capture=compile" in benchmarks["compiled"]


def test_the_words_of_all_benchmarks_are_understood(tmp_path: Path) -> None:
    from localpipe import config as configs
    from localpipe.doctor.gpu.commands import checked_words
    from localpipe.doctor.gpu.device_work import speed_words

    for size in ("full", "tiny"):
        context = make_context(tmp_path, devices=4, size=size)
        configs.load("demo", [*checked_words(context), "pipeline.processes=1"])
        for call in throughput._list_calls(context):
            words = [*speed_words(context), *call.words, *throughput._list_window_words(context)]
            config = configs.load("demo", words)
            assert config.pipeline.processes in (1, 4)
            for count in config.bench.micro_batches:
                assert config.data.batch_size % count == 0
        for word in ("pipeline.stages=1", "method=auglocal"):
            configs.load("demo", [*accuracy._list_words(context), "data.root=x.npz", word])


# -- energy ---------------------------------------------------------------------------------------


class FakeNvml:
    """NVML as the ctypes library shows it: a device that uses two joules between two readings."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.millijoules, self.uuid = status, 5000, b""
        self.nvmlErrorString = Describe()

    def nvmlInit_v2(self) -> int:  # noqa: N802 - NVML's own name
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:  # noqa: N802
        self.uuid = uuid
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, pointer: Any) -> int:  # noqa: N802
        self.millijoules += 2000
        pointer._obj.value = self.millijoules
        return self.status


class Describe:
    """nvmlErrorString, which has the type of its result as an attribute."""

    restype: Any = None

    def __call__(self, status: int) -> bytes:
        assert self.restype is ctypes.c_char_p
        return b"Not Supported"


@pytest.fixture
def uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(uuid="12-34")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


def test_the_energy_of_a_device_is_read_in_joules(uuid: None) -> None:
    library = FakeNvml()
    read_joules = open_energy_meter(0, library)
    assert library.uuid == b"GPU-12-34"
    assert read_joules() == 9.0 and read_joules() == 11.0


def test_a_device_that_tells_no_energy_is_a_reason(uuid: None) -> None:
    with pytest.raises(NvmlError, match="^NVML: the device's energy: Not Supported$"):
        open_energy_meter(0, FakeNvml(3))


def test_without_nvml_energy_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_LIBRARY", "libno-such-thing.so.1")
    context = make_context(tmp_path)
    energy.run(context)
    (finding,) = findings(context).values()
    assert finding.status == "absent" and "there is no NVML" in finding.text


def test_energy_is_divided_by_the_samples_of_all_counted_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step uses one joule, whatever else it does: so a sample takes 1 / batch."""
    used = [0.0]

    def step() -> None:
        used[0] += 1

    context = make_context(tmp_path, size="tiny")
    energy.measure_energy(context, "stages", step, lambda: used[0])
    figures = findings(context)["stages"].figures
    assert figures["joules_per_sample"] == pytest.approx(1 / TINY.speed_batch)
    energy.measure_energy(context, "still", step, lambda: 1.0)
    assert findings(context)["still"].status == "absent"


# -- accuracy -------------------------------------------------------------------------------------


def test_without_data_accuracy_is_absent(tmp_path: Path) -> None:
    context = make_context(tmp_path)
    accuracy.run(context)
    (finding,) = findings(context).values()
    assert finding.status == "absent" and "--cifar FILE" in finding.text


def test_a_run_that_is_killed_keeps_its_last_evaluation(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    records = []
    for epoch in (1, 2):
        for stage in (0, 1):
            record = {"kind": "eval", "step": epoch, "epoch": epoch, "split": "test"}
            records.append({**record, "stage": stage, "accuracy": (4 * epoch + stage) / 16})
    lines = [json.dumps({"schema": 1, "kind": "start"}), *map(json.dumps, records)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    context = make_context(tmp_path)
    end = CommandEnd(None, "it did not end in its time, and was killed")
    accuracy._add_end(context, "AugLocal", end, 9, folder)
    finding = findings(context)["AugLocal"]
    assert finding.status == "failed" and finding.figures == {"test_accuracy": 9 / 16, "epochs": 2}
    assert finding.text.startswith("56.25 % in epoch 2 of 9; it did not end")
    accuracy._add_end(context, "other", end, 9, tmp_path / "no run")
    assert findings(context)["other"].text == end.problem


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a step take 20 ms, and an epoch 100 steps."""
    schedule = SimpleNamespace(steps_per_epoch=100)
    runner = SimpleNamespace(context=SimpleNamespace(schedule=schedule))
    stages = SimpleNamespace(runners=[runner], step=None)
    monkeypatch.setattr(accuracy, "resolve_words", lambda words: None)
    monkeypatch.setattr(accuracy, "build_stages", lambda config: stages)
    monkeypatch.setattr(accuracy, "measure_step_s", lambda step, seconds: 0.02)


def test_as_many_epochs_as_fit_are_counted(steady: None) -> None:
    # 3 s are measured, and 20 s are for start and end. A fifth of the rest is for evaluations.
    assert accuracy._count_epochs([], 3.0, 123.0) == 40
    assert accuracy._count_epochs([], 3.0, 10.0) < 1


@pytest.mark.parametrize(
    ("minutes", "least", "most"), [(10, 90, 120), (0.1, 1, 1), (100, 160, 160)]
)
def test_both_ways_to_train_share_the_time_that_is_left(
    tmp_path: Path,
    steady: None,
    monkeypatch: pytest.MonkeyPatch,
    minutes: float,
    least: int,
    most: int,
) -> None:
    epochs: dict[str, int] = {}

    def train(
        context: StepContext, runs: Mapping[str, Sequence[str]], limit_s: float
    ) -> dict[str, CommandEnd]:
        ((name, words),) = runs.items()
        (word,) = [word for word in words if word.startswith("optim.epochs=")]
        epochs[name] = int(word.removeprefix("optim.epochs="))
        summary = {
            "test_accuracy": 0.5, "test_accuracy_per_stage": [0.5], "epochs": 1, "wall_s": 2.0,
            "train_samples_per_s": None,
        }  # fmt: skip
        return {name: CommandEnd(summary)}

    monkeypatch.setattr(accuracy, "train_all", train)
    end_s = time.monotonic() + 60 * minutes
    request = StepRequest("", str(tmp_path), "full", str(tmp_path / "cifar.npz"), end_s)
    context = StepContext(request, MACHINE)
    accuracy.run(context)
    assert list(epochs) == ["end to end", "AugLocal 4 stages"]
    # The first run has half of the time. It is over at once here, so the second has all of it.
    assert least <= epochs["end to end"] <= most
    assert epochs["AugLocal 4 stages"] >= epochs["end to end"]
    assert findings(context)["AugLocal, 4 stages"].text == "50.00 % after 1 epochs, 2 s"


# -- real commands, on the CPU --------------------------------------------------------------------


@pytest.fixture
def words(tmp_path: Path) -> Callable[..., list[str]]:
    """Return the words of a very small run on the CPU."""
    images, labels = np.zeros((16, 8, 8, 3), np.uint8), np.arange(16) % 10
    path = tmp_path / "data.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)

    def make(*more: str) -> list[str]:
        return [
            "model.name=resnet8", "data.name=npz", f"data.root={path}", "data.batch_size=8",
            "pipeline.stages=2", "pipeline.processes=1", "optim.epochs=1", "optim.max_steps=1",
            "run.device=cpu", "run.threads=1", *more,
        ]  # fmt: skip

    return make


def test_runs_are_trained_at_the_same_time_and_mistakes_are_told(
    tmp_path: Path, words: Callable[..., list[str]]
) -> None:
    context = make_context(tmp_path)
    runs = {"good one": words(), "bad": words("model.name=resnet9")}
    ends = train_all(context, runs, 300)
    good, bad = ends["good one"].result, ends["bad"]
    assert good is not None and good["steps"] == 1
    assert bad.result is None and "did you mean" in bad.problem
    assert (tmp_path / "good_one" / "summary.json").exists()


def test_a_run_that_does_not_end_is_killed_and_told(
    tmp_path: Path, words: Callable[..., list[str]]
) -> None:
    ends = train_all(make_context(tmp_path), {"slow": words()}, 0.1)
    assert ends["slow"] == CommandEnd(None, "it did not end in its time, and was killed")


def test_a_benchmark_returns_its_rows(tmp_path: Path, words: Callable[..., list[str]]) -> None:
    context = make_context(tmp_path)
    given = words("bench.systems=[sequential]", "bench.windows=1", "bench.window_s=0.02")
    end = bench(context, "two words", given, 300)
    assert end.result is not None, end.problem
    (row,) = end.result["rows"]
    assert row["system"] == "sequential" and row["samples_per_s"] > 0
